"""A server: its store, its broker, and its parts, each restarted when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final, Protocol

from brokertask.claims import Claims
from brokertask.clock import Clock, SystemClock
from brokertask.errors import AccessDenied, BrokertaskError, ConfigurationError, StoreOutdated
from brokertask.server.admission import Admissions
from brokertask.server.asks import Asks
from brokertask.server.control import Control
from brokertask.server.jobs import Jobs
from brokertask.server.outbox import Outbox
from brokertask.server.recorder import Recorder
from brokertask.server.resources import Resources
from brokertask.server.retention import Retention
from brokertask.server.schedules import Schedules
from brokertask.server.settings import ServerSettings
from brokertask.server.site import Address, Site
from brokertask.server.store.engine import Database
from brokertask.server.waits import Waits
from brokertask.settings import Settings
from brokertask.topology import server, topology
from brokertask.transport.base import Transport

log = logging.getLogger("brokertask.server")

FIRST_BACKOFF: Final = 0.5
LONGEST_BACKOFF: Final = 15.0
CALM: Final = 60.0
"""A part that has run for so long begins with a short backoff again."""


class Part(Protocol):
    """What a server does, until cancelled."""

    async def run(self) -> None:
        """Do it."""
        ...


class Server:
    """Runs a server on an open or closed transport, until stopped.

    Attributes:
        resources: What its parts share; usable once it has `started`.
        waits: Its part that keeps runs which wait.
        schedules: Its part that triggers what is scheduled.
        site: Its part that serves the API.
    """

    def __init__(
        self,
        settings: Settings,
        server_settings: ServerSettings,
        transport: Transport,
        *,
        clock: Clock | None = None,
        api: bool = True,
    ) -> None:
        self._settings = settings
        self._server_settings = server_settings
        self._transport = transport
        self._api = api
        self._stopping = asyncio.Event()
        self._store = Database(server_settings.store_url)
        self._outbox = Outbox()
        self.resources = resources = Resources(
            store=self._store,
            outbox=self._outbox,
            transport=transport,
            broker_settings=settings,
            clock=clock or SystemClock(),
            claims=Claims(settings.payload_store, above=settings.claim_above_bytes),
        )
        self.waits = Waits(resources)
        self.schedules = Schedules(replace(resources, clock=resources.clock.background()))
        self.site = Site(
            resources,
            address=Address.read(server_settings.bind),
            hosts=server_settings.allowed_hosts,
            trace_url=server_settings.trace_url,
        )
        self.started = asyncio.Event()

    @property
    def at_rest(self) -> bool:
        """Whether no part is at work on what it has taken in."""
        return not (self._store.busy or self._outbox.busy)

    async def ready(self) -> None:
        """Return when its parts run, and its API listens, if it has one."""
        await self.started.wait()
        if self._api:
            await self.site.listening.wait()

    def stop(self) -> None:
        """Have `run` return when everything has stopped in order."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            BrokertaskError: The store or the broker cannot be used at the start, or an address.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._store.close)
            await self._store.open()
            self.resources.claims.open()
            await self._transport.open(timeout=self._settings.connect_timeout)
            stack.push_async_callback(self._transport.close)
            await self._declare()
            tasks = [
                asyncio.create_task(_kept_running(name, part), name=f"brokertask {name}")
                for name, part in self._parts().items()
            ]
            stopping = asyncio.create_task(self._stopping.wait())
            self.started.set()
            try:
                await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (stopping, *tasks):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled() and (problem := task.exception()) is not None:
                    raise problem

    def _parts(self) -> Mapping[str, Part]:
        """Return every part; this is the place where they are listed."""
        resources, asks = self.resources, Asks(self.resources)
        parts: dict[str, Part] = {
            "outbox": _Publishing(self._outbox, resources),
            "waits": self.waits,
            "asks": asks,
            "admissions": Admissions(resources),
            "schedules": self.schedules,
            "recorder": Recorder(resources, self.waits, asks),
            "retention": Retention(
                self._store,
                resources.clock,
                keep_for=self._server_settings.keep_for,
                keep_runs=self._server_settings.keep_runs,
            ),
            "control": Control(resources, self.waits),
            "jobs": Jobs(resources),
        }
        return {**parts, "api": self.site} if self._api else parts

    async def _declare(self) -> None:
        if not self._settings.declare:
            return
        names = self._settings.names
        for each in (topology(names), server(names)):
            try:
                await self._transport.declare(each)
            except AccessDenied as error:
                log.warning("what servers need is not declared: %s", error)


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    """Have a server run inside the block, which begins when its API listens, if it has one.

    Raises:
        BrokertaskError: It cannot start.
    """
    running = asyncio.create_task(server.run(), name="brokertask server")
    ready = asyncio.create_task(server.ready())
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            yield server
    finally:
        ready.cancel()
        server.stop()
        await running


class _Publishing:
    """The outbox as a part."""

    def __init__(self, outbox: Outbox, resources: Resources) -> None:
        self._outbox = outbox
        self._resources = resources

    async def run(self) -> None:
        """Publish what is left in it."""
        await self._outbox.run(self._resources)


async def _kept_running(name: str, part: Part) -> None:
    """Run a part until cancelled. What fails is begun again; a wrong setting ends the server."""
    loop, backoff = asyncio.get_running_loop(), FIRST_BACKOFF
    while True:
        began = loop.time()
        try:
            await part.run()
            log.error("the server's %s has ended; it begins again in %g s", name, backoff)
        except Exception as error:
            causes = list(_causes(error))
            for cause in causes:
                if isinstance(cause, ConfigurationError | StoreOutdated):
                    raise cause from error
            expected = all(isinstance(cause, BrokertaskError) for cause in causes)
            said = "the server's %s begins again in %g s: %s", name, backoff, causes[0]
            log.warning(*said) if expected else log.exception(*said)
        if loop.time() - began > CALM:
            backoff = FIRST_BACKOFF
        await asyncio.sleep(backoff)
        backoff = min(2 * backoff, LONGEST_BACKOFF)


def _causes(error: Exception) -> Iterator[Exception]:
    """Yield an error, or those in a group of them."""
    if not isinstance(error, ExceptionGroup):
        yield error
        return
    for each in error.exceptions:
        yield from _causes(each)
