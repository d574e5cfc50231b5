"""One confirmed publish, and what each way of failing means for the caller."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiormq import Channel
from aiormq.abc import AbstractConnection
from aiormq.exceptions import (
    AMQPError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    DeliveryError,
)
from aiormq.exceptions import PublishError as Returned
from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.errors import (
    AccessDenied,
    BrokerBlocked,
    BrokertaskError,
    BrokerUnavailable,
    InvalidPayload,
    PublishError,
    PublishUnknown,
    QueueFull,
    Unroutable,
)
from brokertask.topology import Route
from brokertask.transport.rabbitmq.codec import properties_of
from brokertask.transport.rabbitmq.link import Link, close_quietly, describe, raise_if_cancelled

PROBE_TIMEOUT: Final = 0.005
LOST_PAUSE: Final = 0.05
BLOCKED_CHECK: Final = 1.0
"""A connection that is lost while it is blocked never says that it is not blocked any more."""


class Publisher:
    """Publishes over one confirm channel of one link, opened again when it is closed."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._in_flight: dict[str, asyncio.Event] = {}

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool
    ) -> None:
        """See `Transport.publish`."""
        deadline = asyncio.get_running_loop().time() + timeout
        async with self._alone(message.message_id):
            channel = await self._ready_channel(deadline)
            try:
                async with asyncio.timeout_at(deadline):
                    await channel.basic_publish(
                        message.body,
                        exchange=route.exchange,
                        routing_key=route.key,
                        properties=properties_of(message, route),
                        mandatory=mandatory,
                        wait=False,
                    )
            except TimeoutError as error:
                if await _blocked(channel.connection):
                    raise _blocked_error(unknown=True) from error
                raise PublishUnknown(
                    f"no answer from the broker within {timeout:g} s; the message may be stored"
                ) from error
            except asyncio.CancelledError as error:
                raise_if_cancelled(error)
                raise _lost(error) from error
            except Returned as error:
                if mandatory:
                    raise _unroutable(route, error) from error
            except (TypeError, ValueError, struct.error) as error:
                raise InvalidPayload(f"a message property cannot be sent: {error}") from error
            except (AMQPError, OSError, RuntimeError) as error:
                raise translate(error, route) from error

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await close_quietly(self._channel)

    async def _ready_channel(self, deadline: float) -> Channel:
        """Return an open channel on a connection that may publish; so far, nothing was sent."""
        loop = asyncio.get_running_loop()
        while True:
            connection = await self._link.connection(timeout=deadline - loop.time())
            try:
                await _until_unblocked(connection, deadline)
                if self._channel is not None and not self._channel.is_closed:
                    return self._channel
                async with asyncio.timeout_at(deadline), self._opening:
                    return await self._open_channel()
            except TimeoutError:
                raise BrokerUnavailable("the broker opens no channel; nothing was sent") from None
            except BrokerUnavailable:
                # The connection was lost just now, and the link is about to notice.
                if loop.time() + LOST_PAUSE > deadline:
                    raise
                await asyncio.sleep(LOST_PAUSE)

    async def _open_channel(self) -> Channel:
        if self._channel is None or self._channel.is_closed:
            channel = await self._link.channel(confirms=True, timeout=None)
            if not isinstance(channel, Channel):
                raise TypeError(f"aiormq gave a channel of type {type(channel).__name__}")
            self._channel = channel
        return self._channel

    @asynccontextmanager
    async def _alone(self, message_id: str | None) -> AsyncIterator[None]:
        """Publish messages of one id one after the other.

        aiormq finds the publish that was returned by its message id: with two of one id in
        flight, the unroutable one would be reported as stored.
        """
        if message_id is None:
            yield
            return
        while (busy := self._in_flight.get(message_id)) is not None:
            await busy.wait()
        done = self._in_flight[message_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._in_flight[message_id]
            done.set()


def translate(error: Exception, route: Route) -> BrokertaskError:
    """Return what a failed publish on `route` means."""
    text = describe(error)
    if isinstance(error, DeliveryError) and isinstance(error.frame, Basic.Nack):
        return QueueFull(
            f"the broker refused the message for {route.key!r}: its queue is at its limit or "
            "the broker is short of resources; try again later"
        )
    # A closed channel ends every publish in flight on it, whichever of them was to blame.
    ours = f"'{route.exchange}'" in text
    if isinstance(error, ChannelNotFoundEntity) and ours:
        return Unroutable(
            f"exchange {route.exchange!r} does not exist on this broker; "
            "run `brokertask topology apply`, or set BROKERTASK_DECLARE=true"
        )
    if isinstance(error, ChannelAccessRefused) and ours:
        return AccessDenied(f"this user may not write to exchange {route.exchange!r}: {text}")
    return _lost(error)


def _lost(error: BaseException) -> PublishError:
    return PublishUnknown(
        f"the connection was lost before the broker answered ({describe(error)}); "
        "the message may be stored"
    )


def _unroutable(route: Route, error: Returned) -> Unroutable:
    keys = ", ".join(repr(key) for key in (route.key, *route.also))
    return Unroutable(
        f"no queue on this broker takes {keys} from exchange {route.exchange!r}: no worker has "
        "declared it. Start one, run `brokertask topology apply`, or mend the task's id"
    )


def _blocked_error(*, unknown: bool) -> BrokerBlocked:
    fate = "it may be stored once the alarm ends" if unknown else "nothing was sent"
    return BrokerBlocked(
        f"a memory or disk alarm on the broker blocks publishing; {fate}. "
        "`rabbitmqctl status` names the alarm",
        unknown=unknown,
    )


async def _until_unblocked(connection: AbstractConnection, deadline: float) -> None:
    """Return when no alarm keeps this connection from publishing."""
    loop = asyncio.get_running_loop()
    while not connection.is_closed:
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + BLOCKED_CHECK)):
                return await connection.ready()
        except TimeoutError:
            if loop.time() >= deadline:
                raise _blocked_error(unknown=False) from None
    raise BrokerUnavailable("the connection was lost; nothing was sent")


async def _blocked(connection: AbstractConnection) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            await connection.ready()
    except TimeoutError:
        return True
    return False
