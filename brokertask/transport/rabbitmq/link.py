"""One connection, made again with backoff and jitter whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import aio_pika
from aiormq.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import AMQPError, ConnectionNotAllowed, ProbableAuthenticationError

from brokertask.errors import AccessDenied, BrokerUnavailable
from brokertask.settings import mask

log = logging.getLogger("brokertask.rabbitmq")

BACKOFF_MAX: Final = 15.0
ATTEMPT_TIMEOUT: Final = 10.0
CLOSE_TIMEOUT: Final = 2.0


class Link:
    """Keeps one connection to one broker open until closed."""

    def __init__(
        self, url: str, *, heartbeat: int, name: str, reconnected: Callable[[], None]
    ) -> None:
        self._url = url
        self._heartbeat = heartbeat
        self._name = name
        self._reconnected = reconnected
        self._connection: AbstractConnection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._closed = False
        # Set while there is an answer for callers: a connection, or a refusal to have one.
        self._answer = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether it is not needed yet, or connected at this moment."""
        return not self._closed and (self._keeper is None or self._connection is not None)

    async def connection(self, *, timeout: float | None) -> AbstractConnection:
        """Return the connection, waiting for it up to `timeout` seconds.

        Raises:
            BrokerUnavailable: There was none in that time.
            AccessDenied: The broker refuses the user, the password or the virtual host.
        """
        if self._closed:
            raise BrokerUnavailable("this transport is closed; nothing was sent")
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"brokertask link {self._name}")
        try:
            async with asyncio.timeout(timeout):
                while self._connection is None:
                    await self._answer.wait()
                    if self._connection is None:
                        raise AccessDenied(
                            f"the broker at {mask(self._url)} refuses the user, its password or "
                            f"the virtual host: {self._failure}"
                        )
        except TimeoutError:
            raise self._unavailable() from self._failure
        return self._connection

    async def channel(self, *, confirms: bool, timeout: float | None) -> AbstractChannel:
        """Return a new channel.

        Raises:
            BrokerUnavailable: There was no connection, or it was lost just now.
            AccessDenied: As `connection`.
        """
        connection = await self.connection(timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                return await connection.channel(publisher_confirms=confirms, on_return_raises=True)
        except (AMQPError, OSError, RuntimeError, TimeoutError) as error:
            raise BrokerUnavailable(f"the connection was lost: {describe(error)}") from error
        except asyncio.CancelledError as error:
            raise_if_cancelled(error)
            raise BrokerUnavailable("the connection was lost while opening a channel") from error

    async def close(self) -> None:
        """Disconnect for good."""
        self._closed = True
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep(self) -> None:
        failures = 0
        while True:
            try:
                connection = await self._connect()
            except (AMQPError, OSError, TimeoutError) as error:
                failures += 1
                self._failure = error
                if isinstance(error, ProbableAuthenticationError | ConnectionNotAllowed):
                    self._answer.set()
                pause = min(BACKOFF_MAX, 0.1 * 2**failures) * random.uniform(0.5, 1)
                level = logging.WARNING if failures in (3, 10) else logging.DEBUG
                log.log(level, "%s; next try in %.1f s", self._unavailable(), pause)
                await asyncio.sleep(pause)
                continue
            if failures:
                log.info("connected to %s", mask(self._url))
            failures = 0
            await self._use(connection)
            self._reconnected()
            # Every client of a restarted broker comes back at once: spread them a little.
            await asyncio.sleep(random.uniform(0, 0.2))

    async def _use(self, connection: AbstractConnection) -> None:
        """Offer the connection to callers until it is lost."""
        self._connection, self._failure = connection, None
        self._answer.set()
        try:
            await asyncio.wait([connection.closing])
        finally:
            self._connection = None
            self._answer.clear()
            await close_quietly(connection)
        closing = connection.closing
        self._failure = None if closing.cancelled() else closing.exception()
        log.warning("connection to %s lost: %s", mask(self._url), describe(self._failure))

    async def _connect(self) -> AbstractConnection:
        connection = await aio_pika.connect(
            self._url,
            timeout=ATTEMPT_TIMEOUT,
            heartbeat=self._heartbeat,
            client_properties={"connection_name": self._name},
        )
        transport = connection.transport
        if transport is None:
            raise ConnectionError("closed while connecting")
        return transport.connection

    def _unavailable(self) -> BrokerUnavailable:
        cause = f" ({describe(self._failure)})" if self._failure else ""
        return BrokerUnavailable(
            f"the broker at {mask(self._url)} cannot be reached{cause}; "
            "is it running, and is BROKERTASK_AMQP_URL right?"
        )


def describe(error: BaseException | None) -> str:
    """Return a foreign error as short text."""
    if error is None:
        return "closed"
    return ", ".join(str(part) for part in error.args) or type(error).__name__


def raise_if_cancelled(error: asyncio.CancelledError) -> None:
    """Raise `error` again if the running task was cancelled by somebody.

    aiormq ends what is in flight on a lost connection with a CancelledError of its own, which
    would pass for a cancellation of ours.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error


async def close_quietly(resource: AbstractConnection | AbstractChannel) -> None:
    """Close a connection or channel that may be half dead, within a bounded time."""
    try:
        with suppress(AMQPError, OSError, RuntimeError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await resource.close()
    except asyncio.CancelledError as error:
        raise_if_cancelled(error)
