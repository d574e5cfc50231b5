"""Figures over many runs: how it is going now, and how tasks did of late.

All of it is read from indices, and of a bounded number of the latest runs: over a million runs a
figure costs what it costs over some ten thousand, and says how far back it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.events import ENDS
from brokertask.server.history import MAX_COUNTED
from brokertask.server.runs import QUEUED, STATUSES
from brokertask.server.store.schema import runs

MINUTE_MS: Final = 60_000
MINUTES: Final = 60
MAX_ENDS: Final = 20_000
"""How many of the latest ends are looked at."""
GOING: Final = tuple(status for status in STATUSES if status not in ENDS)


@dataclass(frozen=True, slots=True)
class Count:
    """How many."""

    count: int
    capped: bool
    """There are more: counting stops at 10,000."""


@dataclass(frozen=True, slots=True)
class Minute:
    """The runs that ended within one minute, by status."""

    at_ms: int
    by_status: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """How it is going."""

    by_status: Mapping[str, Count]
    """Of runs that have not ended, each status that a run may have."""
    dead: Count
    oldest_queued_ms: int | None
    """When the run was triggered that waits for a worker the longest."""
    minutes: Sequence[Minute]
    """The last hour, the first minute first; or as far back as `since_ms`."""
    since_ms: int
    """From when on the minutes are complete: later than an hour ago where very many runs ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a task did of late."""

    task: str
    ended: int
    by_status: Mapping[str, int]
    retried: int
    """Those that took more than one attempt."""
    p50_ms: int | None
    """From trigger to end, waits and delays included, of completed runs; null: there are none."""
    p95_ms: int | None
    since_ms: int
    """From when on its ends are counted: later than asked where there are very many."""


async def going(connection: AsyncConnection, *, now_ms: int) -> Going:
    """Return how it is going now."""
    by_status = {
        status: await _count(
            connection, select(runs.c.run_id).where(runs.c.status == status).limit(MAX_COUNTED + 1)
        )
        for status in GOING
    }
    dead = select(runs.c.run_id).where(runs.c.status == "failed", runs.c.discarded_ms.is_(None))
    oldest = select(func.min(runs.c.triggered_ms)).where(runs.c.status == QUEUED)
    first_ms = (now_ms // MINUTE_MS - MINUTES + 1) * MINUTE_MS
    since_ms = await _since(connection, None, first_ms)
    return Going(
        by_status=by_status,
        dead=await _count(connection, dead.limit(MAX_COUNTED + 1)),
        oldest_queued_ms=await connection.scalar(oldest),
        minutes=await _minutes(connection, since_ms, now_ms=now_ms),
        since_ms=since_ms,
    )


async def oldest(connection: AsyncConnection, tasks: Sequence[str]) -> Mapping[str, int]:
    """Return when the run was triggered that waits for a worker the longest, by task.

    Cost: a look into an index for each task.
    """
    found: dict[str, int] = {}
    for task in tasks:
        queued = select(runs.c.triggered_ms).where(runs.c.task == task, runs.c.status == QUEUED)
        first = await connection.scalar(queued.order_by(runs.c.triggered_ms).limit(1))
        if first is not None:
            found[task] = int(first)
    return found


async def done(
    connection: AsyncConnection, *, since_ms: int, task: str | None = None
) -> Sequence[Done]:
    """Return how tasks did since an instant, or one of them; those without an end are left out."""
    from_ms = await _since(connection, task, since_ms)
    recent = _recent(task, from_ms).subquery()
    counts = await connection.execute(
        select(
            recent.c.task,
            recent.c.status,
            func.count(),
            func.sum(case((recent.c.attempt > 1, 1), else_=0)),
        ).group_by(recent.c.task, recent.c.status)
    )
    found: dict[str, dict[str, int]] = {}
    retried: dict[str, int] = {}
    for name, status, count, again in counts:
        found.setdefault(name, {})[status] = count
        retried[name] = retried.get(name, 0) + int(again)
    half = await _times(connection, task, from_ms)
    return [
        Done(
            task=name,
            ended=sum(by_status.values()),
            by_status=by_status,
            retried=retried[name],
            p50_ms=half.get(name, (None, None))[0],
            p95_ms=half.get(name, (None, None))[1],
            since_ms=from_ms,
        )
        for name, by_status in sorted(found.items())
    ]


async def _count(connection: AsyncConnection, wanted: Select[Any]) -> Count:
    found = await connection.scalar(select(func.count()).select_from(wanted.subquery())) or 0
    return Count(min(found, MAX_COUNTED), capped=found > MAX_COUNTED)


def _recent(task: str | None, since_ms: int) -> Select[*tuple[Any, ...]]:
    recent = select(
        runs.c.task, runs.c.status, runs.c.attempt, runs.c.ended_ms, runs.c.triggered_ms
    ).where(runs.c.ended_ms >= since_ms)
    if task is not None:
        recent = recent.where(runs.c.task == task)
    # With a limit, a database reads the latest ends, and not each task's to have them grouped.
    return recent.order_by(runs.c.ended_ms.desc()).limit(MAX_ENDS)


async def _since(connection: AsyncConnection, task: str | None, since_ms: int) -> int:
    """Return the instant from which on no more than `MAX_ENDS` runs have ended."""
    latest = select(runs.c.ended_ms).where(runs.c.ended_ms >= since_ms)
    if task is not None:
        latest = latest.where(runs.c.task == task)
    last_ms = await connection.scalar(
        latest.order_by(runs.c.ended_ms.desc()).offset(MAX_ENDS).limit(1)
    )
    return since_ms if last_ms is None else int(last_ms) + 1


async def _minutes(connection: AsyncConnection, since_ms: int, *, now_ms: int) -> Sequence[Minute]:
    recent = _recent(None, since_ms).subquery()
    minute = (recent.c.ended_ms - recent.c.ended_ms % MINUTE_MS).label("minute")
    rows = await connection.execute(
        select(minute, recent.c.status, func.count()).group_by(minute, recent.c.status)
    )
    found: dict[int, dict[str, int]] = {}
    for at_ms, status, count in rows:
        found.setdefault(int(at_ms), {})[status] = count
    first = since_ms - since_ms % MINUTE_MS
    return [Minute(at_ms, found.get(at_ms, {})) for at_ms in range(first, now_ms + 1, MINUTE_MS)]


async def _times(
    connection: AsyncConnection, task: str | None, since_ms: int
) -> Mapping[str, tuple[int, int]]:
    """Return the middle and the 95th of a hundred durations by task, of completed runs."""
    recent = _recent(task, since_ms).subquery()
    took = (recent.c.ended_ms - recent.c.triggered_ms).label("took")
    every = select(
        recent.c.task,
        took,
        func.row_number().over(partition_by=recent.c.task, order_by=took).label("place"),
        func.count().over(partition_by=recent.c.task).label("total"),
    )
    ranked = every.where(recent.c.status == "completed").subquery()
    # The first of which at least so many in a hundred took no longer.
    middle = func.min(case((ranked.c.place * 2 >= ranked.c.total, ranked.c.took)))
    slow = func.min(case((ranked.c.place * 100 >= ranked.c.total * 95, ranked.c.took)))
    rows = await connection.execute(select(ranked.c.task, middle, slow).group_by(ranked.c.task))
    return {name: (max(0, int(half)), max(0, int(most))) for name, half, most in rows}
