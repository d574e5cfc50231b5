"""A subscription that resumes after every loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from aiormq.abc import AbstractChannel
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelNotFoundEntity

from brokertask.errors import AccessDenied, BrokertaskError, BrokerUnavailable, ConfigurationError
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.session import Handle, Limit, Session
from brokertask.transport.rabbitmq.waiting import describe, raise_if_cancelled

log = logging.getLogger("brokertask.rabbitmq")

CANCEL_TIMEOUT: Final = 5.0
RESUME_PAUSE: Final = 0.5
Prepare = Callable[[AbstractChannel], Awaitable[None]]


class RabbitConsumer:
    """Consumes one queue on a channel of its own, over whatever connection the link has."""

    def __init__(
        self,
        link: Link,
        queue: str,
        handle: Handle,
        *,
        prefetch: int,
        limited: bool = False,
        no_ack: bool = False,
        prepare: Prepare | None = None,
        restore: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._link = link
        self._queue = queue
        self._handle = handle
        self._whole = Limit(prefetch, 1) if limited else Limit(1, prefetch)
        self._limit = self._whole
        self._later: Limit | None = None
        """The latest limit that was asked for while there was no session."""
        self._no_ack = no_ack
        self._prepare = prepare
        self._restore = restore
        self._session: Session | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def up(self) -> bool:
        """Whether the broker is delivering to it at this moment, or is not meant to."""
        return self._stopped or (self._session is not None and self._session.up)

    async def start(self, *, timeout: float) -> None:
        """Subscribe once, and keep it up from then on."""
        await self._subscribe(timeout)
        self._keeper = asyncio.create_task(self._keep(), name=f"brokertask consumer {self._queue}")

    async def limit(self, prefetch: int) -> None:
        """See `Consumer.limit`."""
        if not self._stopped:
            limit = Limit(max(0, prefetch), 1)
            if self._session is None or self._session.ended.is_set():
                self._later = limit
            await self._change(limit)

    async def stop(self) -> None:
        """See `Consumer.stop`."""
        self._stopped = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT):
                await self._change(Limit(0, 1))

    async def close(self) -> None:
        """See `Consumer.close`."""
        await self.stop()
        if self._session is not None:
            await self._session.close()

    async def _change(self, limit: Limit) -> None:
        self._limit = limit
        if self._session is not None:
            await self._session.change(limit)

    async def _keep(self) -> None:
        """Subscribe again whenever the session ends, until stopped."""
        # A cancellation can be lost in `asyncio.wait_for`, below aiormq.
        while not self._stopped:
            assert self._session is not None
            await self._session.ended.wait()
            ended = self._session
            closing = ended.channel.closing
            why = closing.exception() if closing.done() and not closing.cancelled() else None
            told = describe(why) if closing.done() else "cancelled by the broker"
            log.warning("consumer of %s ended (%s); resuming", self._queue, told)
            # After a cancel by the broker the channel lives on and holds deliveries; closing it
            # gives them back, so that none is held by a consumer that no longer exists.
            cancelled = not closing.done()
            await ended.close()
            if not self._stopped:
                self._limit = self._later or self._whole
            if cancelled:
                # RabbitMQ 4.3 closes the connection if its queue is only just going.
                await asyncio.sleep(RESUME_PAUSE)
            await self._resume()
            self._later = None

    async def _resume(self) -> None:
        said = ""
        while not self._stopped:
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
            except Exception:
                log.exception("%s cannot be restored", self._queue)

    async def _subscribe(self, timeout: float) -> None:
        lane = await self._link.lane(confirms=False, timeout=timeout)
        session = Session(lane, self._queue, self._handle, no_ack=self._no_ack)
        try:
            await self._begin(session)
        except BaseException:
            # The broker may deliver to it already; closed, it gives back what it was given.
            await session.close()
            raise

    async def _begin(self, session: Session) -> None:
        """Consume on a fresh channel, or say why that is not possible."""
        try:
            if self._prepare is not None:
                await self._prepare(session.channel)
            self._session = session
            await session.begin(self._limit)
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
