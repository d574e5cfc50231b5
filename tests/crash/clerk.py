"""A server that only decides on triggers and schedules: `python -m tests.crash.clerk STORE`.

With a fuse it stops dead at the n-th of the points where a crash makes a difference: before and
after each commit, publish and ack.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask import App
from brokertask.envelope import Message
from brokertask.server import outbox
from brokertask.server.admission import Admissions
from brokertask.server.outbox import Outbox
from brokertask.server.resources import Resources
from brokertask.server.schedules import Schedules
from brokertask.server.store.engine import Database
from brokertask.topology import Route, server
from brokertask.transport.base import Consumer, Delivery, Receive, Transport

READY: Final = "ready"
CLAIM_MS: Final = 2_000
"""After which another server takes what a dead one has claimed; a minute is long for a test."""


@dataclass
class Fuse:
    """Lets so many points be passed, and nothing more."""

    left: int | None = None
    blown: asyncio.Event = field(default_factory=asyncio.Event)

    async def point(self) -> None:
        """Pass a point, or never return."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.blown.set()
                await asyncio.Event().wait()


class Clerk:
    """A server for an app, until the end of its block."""

    def __init__(self, app: App, url: str, *, fuse: Fuse | None = None) -> None:
        self._app = app
        self._store = Database(url)
        self._fuse = fuse or Fuse()
        self._parts: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Clerk:
        app = self._app
        await self._store.open()
        self._transport = app.connect()
        await self._transport.open(timeout=10)
        await self._transport.declare(app.topology())
        await self._transport.declare(server(app.settings.names))
        sending = Outbox()
        self._fused = _FusedStore(self._store, self._fuse)
        resources = Resources(
            store=cast("Any", self._fused),
            outbox=sending,
            transport=cast("Transport", _FusedTransport(self._transport, self._fuse)),
            broker_settings=app.settings,
            clock=app.clock,
            claims=app.client.claims,
        )
        self.schedules = Schedules(resources)
        parts = (sending.run(resources), Admissions(resources).run(), self.schedules.run())
        self._parts = [asyncio.create_task(part) for part in parts]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._fused.stop()
        for part in self._parts:
            part.cancel()
        ended = await asyncio.gather(*self._parts, return_exceptions=True)
        await self._transport.close()
        await self._store.close()
        for problem in ended:
            if isinstance(problem, Exception):
                raise problem


class _FusedStore:
    def __init__(self, store: Database, fuse: Fuse) -> None:
        self._store = store
        self._fuse = fuse
        self._working = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        committing = ExitStack()
        with committing:
            async with self._store.begin() as connection:
                with self._at_work():
                    yield connection
                await self._fuse.point()
                committing.enter_context(self._at_work())
        await self._fuse.point()

    read = begin

    async def stop(self) -> None:
        """Return when no statement is under way: cancelled, it would keep SQLite's lock."""
        while self._working:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1


class _FusedTransport:
    """Of a transport, what a clerk uses after its start."""

    def __init__(self, transport: Transport, fuse: Fuse) -> None:
        self._transport = transport
        self._fuse = fuse

    async def publish(self, route: Route, message: Message, **options: Any) -> None:
        await self._fuse.point()
        await self._transport.publish(route, message, **options)
        await self._fuse.point()

    async def consume(self, queue: str, receive: Receive, **options: Any) -> Consumer:
        def fused(delivery: Delivery) -> None:
            receive(cast("Delivery", _FusedDelivery(delivery, self._fuse)))

        return await self._transport.consume(queue, fused, **options)

    async def depth(self, queue: str) -> object:
        return await self._transport.depth(queue)


class _FusedDelivery:
    def __init__(self, delivery: Delivery, fuse: Fuse) -> None:
        self._delivery = delivery
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        return getattr(self._delivery, name)

    async def ack(self) -> None:
        await self._fuse.point()
        await self._delivery.ack()


async def _serve(url: str) -> None:
    outbox.CLAIM_MS = CLAIM_MS  # type: ignore[misc]
    async with Clerk(App("clerk"), url):
        print(READY, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
