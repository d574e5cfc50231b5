"""A server that decides on triggers and schedules, in this process, on a clock of the test's."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from brokertask.server.admission import Admissions
from brokertask.server.schedules import Schedules
from brokertask.topology import Names, Topology, server
from tests.flow.serving import Serving

SECONDS = 20.0


def queues(names: Names) -> Topology:
    """Return what of a server's topology is for these parts."""
    every = server(names)
    mine = [f"{names.server}.{name}" for name in ("admissions", "manifests")]
    return Topology(
        every.exchanges,
        tuple(queue for queue in every.queues if queue.name in mine),
        tuple(binding for binding in every.bindings if binding.queue in mine),
    )


class Deciding(Serving):
    """A server for an app, with the parts that decide."""

    async def __aenter__(self) -> Deciding:
        await super().__aenter__()
        await self.resources.transport.declare(queues(self.resources.names))
        self.admissions, self.schedules = Admissions(self.resources), Schedules(self.resources)
        parts = (self.admissions.run(), self.schedules.run())
        self._parts += [asyncio.create_task(part) for part in parts]
        return self


async def eventually(condition: Callable[[], Any]) -> None:
    """Return when a condition holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when a condition holds that has to be asked for."""
    async with asyncio.timeout(SECONDS):
        while not await condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def fresh_database(url: str) -> str:
    """Return the URL of a new database beside another one of PostgreSQL."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"create database {name}"))
    await engine.dispose()
    return make_url(url).set(database=name).render_as_string(hide_password=False)
