"""Figures, groups of dead runs and trees, on both databases, held to plain words in Python."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import update

from brokertask.events import FAILED, RETRYING, Event
from brokertask.outcome import AttemptError
from brokertask.server import dead, figures, related
from brokertask.server.history import RunFilter, listed
from brokertask.server.runs import Fact, event_fact, record
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import runs

pytestmark = pytest.mark.anyio
NOW_MS = 1_800_000_000_000
MINUTE_MS = 60_000


def ended(
    number: int, *, ago_ms: int, message: str | None = None, task: str = "charge", **more: Any
) -> list[Fact]:
    """What is known of a run that took 10 ms for each of its number."""
    at_ms = NOW_MS - ago_ms
    event = Event(
        event="completed" if message is None else FAILED,
        run_id=f"run-{number:03}",
        task=task,
        attempt=1 + number % 2,
        at_ms=at_ms,
        worker="w",
        error=None if message is None else AttemptError(1, "TimeoutError", message, at_ms, ""),
        **more,
    )
    fact = event_fact(event)
    begun = Event(
        event="started",
        run_id=event.run_id,
        task=task,
        attempt=1,
        at_ms=at_ms - 10 * number,
        worker="w",
    )
    return [event_fact(begun), fact]


async def write(store: Database, facts: list[Fact]) -> None:
    async with store.begin() as connection:
        await record(connection, facts)


async def test_dead_runs_are_grouped_by_task_and_kind_of_error(store: Database) -> None:
    facts = [
        *ended(1, ago_ms=240_000, message="no answer to order 17"),
        *ended(2, ago_ms=120_000, message="no answer to order 4711"),
        *ended(3, ago_ms=0, message="no answer to order 8", redrives=1),
        *ended(4, ago_ms=60_000, message="refused"),
        *ended(5, ago_ms=60_000, message="no answer to order 9", task="refund"),
        *ended(6, ago_ms=60_000),
    ]
    await write(store, facts)
    async with store.read() as connection:
        found = await dead.grouped(connection, now_ms=NOW_MS)
        one = await dead.grouped(connection, now_ms=NOW_MS, task="refund", since_ms=NOW_MS - 60_000)
    largest = found.groups[0]
    assert (largest.task, largest.count, largest.again) == ("charge", 3, 1)
    assert (largest.first_ms, largest.last_ms) == (NOW_MS - 240_000, NOW_MS)
    assert (largest.error_type, largest.sample) == ("TimeoutError", "run-003")
    assert [largest.buckets[0], largest.buckets[11], largest.buckets[23]] == [1, 1, 1]
    assert [group.count for group in found.groups] == [3, 1, 1]
    assert not found.capped
    assert [group.task for group in one.groups] == ["refund"]
    async with store.read() as connection:
        alike = await listed(connection, RunFilter(fingerprint=largest.fingerprint, task="charge"))
    assert {row["run_id"] for row in alike} == {"run-001", "run-002", "run-003"}


async def test_what_is_at_work_again_or_discarded_is_not_dead(store: Database) -> None:
    await write(store, [*ended(1, ago_ms=5, message="no"), *ended(2, ago_ms=4, message="no")])
    again = Event(
        event=RETRYING, run_id="run-001", task="charge", attempt=1, at_ms=NOW_MS, worker="w"
    )
    gone = update(runs).where(runs.c.run_id == "run-002").values(discarded_ms=NOW_MS)
    async with store.begin() as connection:
        await connection.execute(gone)
    async with store.begin() as connection:
        await record(connection, [event_fact(_redriven(again))])
        assert not (await dead.grouped(connection, now_ms=NOW_MS)).groups
        assert (await figures.going(connection, now_ms=NOW_MS)).dead.count == 0
        kept = await listed(connection, RunFilter(statuses=("failed",), discarded=False))
        discarded = await listed(connection, RunFilter(discarded=True))
    assert kept == []
    assert [row["run_id"] for row in discarded] == ["run-002"]


def _redriven(event: Event) -> Event:
    return Event(**{**{name: getattr(event, name) for name in event.__slots__}, "redrives": 1})


async def test_tasks_are_told_by_how_they_ended_and_how_long_it_took(store: Database) -> None:
    facts = [fact for number in range(1, 101) for fact in ended(number, ago_ms=number)]
    facts += [fact for n in (101, 103) for fact in ended(n, ago_ms=1, message="no")]
    facts += ended(104, ago_ms=10_000_000, task="old")
    await write(store, facts)
    async with store.read() as connection:
        (charge,) = await figures.done(connection, since_ms=NOW_MS - 1_000)
        (old,) = await figures.done(connection, since_ms=0, task="old")
    assert charge.by_status == {"completed": 100, "failed": 2}
    assert (charge.ended, charge.retried) == (102, 52)
    assert (charge.p50_ms, charge.p95_ms) == (500, 950)
    assert (old.ended, old.p50_ms, old.p95_ms) == (1, 1040, 1040)


async def test_figures_reach_back_only_as_far_as_is_cheap(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MAX_ENDS", 10)
    await write(store, [fact for number in range(30) for fact in ended(number, ago_ms=number)])
    async with store.read() as connection:
        (charge,) = await figures.done(connection, since_ms=0)
        going = await figures.going(connection, now_ms=NOW_MS)
    assert (charge.ended, charge.since_ms) == (10, NOW_MS - 9)
    assert going.since_ms == NOW_MS - 9
    assert sum(sum(minute.by_status.values()) for minute in going.minutes) == 10


async def test_the_overview_has_each_minute_and_the_oldest_that_waits(store: Database) -> None:
    facts = [fact for number in range(6) for fact in ended(number, ago_ms=number * MINUTE_MS)]
    queued = [
        Fact(
            run_id=f"queued-{number}",
            task="charge",
            place=0,
            at_ms=NOW_MS - number,
            latest={"status": "queued", "redrives": 0, "attempt": 0},
        )
        for number in range(3)
    ]
    await write(store, [*facts, *queued])
    async with store.read() as connection:
        going = await figures.going(connection, now_ms=NOW_MS)
    assert going.by_status["queued"].count == 3
    assert going.oldest_queued_ms == NOW_MS - 2
    assert len(going.minutes) == figures.MINUTES
    told = Counter({one.at_ms: sum(one.by_status.values()) for one in going.minutes})
    assert +told == Counter({NOW_MS // MINUTE_MS * MINUTE_MS - n * MINUTE_MS: 1 for n in range(6)})


async def test_a_tree_has_all_below_the_one_at_the_top(store: Database) -> None:
    def below(run_id: str, parent: str | None, root: str | None, at_ms: int) -> Fact:
        asked = {"triggered_ms": at_ms, "tags": "", "parent": parent, "root": root}
        return Fact(
            run_id=run_id,
            task="t",
            place=0,
            at_ms=at_ms,
            latest={"status": "queued", "redrives": 0, "attempt": 0},
            asked=asked,
        )

    await write(
        store,
        [
            below("top", None, None, 1),
            below("child", "top", "top", 2),
            below("grandchild", "child", "top", 3),
            below("other", None, None, 4),
        ],
    )
    async with store.read() as connection:
        for run_id in ("top", "child", "grandchild"):
            found = await related.tree_of(connection, run_id)
            assert found is not None
            assert [row["run_id"] for row in found.rows] == ["top", "child", "grandchild"]
        alone = await related.tree_of(connection, "other")
        assert alone is not None
        assert [row["run_id"] for row in alone.rows] == ["other"]
        assert await related.tree_of(connection, "none") is None
