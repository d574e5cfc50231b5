"""Servers that decide on triggers and schedules, and die at every point."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from brokertask import App, PublishUnknown, Run, Schedule, Settings
from brokertask.clock import SystemClock
from brokertask.server import outbox as sending
from brokertask.server.store.schema import outbox, ticks
from brokertask.server.timetable import run_id_of
from brokertask.transport.memory import MemoryBroker
from brokertask.transport.socket import serve
from tests.crash.clerk import CLAIM_MS, READY, Clerk, Fuse
from tests.crash.stage import ROOT
from tests.flow.deciding import fresh_database, until

pytestmark = pytest.mark.anyio

SERVERS = 5
SCHEDULES = 10
SECONDS = 12.0
TOO_MANY_POINTS = 60


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/server.db"
    return await fresh_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    broker = MemoryBroker(SystemClock())
    yield broker
    broker.close()


def shop(timeout: float = 30.0) -> App:
    app = App("shop", settings=Settings(amqp_url="memory:", publish_timeout=timeout))

    @app.task
    async def charge(order: int) -> None: ...

    return app


def triggered(broker: MemoryBroker) -> Counter[str]:
    """Count the messages in the task's queue, by run."""
    return Counter(str(message.message_id) for message in broker.messages("bt.q.charge"))


async def trigger(app: App, key: str) -> Run[None]:
    """Trigger as a caller does who goes on until there is an answer."""
    while True:
        with suppress(PublishUnknown):
            return await app.tasks["charge"].trigger(7, idempotency_key=key)


async def answered(callers: Iterable[asyncio.Task[Run[None]]], url: str) -> None:
    """Return once they all have their answers, and nothing else is going to happen."""
    await asyncio.gather(*(asyncio.shield(caller) for caller in callers))
    await settled(url)


async def settled(url: str) -> None:
    """Return once the outbox is empty."""
    engine = create_async_engine(url)

    async def empty() -> bool:
        async with engine.connect() as connection:
            return (await connection.execute(select(outbox.c.id))).first() is None

    try:
        await until(empty)
    finally:
        await engine.dispose()


@pytest.mark.timeout(300)
async def test_wherever_a_server_dies_a_key_has_one_run(
    broker: MemoryBroker, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "CLAIM_MS", CLAIM_MS)
    doubled = point = 0
    for point in range(TOO_MANY_POINTS):
        app, fuse = shop(timeout=0.5), Fuse()
        with app.on(broker):
            async with Clerk(app, store, fuse=fuse):
                await app.tasks["charge"].trigger(0, idempotency_key=f"before-{point}")
                await settled(store)
                fuse.left = point
                callers = [asyncio.create_task(trigger(app, f"key-{point}")) for _ in range(3)]
                blown = asyncio.create_task(fuse.blown.wait())
                quiet = asyncio.create_task(answered(callers, store))
                await asyncio.wait((blown, quiet), return_when=asyncio.FIRST_COMPLETED)
                survived = not blown.done()
                quiet.cancel()
                await asyncio.wait((quiet,))
            async with Clerk(app, store):
                runs = await asyncio.gather(*callers)
                await settled(store)
            await app.client.close()
        counts = triggered(broker)
        (run_id,) = {run.run_id for run in runs}
        assert counts[run_id] in (1, 2)
        doubled += counts[run_id] - 1
        assert len(counts) == 2 * (point + 1)
        if survived:
            break
    print(f"points: {point}, runs with two messages: {doubled}")
    assert 8 <= point < TOO_MANY_POINTS - 1
    # A message is published twice where the crash comes between its confirm and the delete.
    assert doubled <= 6


@pytest.mark.timeout(300)
async def test_one_hundred_clients_and_three_servers_agree(
    broker: MemoryBroker, store: str
) -> None:
    app = shop()
    clients = [shop() for _ in range(5)]
    async with AsyncExitStack() as stack:
        for each in (app, *clients):
            stack.enter_context(each.on(broker))
            stack.push_async_callback(each.client.close)
        for _ in range(3):
            await stack.enter_async_context(Clerk(app, store))
        keys = [f"key-{number}" for number in range(10)]
        asked = [(client, key) for key in keys for client in clients for _ in range(20)]
        random.Random(1).shuffle(asked)
        runs = await asyncio.gather(*(trigger(client, key) for client, key in asked))
        await settled(store)
    told: dict[str, set[str]] = {key: set() for key in keys}
    for (_, key), run in zip(asked, runs, strict=True):
        told[key].add(run.run_id)
    assert all(len(run_ids) == 1 for run_ids in told.values())
    assert triggered(broker) == Counter({next(iter(run_ids)): 1 for run_ids in told.values()})


# --- schedules ------------------------------------------------------------------------------------


class Clerks:
    """Processes of servers, of which one after the other is killed."""

    def __init__(self, url: str, broker: str) -> None:
        self._command = (sys.executable, "-m", "tests.crash.clerk", url)
        self._environment = {**os.environ, "BROKERTASK_AMQP_URL": broker}
        self._processes: list[Process] = []
        self.killed = 0

    async def start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command, cwd=ROOT, env=self._environment, stdout=PIPE
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert (await process.stdout.readline()).decode().strip() == READY

    async def kill(self, place: int) -> None:
        process = self._processes.pop(place % len(self._processes))
        process.send_signal(signal.SIGKILL)
        await process.wait()
        self.killed += 1

    async def close(self) -> None:
        while self._processes:
            await self.kill(0)


@pytest.fixture
async def clerks(broker: MemoryBroker, store: str, tmp_path: Path) -> AsyncIterator[Clerks]:
    async with await serve(broker, tmp_path / "broker.sock"):
        clerks = Clerks(store, f"unix:{tmp_path}/broker.sock")
        yield clerks
        await clerks.close()


@pytest.mark.timeout(300)
async def test_five_servers_that_are_killed_run_each_tick_once(
    broker: MemoryBroker, store: str, clerks: Clerks
) -> None:
    app, dice = shop(), random.Random(4)
    names = [f"schedule-{number}" for number in range(SCHEDULES)]
    with app.on(broker):
        async with Clerk(app, store) as first:
            for name in names:
                every = Schedule(every=1, payload=7, catch_up="all", jitter=0.9)
                assert await first.schedules.put(name, "charge", every, sends_tick=False) == "done"
    await asyncio.gather(*(clerks.start() for _ in range(SERVERS)))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await asyncio.sleep(dice.uniform(0.1, 0.8))  # the pace of the kills
        await clerks.kill(dice.randrange(SERVERS))
        await clerks.start()
    with app.on(broker):
        async with Clerk(app, store) as last:
            for name in names:
                await last.schedules.pause(name)
            await settled(store)
    engine = create_async_engine(store)
    async with engine.connect() as connection:
        rows = (await connection.execute(select(ticks).order_by(ticks.c.tick_ms))).all()
    await engine.dispose()
    expected: Counter[str] = Counter()
    for name in names:
        mine = [row for row in rows if row.schedule == name]
        assert {row.outcome for row in mine} == {"triggered"}
        first_ms, last_ms = mine[0].tick_ms, mine[-1].tick_ms
        assert [row.tick_ms for row in mine] == list(range(first_ms, last_ms + 1, 1000))
        assert len(mine) >= SECONDS / 2
        expected.update(run_id_of(name, row.tick_ms) for row in mine)
    counts = triggered(broker)
    doubled = counts.total() - len(counts)
    print(f"ticks: {len(rows)}, killed: {clerks.killed}, published twice: {doubled}")
    assert set(counts) == set(expected)
    # Only what a server held between a confirm and the delete is published once more.
    assert doubled <= clerks.killed * SCHEDULES
