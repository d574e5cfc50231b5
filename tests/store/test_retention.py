"""History is kept for so long, and so much of it, and no run that has not ended is forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import func, select

from brokertask.clock import SystemClock
from brokertask.envelope import Envelope
from brokertask.events import Event
from brokertask.server import details
from brokertask.server.outcomes import ending_of, record_endings
from brokertask.server.redactor import kept
from brokertask.server.retention import BATCH, Retention
from brokertask.server.runs import event_fact, record, trigger_fact
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import attempts, endings, log_lines, run_tags, runs, steps

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000
RUNS = 2 * BATCH + 10


async def fill(store: Database, now_ms: int) -> None:
    """Many runs of two hours ago, ten of ten minutes ago, and one that has never ended."""
    old = [f"old-{number}" for number in range(RUNS)]
    new = [f"new-{number}" for number in range(10)]
    asked = [
        Envelope(run_id=r, task="t", payload=b"\xc0", triggered_ms=1, tags=("a",))
        for r in [*old, *new, "on"]
    ]
    told = []
    for number, run_id in enumerate([*old, *new]):
        at_ms = now_ms - (2 * HOUR_MS if run_id.startswith("old") else HOUR_MS // 6) + number
        common: dict[str, Any] = {
            "run_id": run_id,
            "task": "t",
            "attempt": 1,
            "at_ms": at_ms,
            "worker": "w",
        }
        told.append(Event(event="completed", **common))
        told.append(Event(event="step", step="s", number=1, result=b"\xc0", **common))
        told.append(Event(event="log", lines=[[at_ms, "INFO", "hello"]], **common))
    async with store.begin() as connection:
        facts = [trigger_fact(one, kept(one), now_ms=1) for one in asked]
        ends = [event for event in told if event.event == "completed"]
        await record(connection, facts + [event_fact(event) for event in ends])
        await record_endings(connection, [ending_of(event) for event in ends])
        await details.record(connection, told)


async def rows(store: Database) -> Counter[str]:
    tables = (runs, attempts, run_tags, endings, steps, log_lines)
    async with store.read() as connection:
        counts = {
            table.name: await connection.scalar(select(func.count()).select_from(table))
            for table in tables
        }
    return Counter({name: count or 0 for name, count in counts.items()})


async def test_a_run_is_forgotten_with_all_that_is_known_of_it(store: Database) -> None:
    now_ms = SystemClock().now_ms()
    await fill(store, now_ms)
    keeping = [Retention(store, SystemClock(), keep_for=3_600, keep_runs=None) for _ in range(2)]
    assert sum(await asyncio.gather(*(one.prune() for one in keeping))) == RUNS
    left = await rows(store)
    assert left == {
        "runs": 11,
        "attempts": 10,
        "run_tags": 11,
        "endings": 10,
        "steps": 10,
        "log_lines": 10,
    }


async def test_of_too_many_runs_the_latest_to_end_are_kept(store: Database) -> None:
    await fill(store, SystemClock().now_ms())
    await Retention(store, SystemClock(), keep_for=86_400, keep_runs=15).prune()
    async with store.read() as connection:
        left = set((await connection.scalars(select(runs.c.run_id))).all())
    latest = {f"old-{RUNS - 1 - number}" for number in range(5)}
    assert left == {"on", *latest, *(f"new-{number}" for number in range(10))}
