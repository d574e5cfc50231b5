"""Reads a stream from its beginning and on, each entry once, whatever becomes of the connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelNotFoundEntity
from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.errors import AccessDenied, BrokertaskError, BrokerUnavailable, ConfigurationError
from brokertask.transport.base import OFFSET
from brokertask.transport.rabbitmq.codec import message_of
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.waiting import close_quietly, describe, raise_if_cancelled

log = logging.getLogger("brokertask.rabbitmq")

AHEAD: Final = 500
"""Entries that the broker sends ahead; they are acked in halves of it, so that it goes on."""
RESUME_PAUSE: Final = 0.5


class RabbitFollower:
    """Follows one stream on a channel of its own, over whatever connection the link has."""

    def __init__(
        self,
        link: Link,
        stream: str,
        receive: Callable[[Message], None],
        *,
        after: int | None,
        restore: Callable[[], Awaitable[None]],
    ) -> None:
        self._link = link
        self._stream = stream
        self._receive = receive
        self._after = after
        self._restore = restore
        self._unacked = 0
        self._channel: AbstractChannel | None = None
        self._ended = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def up(self) -> bool:
        """Whether the broker is sending to it at this moment, or is not meant to."""
        return self._stopped or (self._channel is not None and not self._ended.is_set())

    async def start(self, *, timeout: float) -> None:
        """Begin, and keep it up from then on."""
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            try:
                await self._subscribe(timeout)
                break
            except BrokerUnavailable:
                # A stream is there some seconds later than the node that has just started.
                if asyncio.get_running_loop().time() + RESUME_PAUSE > deadline:
                    raise
            await asyncio.sleep(RESUME_PAUSE)
        self._keeper = asyncio.create_task(self._keep(), name=f"brokertask follow {self._stream}")

    async def limit(self, prefetch: int) -> None:
        """Do nothing: what is only read needs no limit."""

    async def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._channel is not None:
            await close_quietly(self._channel)

    async def close(self) -> None:
        """Stop."""
        await self.stop()

    async def _keep(self) -> None:
        # A cancellation can be lost in `asyncio.wait_for`, below aiormq.
        while not self._stopped:
            await self._ended.wait()
            if self._channel is not None:
                await close_quietly(self._channel)
            await asyncio.sleep(RESUME_PAUSE)
            await self._resume()

    async def _resume(self) -> None:
        said = ""
        while not self._stopped:
            try:
                await self._subscribe(RPC_TIMEOUT)
            except BrokerUnavailable as error:
                log.debug("following %s: %s", self._stream, error)
            except BrokertaskError as error:
                if str(error) != said:
                    log.error("%s; trying until it can be read", error)
                said = str(error)
                if isinstance(error, ConfigurationError):
                    # Another stream takes its place, and is read from its beginning.
                    self._after = None
                    await self._try_to_restore()
            except Exception:
                log.exception("%s cannot be followed", self._stream)
            else:
                return
            await asyncio.sleep(RESUME_PAUSE)

    async def _try_to_restore(self) -> None:
        try:
            await self._restore()
        except BrokertaskError as error:
            log.error("%s cannot be restored: %s", self._stream, error)

    async def _subscribe(self, timeout: float) -> None:
        channel = await self._link.channel(confirms=False, timeout=timeout)
        ended = asyncio.Event()
        channel.closing.add_done_callback(lambda _: ended.set())

        def cancelled(_: Basic.Cancel) -> None:
            ended.set()

        channel.on_consumer_cancel_callbacks.add(cancelled)
        self._channel, self._ended, self._unacked = channel, ended, 0
        try:
            await self._begin(channel)
        except BaseException:
            ended.set()
            await close_quietly(channel)
            raise

    async def _begin(self, channel: AbstractChannel) -> None:
        async def receive(delivered: DeliveredMessage) -> None:
            if self._channel is channel and not self._stopped:
                await self._take(channel, delivered)

        offset = "first" if self._after is None else self._after + 1
        try:
            await channel.basic_qos(prefetch_count=AHEAD, timeout=RPC_TIMEOUT)
            await channel.basic_consume(
                self._stream, receive, arguments={OFFSET: offset}, timeout=RPC_TIMEOUT
            )
        except ChannelNotFoundEntity as error:
            if "no queue" not in describe(error):
                raise BrokerUnavailable(f"{self._stream!r}: {describe(error)}") from error
            raise ConfigurationError(
                f"stream {self._stream!r} does not exist; run `brokertask topology apply`, "
                "or set BROKERTASK_DECLARE=true"
            ) from error
        except ChannelAccessRefused as error:
            raise AccessDenied(f"this user may not read: {describe(error)}") from error
        except (AMQPError, OSError, RuntimeError, TimeoutError) as error:
            raise BrokerUnavailable(f"cannot read {self._stream!r}: {describe(error)}") from error
        except asyncio.CancelledError as error:
            raise_if_cancelled(error)
            raise BrokerUnavailable(f"connection lost, reading {self._stream!r}") from error

    async def _take(self, channel: AbstractChannel, delivered: DeliveredMessage) -> None:
        message = message_of(delivered)
        offset = message.headers.get(OFFSET)
        # The broker begins with a whole chunk, which may hold what came before.
        if isinstance(offset, int) and (self._after is None or offset > self._after):
            self._after = offset
            self._receive(message)
        self._unacked += 1
        if self._unacked >= AHEAD // 2:
            self._unacked = 0
            await channel.basic_ack(delivered.delivery_tag or 0, multiple=True, wait=False)
