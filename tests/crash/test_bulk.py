"""Servers are killed while a job redrives dead runs: each is redriven once, or it says why not."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import func, select

from brokertask import Abort, App, Context, Settings
from brokertask.deadletters import Selection
from brokertask.server import bulk
from brokertask.server.bulk import Action, Job
from brokertask.server.history import RunFilter
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import runs, servers
from tests.crash.history import Servers
from tests.flow.deciding import fresh_database

pytestmark = pytest.mark.anyio
RUNS = 300
KILLS = 3
PATIENCE = 150.0
"""Seconds; a claim of a server that was killed lasts for 15 of them."""


class Play:
    """Dead runs, a job over them, and servers that are killed meanwhile."""

    def __init__(self, url: str, store_url: str, folder: Path) -> None:
        self.app = App("bulk", settings=Settings(amqp_url=url))
        self.servers = [Servers(url, store_url, folder / f"{n}.log") for n in range(2)]
        self.store = Database(store_url)
        self.mended = False
        self.worked: Counter[str] = Counter()

        @self.app.task(concurrency=50)
        async def charge(number: int, ctx: Context) -> None:
            if not self.mended:
                raise Abort("no bank")
            self.worked[ctx.run_id] += 1

        self.charge = charge

    async def die(self) -> set[str]:
        """Have runs die, and return their ids when history knows of all."""
        async with asyncio.timeout(PATIENCE):
            # From then on servers miss no event.
            while await self._there() < len(self.servers):  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.1)
        asked = await self.charge.trigger_many(range(RUNS))
        async with asyncio.timeout(PATIENCE):
            await self._until("failed")
        return {run.run_id for run in asked}

    async def job(self, action: Action) -> Job:
        """Begin a job that takes some seconds."""
        job = Job(id="job", action=action, reason="mended", rate=40, options={})
        async with self.store.begin() as connection:
            wanted = RunFilter(task="charge")
            assert await bulk.create(connection, job, wanted, now_ms=0, by="test") == RUNS
        return job

    async def kill_and_wait(self) -> Counter[str]:
        """Kill the server that works, several times; return the items by state at the end."""
        chance = random.Random(7)
        kills, next_kill = 0, 20
        async with asyncio.timeout(PATIENCE):
            while True:
                async with self.store.read() as connection:
                    row = await bulk.shown(connection, "job")
                assert row is not None
                if row["ended_ms"] is not None:
                    assert kills == KILLS
                    return Counter(row["counts"])
                if kills < KILLS and row["counts"]["done"] >= next_kill:
                    next_kill = row["counts"]["done"] + 40
                    await asyncio.sleep(chance.uniform(0, 0.1))
                    for server in self.servers:
                        await server.kill()
                        await server.start()
                    kills += 1
                await asyncio.sleep(0.02)

    async def left(self) -> int:
        """Return how many dead letters there are."""
        transport = self.app.connect()
        await transport.open(timeout=10)
        async with Selection.open(transport, self.app.settings, ["charge"], bodies=False) as found:
            count = len(found.letters)
        await transport.close()
        return count

    async def _until(self, status: str) -> None:
        while await self._count(status) < RUNS:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.1)

    async def _there(self) -> int:
        async with self.store.read() as connection:
            return await connection.scalar(select(func.count()).select_from(servers)) or 0

    async def _count(self, status: str) -> int:
        async with self.store.read() as connection:
            wanted = select(func.count()).select_from(runs).where(runs.c.status == status)
            return await connection.scalar(wanted) or 0

    async def until_completed(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._until("completed")


@pytest.fixture(params=["sqlite", "postgresql"])
async def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/server.db"
    return await fresh_database(request.getfixturevalue("postgres_url"))


@pytest.mark.timeout(2 * PATIENCE + 60)
@pytest.mark.parametrize("action", ["redrive", "discard"])
async def test_each_run_is_acted_on_once_whatever_is_killed(
    amqp_url: str, store_url: str, tmp_path: Path, action: Action
) -> None:
    play = Play(amqp_url, store_url, tmp_path)
    await play.store.open()
    for server in play.servers:
        await server.start()
    try:
        async with play.app as app, app.worker():
            run_ids = await play.die()
            play.mended = True
            await play.job(action)
            counts = await play.kill_and_wait()
            assert +counts == Counter({"done": RUNS})
            if action == "redrive":
                await play.until_completed()
                # A worker's own at-least-once needs a fault of its own: here it has none.
                assert play.worked == Counter(run_ids)
            else:
                assert play.worked == Counter()
            assert await play.left() == 0
    finally:
        for server in play.servers:
            await server.kill()
        await play.store.close()
