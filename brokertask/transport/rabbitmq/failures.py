"""What each way in which a publish can fail means for the caller."""

from __future__ import annotations

from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from brokertask.errors import (
    AccessDenied,
    BrokerBlocked,
    BrokertaskError,
    PublishUnknown,
    QueueFull,
    Unroutable,
)
from brokertask.topology import Route
from brokertask.transport.rabbitmq.waiting import alarmed, describe


def refused(route: Route) -> QueueFull:
    """Return the error for a publish that the broker nacked."""
    return QueueFull(
        f"the broker refused the message for {route.key!r}: its queue is at its limit or "
        "the broker is short of resources; try again later"
    )


def closed(error: BaseException | None, route: Route) -> BrokertaskError:
    """Return the error for a publish whose channel ended before it was answered.

    A closed channel ends every publish in flight on it, whichever of them was to blame.
    """
    text = describe(error)
    ours = f"'{route.exchange}'" in text
    failure: BrokertaskError
    if isinstance(error, ChannelNotFoundEntity) and ours:
        failure = Unroutable(
            f"exchange {route.exchange!r} does not exist on this broker; "
            "run `brokertask topology apply`, or set BROKERTASK_DECLARE=true"
        )
    elif isinstance(error, ChannelAccessRefused) and ours:
        failure = AccessDenied(f"this user may not write to exchange {route.exchange!r}: {text}")
    else:
        failure = PublishUnknown(
            f"the connection was lost before the broker answered ({text}); "
            "the message may be stored"
        )
    failure.__cause__ = error
    return failure


def unroutable(route: Route) -> Unroutable:
    """Return the error for a publish that no queue took."""
    keys = ", ".join(repr(key) for key in (route.key, *route.also))
    return Unroutable(
        f"no queue on this broker takes {keys} from exchange {route.exchange!r}: no worker has "
        "declared it. Start one, run `brokertask topology apply`, or mend the task's id"
    )


def unanswered(timeout: float, *, blocked: bool) -> PublishUnknown | BrokerBlocked:
    """Return the error for a publish that was sent, and not answered in time."""
    if blocked:
        return alarmed(unknown=True)
    return PublishUnknown(
        f"no answer from the broker within {timeout:g} s; the message may be stored"
    )
