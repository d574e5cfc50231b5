"""One connection, made again with backoff and jitter whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import aio_pika
from aio_pika.connection import make_url
from aiormq import Channel
from aiormq.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import AMQPError, ConnectionNotAllowed, ProbableAuthenticationError

from brokertask.errors import AccessDenied, BrokerUnavailable
from brokertask.settings import mask
from brokertask.transport.rabbitmq.direct import DirectLane
from brokertask.transport.rabbitmq.lane import Lane
from brokertask.transport.rabbitmq.plain import PlainLane
from brokertask.transport.rabbitmq.tap import Tap, TapFactory
from brokertask.transport.rabbitmq.waiting import (
    close_quietly,
    closed_on_opening,
    describe,
    raise_if_cancelled,
)

log = logging.getLogger("brokertask.rabbitmq")
_foreign_log = logging.getLogger("aiormq.connection")
if _foreign_log.level == logging.NOTSET:
    # It writes a traceback for each failed try; what there is to say, `Link` says once.
    _foreign_log.setLevel(logging.CRITICAL)

UNLIMITED: Final = 1 << 32
BACKOFF_MAX: Final = 15.0
ATTEMPT_TIMEOUT: Final = 10.0
STEADY_AFTER: Final = 5.0
"""A connection that held for so long had not failed to be made."""


class Link:
    """Keeps one connection to one broker open until closed."""

    def __init__(
        self,
        url: str,
        *,
        heartbeat: int,
        name: str,
        direct: bool,
        reconnected: Callable[[], None],
    ) -> None:
        self._url = url
        self._direct = direct
        self._heartbeat = heartbeat
        self._name = name
        self._reconnected = reconnected
        self._connection: AbstractConnection | None = None
        self._taps: WeakKeyDictionary[AbstractConnection, Tap] = WeakKeyDictionary()
        self._keeper: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._closed = False
        # Set while there is an answer for callers: a connection, or a refusal to have one.
        self._answer = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether it is not needed yet, or connected at this moment."""
        return not self._closed and (self._keeper is None or self._connection is not None)

    @property
    def server(self) -> str:
        """What the broker calls itself, with its version; empty while not connected."""
        told = self._connection.server_properties if self._connection else {}
        return " ".join(str(told[key]) for key in ("product", "version") if key in told)

    async def connection(self, *, timeout: float | None) -> AbstractConnection:
        """Return the connection, waiting for it up to `timeout` seconds.

        Raises:
            BrokerUnavailable: There was none in that time.
            AccessDenied: The broker refuses the user, the password or the virtual host.
        """
        if self._closed:
            raise BrokerUnavailable("this transport is closed; nothing was sent")
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name=f"brokertask link {self._name}")
        try:
            async with asyncio.timeout(timeout):
                while self._connection is None:
                    await self._answer.wait()
                    if self._connection is None:
                        raise AccessDenied(
                            f"the broker at {mask(self._url)} refuses the user, its password or "
                            f"the virtual host: {describe(self._failure)}"
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

    async def lane(self, *, confirms: bool, timeout: float | None) -> Lane:
        """Return a new channel for messages; raises as `channel`."""
        channel = await self.channel(confirms=confirms, timeout=timeout)
        assert isinstance(channel, Channel)
        if (tap := self._taps.get(channel.connection)) is None:
            return PlainLane(channel)
        return DirectLane(channel, tap, frame_max=tap.frame_max)

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
            connection = await self._try_to_connect()
            if connection is None:
                failures += 1
                if _is_refusal(self._failure):
                    self._answer.set()
                else:
                    self._answer.clear()
                pause = min(BACKOFF_MAX, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1)
                level = logging.WARNING if failures in (3, 10) else logging.DEBUG
                log.log(level, "%s; next try in %.1f s", self._unavailable(), pause)
                await asyncio.sleep(pause)
                continue
            if failures:
                log.info("connected to %s", mask(self._url))
            began = asyncio.get_running_loop().time()
            await self._use(connection)
            # What is closed as soon as it is accepted was no success: the backoff goes on.
            steady = asyncio.get_running_loop().time() - began > STEADY_AFTER
            failures = 0 if steady else failures + 1
            self._reconnected()
            # Every client of a restarted broker comes back at once: spread them a little.
            await asyncio.sleep(min(BACKOFF_MAX, 0.1 * 2 ** min(failures, 10)) * random.random())

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
            await _release_writers(connection)
        closing = connection.closing
        self._failure = None if closing.cancelled() else closing.exception()
        log.warning("connection to %s lost: %s", mask(self._url), describe(self._failure))

    async def _try_to_connect(self) -> AbstractConnection | None:
        """Return a new connection, or None: whatever the other side did, we come back."""
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT):
                return await self._connect()
        except asyncio.CancelledError as error:
            raise_if_cancelled(error)
            self._failure = error
        except Exception as error:
            self._failure = error
        return None

    async def _connect(self) -> AbstractConnection:
        connection = _OwnedConnection(
            make_url(self._url, heartbeat=self._heartbeat),
            client_properties={"connection_name": self._name},
        )
        factory = TapFactory()
        if self._direct:
            connection.kwargs["transport_factory"] = factory
        await connection.connect()
        transport = connection.transport
        if transport is None:
            raise ConnectionError("closed while connecting")
        if factory.tap is not None:
            factory.tap.frame_max = transport.connection.connection_tune.frame_max or UNLIMITED
            self._taps[transport.connection] = factory.tap
        return transport.connection

    def _unavailable(self) -> BrokerUnavailable:
        cause = f" ({describe(self._failure)})" if self._failure else ""
        return BrokerUnavailable(
            f"the broker at {mask(self._url)} cannot be reached{cause}; start it, name another "
            "one in BROKERTASK_AMQP_URL, or run `brokertask dev` in this folder"
        )


class _OwnedConnection(aio_pika.Connection):
    """Is closed by its link, not by the collector, which may come when no loop runs any more."""

    def __del__(self) -> None:
        """Do nothing."""


def _is_refusal(error: BaseException | None) -> bool:
    return isinstance(
        error, ProbableAuthenticationError | ConnectionNotAllowed
    ) or closed_on_opening(error)


async def _release_writers(connection: AbstractConnection) -> None:
    """Let go of everybody who waits for room to write, as nobody writes here any more.

    An ack that waited for ever would keep its run from being settled with the next delivery.
    """
    frames = connection.write_queue
    while not frames.empty():
        while not frames.empty():
            frames.get_nowait()
        await asyncio.sleep(0)
