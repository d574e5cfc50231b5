"""The parts of a server that waits need, in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from brokertask import App
from brokertask.events import ENDS, Event
from brokertask.server import outcomes
from brokertask.server.asks import Asks
from brokertask.server.batches import Batches
from brokertask.server.outbox import Outbox
from brokertask.server.resources import Resources
from brokertask.server.store.schema import metadata
from brokertask.server.waits import Waits
from brokertask.topology import Binding, Exchange, Names, Queue, Topology

QUORUM = {"x-queue-type": "quorum"}


def server_topology(names: Names) -> Topology:
    server = names.server
    queues = tuple(Queue(f"{server}.{name}", QUORUM) for name in ("waits", "asks", "events"))
    bindings = (
        Binding(server, f"{server}.waits", "wait"),
        Binding(server, f"{server}.asks", "ask"),
        Binding(names.events, f"{server}.events", "#"),
    )
    return Topology((Exchange(server, "direct"), Exchange(names.events, "topic")), queues, bindings)


class MiniStore:
    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        self._one = asyncio.Lock()
        if url.startswith("sqlite"):
            event.listen(self.engine.sync_engine, "connect", _no_autobegin)
            event.listen(self.engine.sync_engine, "begin", _begin)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        async with self._one, self.engine.begin() as connection:
            yield connection

    read = begin


class Serving:
    """A server for an app, until the end of its block."""

    def __init__(self, app: App, url: str = "sqlite+aiosqlite://") -> None:
        self._app = app
        self._url = url
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Serving:
        app, names = self._app, self._app.settings.names
        self.store = MiniStore(self._url)
        self._stack.push_async_callback(self.store.engine.dispose)
        async with self.store.begin() as connection:
            await connection.run_sync(metadata.create_all)
        transport = app.connect()
        await transport.open(timeout=10)
        self._stack.push_async_callback(transport.close)
        await transport.declare(app.topology())
        await transport.declare(server_topology(names))
        outbox = Outbox()
        self.resources = Resources(
            store=self.store,
            outbox=outbox,
            transport=transport,
            broker_settings=app.settings,
            clock=app.clock,
            claims=app.client.claims,
        )
        self.waits, self.asks = Waits(self.resources), Asks(self.resources)
        parts = (self.waits.run(), self.asks.run(), self._record(), outbox.run(self.resources))
        self._parts = [asyncio.create_task(part) for part in parts]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        problems = [part.exception() for part in self._parts if part.done()]
        for part in self._parts:
            part.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)
        await self._stack.aclose()
        for problem in problems:
            if problem is not None:
                raise problem

    async def _record(self) -> None:
        resources = self.resources
        queue = f"{resources.names.server}.events"
        async with Batches(resources.transport, queue, 100) as batches:
            async for deliveries in batches:
                now_ms = resources.clock.now_ms()
                ends, signals = [], []
                for one in deliveries:
                    if one.message.type in ENDS:
                        ends.append(outcomes.ending_of(Event.read(one.message)))
                    elif one.message.type is None:
                        signals.append(outcomes.signal_of(one.message, one.key, at_ms=now_ms))
                async with resources.store.begin() as connection:
                    await outcomes.record_endings(connection, ends)
                    await outcomes.record_signals(connection, [one for one in signals if one])
                run_ids = [str(one["run_id"]) for one in ends]
                await self.waits.came("run", run_ids)
                await self.waits.came("event", {str(one["key"]) for one in signals if one})
                await self.asks.ended(run_ids)
                for one in deliveries:
                    await one.ack()


def _no_autobegin(connection: Any, _: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


async def _serve(app: App, url: str) -> None:
    async with Serving(app, url):
        print("serving", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(App("server"), sys.argv[1]))
