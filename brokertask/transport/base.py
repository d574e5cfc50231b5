"""The port: what brokertask asks of a broker. Every adapter passes `tests/contract`.

Adapters translate foreign errors into `brokertask.errors`; nothing else of theirs gets out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, runtime_checkable

from brokertask.envelope import Headers, HeaderValue, Message
from brokertask.topology import Binding, Exchange, Queue, Route, Topology

OFFSET: Final = "x-stream-offset"
"""The header that says where in its stream a message is."""
BROKER_HEADERS: Final = frozenset(
    {"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count", OFFSET}
    | {
        f"x-{which}-death-{part}"
        for which in ("first", "last")
        for part in ("queue", "reason", "exchange")
    }
)
"""What a broker writes or obeys in headers. A copy of an earlier message's would mislead it."""


def own_headers(headers: Headers) -> dict[str, HeaderValue]:
    """Return a copy of the headers that are a publisher's to set; every transport sends these."""
    return {name: value for name, value in headers.items() if name not in BROKER_HEADERS}


class Delivery(Protocol):
    """A received message and the right to settle it once."""

    @property
    def message(self) -> Message:
        """What came. Its headers hold what the broker added: `x-death`, `x-delivery-count`."""
        ...

    @property
    def queue(self) -> str:
        """The queue it came from."""
        ...

    @property
    def key(self) -> str:
        """The routing key that it came with."""
        ...

    @property
    def redelivered(self) -> bool:
        """It was delivered before, perhaps to somebody else."""
        ...

    @property
    def lost(self) -> int:
        """How many earlier deliveries of this message ended unsettled: crashed, cut or nacked.

        See `Transport.carries_losses` for those in a queue that it was dead-lettered from.
        """
        ...

    @property
    def live(self) -> bool:
        """It can still be settled. False once settled, or when the broker took it back."""
        ...

    async def ack(self) -> None:
        """Settle it: the broker forgets it. Does nothing when no longer live."""
        ...

    async def requeue(self) -> None:
        """Give it back to its queue, counted as one more lost delivery."""
        ...


Receive: TypeAlias = Callable[[Delivery], None]
"""Called in the event loop for each delivery. Must return at once and must not raise."""


class Consumer(Protocol):
    """A subscription to one queue. Survives reconnects; each reconnect delivers anew.

    Where its queue is deleted, it consumes again as soon as there is one of that name. A queue
    that was declared over the same transport is made anew for it.
    """

    async def limit(self, prefetch: int) -> None:
        """Take at most `prefetch` further unsettled deliveries from now on; none for 0 or less.

        What was handed out before stays live and does not count, nor does it make room when it is
        settled: the caller gives the number of its free slots. Of concurrent calls the last one
        wins. A lost connection raises nothing, and all that was held comes again: a consumer that
        resumes begins anew, with the prefetch it was made with. After `stop` this does nothing.

        A slot that stays busy when its delivery is settled is to be taken out before that. To
        take free room away races with what is on its way: that still comes, in addition, or goes
        back to its queue, on RabbitMQ counted as one more lost delivery. So does the first limit
        of a consumer that was not made to be `limited`.

        A paused consumer counts as up. Once it holds nothing it is none to the broker: `Depth`
        does not count it, and it does not keep a queue from expiring. For RabbitMQ, a consumer
        with a limit is as many consumers as it has room.

        Cost: on RabbitMQ a round trip for each delivery that room is made for or taken from.
        """
        ...

    async def stop(self) -> None:
        """Take no more deliveries. Those that were delivered stay live and can be settled."""
        ...

    async def close(self) -> None:
        """Stop, and give back to the queue what is not settled."""
        ...


@dataclass(frozen=True, slots=True)
class Depth:
    """What a queue holds and who reads it, at one moment."""

    ready: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How an object on the broker differs from the code: missing, or different in `detail`."""

    item: Exchange | Queue
    missing: bool
    detail: str = ""


@runtime_checkable
class Transport(Protocol):
    """One process's access to a broker: a connection for publishing, another for consuming."""

    @property
    def connected(self) -> bool:
        """Whether every connection in use, and every consumer, is up at this moment."""
        ...

    @property
    def carries_losses(self) -> bool:
        """Whether a message that is dead-lettered takes its count of lost deliveries along."""
        ...

    @property
    def settling(self) -> float:
        """Seconds after which a queue that was declared survives a crash of the broker."""
        ...

    async def open(self, *, timeout: float) -> None:
        """Connect. Afterwards the transport reconnects by itself, with backoff, until closed.

        Raises:
            BrokerUnavailable: No connection within `timeout` seconds.
            AccessDenied: The broker refused the user or the virtual host.
        """
        ...

    async def close(self) -> None:
        """Give back what is unsettled, and disconnect. Safe to call twice."""
        ...

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        """Return once the broker has `message` on its disk, in every queue it is routed to.

        Messages published by one task arrive in order. Concurrent calls share round trips.
        `timestamp_ms` travels in whole seconds, headers without `BROKER_HEADERS`.

        Raises:
            InvalidPayload: A property or header has no form on the wire; nothing was sent.
            Unroutable: No such exchange, or `mandatory` and no queue is bound for the route.
            QueueFull: A queue refused it, for its length or for want of resources.
            BrokerBlocked: An alarm is on. `unknown` is set when the alarm came after sending.
            BrokerUnavailable: There was no connection within `timeout`; nothing was sent.
            PublishUnknown: It was sent and no answer came within `timeout`.
            AccessDenied: This user may not write there.
        """
        ...

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        """Deliver messages of `queue` to `receive`, at most `prefetch` unsettled at a time.

        A prefetch of 0 is no limit, as in AMQP; only `Consumer.limit` takes it for a pause. One
        that is `limited` is going to have limits, and is made such that they lose nothing.

        Raises:
            ConfigurationError: There is no such queue.
            AccessDenied: This user may not read it.
        """
        ...

    async def declare(self, topology: Topology) -> None:
        """Make everything of `topology` that is missing.

        Raises:
            TopologyMismatch: Something exists with other immutable arguments; the rest is made.
            AccessDenied: This user may not configure it.
        """
        ...

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what on the broker is missing or different; changes nothing."""
        ...

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, or None if it does not exist."""
        ...

    async def delete(self, queue: str) -> None:
        """Delete `queue` with all that it holds; nothing happens if it does not exist.

        Deliveries from it are gone, too, and this transport does not make it anew by itself. Close
        its consumers first: RabbitMQ 3.10 tells them nothing, and delivers nothing to them, when
        a queue of that name is declared at once.

        Raises:
            AccessDenied: This user may not delete it.
            BrokerUnavailable: There was no answer; it may be deleted.
        """
        ...

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver to `receive` what `bindings` route, over a queue of this process's own.

        Messages are settled on receipt, so that a limit means nothing to this consumer. The queue
        is remade after a reconnect if it is gone, and deleted by `close`.

        Raises:
            AccessDenied: This user may not declare, bind or read it.
        """
        ...

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None = None
    ) -> Consumer:
        """Deliver all that `stream` holds to `receive`, in order, and what comes from now on.

        Each message once, through lost connections and restarts of the broker, and with its
        `OFFSET` among its headers; with `after`, only those beyond that offset. What is read stays
        in the stream. Limits mean nothing to this consumer. A stream that was deleted is made anew
        as a queue is, and followed from its beginning.

        Raises:
            ConfigurationError: There is no such stream.
            AccessDenied: This user may not read it.
        """
        ...
