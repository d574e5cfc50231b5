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
from brokertask.topology import Binding, Queue, Topology
from tests.flow.serving import QUORUM, Serving

SECONDS = 20.0


class Deciding(Serving):
    """A server for an app, with the parts that decide."""

    async def __aenter__(self) -> Deciding:
        await super().__aenter__()
        server = self.resources.names.server
        queue = Queue(f"{server}.admissions", QUORUM)
        await self.resources.transport.declare(
            Topology((), (queue,), (Binding(server, queue.name, "admit"),))
        )
        self.admissions, self.schedules = Admissions(self.resources), Schedules(self.resources)
        parts = (self.admissions.run(), self.schedules.run())
        self._parts += [asyncio.create_task(part) for part in parts]
        return self

    async def die(self) -> None:
        """Stop without a word: what is not committed and acked is as if it had not been."""
        for part in self._parts:
            part.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)
        self._parts.clear()
        await self.resources.transport.close()


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
