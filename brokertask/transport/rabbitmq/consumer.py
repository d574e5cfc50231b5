"""A subscription that resumes after every loss, and the deliveries it hands out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelNotFoundEntity
from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.errors import AccessDenied, BrokertaskError, BrokerUnavailable, ConfigurationError
from brokertask.transport.base import Receive
from brokertask.transport.rabbitmq.codec import lost_deliveries, message_of
from brokertask.transport.rabbitmq.link import (
    Link,
    close_quietly,
    describe,
    quietly,
    raise_if_cancelled,
)

log = logging.getLogger("brokertask.rabbitmq")

RPC_TIMEOUT: Final = 30.0
CANCEL_TIMEOUT: Final = 5.0
RESUME_PAUSE: Final = 0.5
Prepare = Callable[[AbstractChannel], Awaitable[None]]


class _Session:
    """One channel's life as a consumer; its deliveries can be settled only within it."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.alive = True
        self.ended = asyncio.Event()
        channel.closing.add_done_callback(lambda _: self.end())
        channel.on_consumer_cancel_callbacks.add(self._cancelled)

    def end(self) -> None:
        self.alive = False
        self.ended.set()

    def _cancelled(self, _: Basic.Cancel) -> None:
        self.ended.set()


class RabbitDelivery:
    """A delivery on one channel; see `transport.base.Delivery`."""

    __slots__ = ("_session", "_settled", "_tag", "lost", "message", "queue", "redelivered")

    def __init__(self, delivered: DeliveredMessage, session: _Session, queue: str) -> None:
        self.message: Message = message_of(delivered)
        self.queue = queue
        self.redelivered = bool(delivered.redelivered)
        self.lost = lost_deliveries(delivered)
        self._tag = delivered.delivery_tag or 0
        self._session = session
        self._settled = False

    @property
    def live(self) -> bool:
        """Whether it can still be settled."""
        return not self._settled and self._session.alive

    async def ack(self) -> None:
        """Settle it."""
        if self.live:
            self._settled = True
            with suppress(AMQPError, RuntimeError):
                await self._session.channel.basic_ack(self._tag, wait=False)

    async def requeue(self) -> None:
        """Give it back to its queue."""
        if self.live:
            self._settled = True
            with suppress(AMQPError, RuntimeError):
                await self._session.channel.basic_reject(self._tag, requeue=True, wait=False)


class RabbitConsumer:
    """Consumes one queue on a channel of its own, over whatever connection the link has."""

    def __init__(
        self,
        link: Link,
        queue: str,
        receive: Callable[[DeliveredMessage, _Session], None],
        *,
        prefetch: int,
        no_ack: bool = False,
        prepare: Prepare | None = None,
        restore: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._link = link
        self._queue = queue
        self._receive = receive
        self._prefetch = prefetch
        self._no_ack = no_ack
        self._prepare = prepare
        self._restore = restore
        self._session: _Session | None = None
        self._tag: str | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def up(self) -> bool:
        """Whether the broker is delivering to it at this moment, or it was told to stop."""
        return self._stopped or (self._session is not None and not self._session.ended.is_set())

    async def start(self, *, timeout: float) -> None:
        """Subscribe once, and keep it up from then on."""
        await self._subscribe(timeout)
        self._keeper = asyncio.create_task(self._keep(), name=f"brokertask consumer {self._queue}")

    async def stop(self) -> None:
        """See `Consumer.stop`."""
        self._stopped = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        tag, self._tag = self._tag, None
        if self._session is not None and self._session.alive and tag is not None:
            with quietly():
                await self._session.channel.basic_cancel(tag, timeout=CANCEL_TIMEOUT)

    async def close(self) -> None:
        """See `Consumer.close`."""
        await self.stop()
        if self._session is not None:
            self._session.end()
            await close_quietly(self._session.channel)

    async def _keep(self) -> None:
        """Subscribe again whenever the session ends, until stopped."""
        while True:
            assert self._session is not None
            await self._session.ended.wait()
            ended = self._session
            closing = ended.channel.closing
            why = closing.exception() if closing.done() and not closing.cancelled() else None
            log.warning("consumer of %s ended (%s); resuming", self._queue, describe(why))
            # After a cancel by the broker the channel lives on and holds deliveries; closing it
            # gives them back, so that none is held by a consumer that no longer exists.
            ended.end()
            await close_quietly(ended.channel)
            await self._resume()

    async def _resume(self) -> None:
        said = ""
        while True:
            try:
                await self._subscribe(RPC_TIMEOUT)
            except BrokerUnavailable as error:
                log.debug("consumer of %s: %s", self._queue, error)
            except BrokertaskError as error:
                if str(error) != said:
                    log.error("%s; trying until it can be consumed", error)
                said = str(error)
                if isinstance(error, ConfigurationError):
                    await self._try_to_restore()
            except Exception:
                log.exception("consumer of %s cannot resume", self._queue)
            else:
                log.info("consumer of %s resumed", self._queue)
                return
            await asyncio.sleep(RESUME_PAUSE)

    async def _try_to_restore(self) -> None:
        if self._restore is not None:
            try:
                await self._restore()
            except BrokertaskError as error:
                log.error("%s cannot be restored: %s", self._queue, error)

    async def _subscribe(self, timeout: float) -> None:
        channel = await self._link.channel(confirms=False, timeout=timeout)
        session = _Session(channel)
        try:
            self._tag = await self._consume(channel, session)
        except BaseException:
            # The broker may deliver to it already; closed, it gives back what it was given.
            session.end()
            await close_quietly(channel)
            raise
        self._session = session

    async def _consume(self, channel: AbstractChannel, session: _Session) -> str | None:
        """Begin to consume on a channel and return the consumer's tag."""
        try:
            if self._prepare is not None:
                await self._prepare(channel)
            if not self._no_ack:
                await channel.basic_qos(prefetch_count=self._prefetch, timeout=RPC_TIMEOUT)
            consuming = await channel.basic_consume(
                self._queue,
                lambda delivered: self._on_delivered(delivered, session),
                no_ack=self._no_ack,
                timeout=RPC_TIMEOUT,
            )
        except ChannelNotFoundEntity as error:
            raise ConfigurationError(
                f"queue {self._queue!r} does not exist; run `brokertask topology apply`, "
                "or set BROKERTASK_DECLARE=true"
            ) from error
        except ChannelAccessRefused as error:
            raise AccessDenied(f"this user may not consume: {describe(error)}") from error
        except (AMQPError, OSError, RuntimeError, TimeoutError) as error:
            raise BrokerUnavailable(f"cannot consume {self._queue!r}: {describe(error)}") from error
        except asyncio.CancelledError as error:
            raise_if_cancelled(error)
            raise BrokerUnavailable(f"connection lost, consuming {self._queue!r}") from error
        return consuming.consumer_tag

    async def _on_delivered(self, delivered: DeliveredMessage, session: _Session) -> None:
        self._receive(delivered, session)


def to_deliveries(queue: str, receive: Receive) -> Callable[[DeliveredMessage, _Session], None]:
    """Return a receiver that hands each message on as a delivery to settle."""
    return lambda delivered, session: receive(RabbitDelivery(delivered, session, queue))


def to_messages(
    receive: Callable[[Message], None],
) -> Callable[[DeliveredMessage, _Session], None]:
    """Return a receiver that hands on messages only."""
    return lambda delivered, _: receive(message_of(delivered))
