"""Dead runs by what they have in common: their task, and the fingerprint of their error.

As history knows them: a run that failed and was neither redriven nor, by a server, discarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.store.schema import runs

BUCKETS: Final = 24
MAX_DEAD: Final = 50_000
"""How many of those that died last are looked at."""
MAX_GROUPS: Final = 200


@dataclass(slots=True, kw_only=True)
class Group:
    """Dead runs of one task and one kind of error."""

    task: str
    fingerprint: str | None
    count: int = 0
    first_ms: int = 0
    """When the first of them has died, and the last."""
    last_ms: int = 0
    again: int = 0
    """Those that had been redriven, and died again."""
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    """How many died in each part of the time that is looked at, all of the same length."""
    sample: str = ""
    """The id of one of them."""
    error_type: str | None = None
    """Of that one."""
    error_message: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of dead runs, the largest first."""

    groups: Sequence[Group]
    since_ms: int
    until_ms: int
    """The time that the buckets are parts of."""
    capped: bool
    """There are more dead runs: only the latest 50,000 are counted, and 200 groups shown."""


async def grouped(
    connection: AsyncConnection, *, now_ms: int, since_ms: int = 0, task: str | None = None
) -> Groups:
    """Return the dead runs that died since an instant, by groups.

    Cost: it reads an index only, of 50,000 runs at most, and a row for each group.
    """
    latest = select(*(runs.c[name] for name in _READ)).where(
        runs.c.status == "failed",
        runs.c.discarded_ms.is_(None),
        runs.c.ended_ms >= since_ms,
    )
    if task is not None:
        latest = latest.where(runs.c.task == task)
    dead = latest.order_by(runs.c.ended_ms.desc()).limit(MAX_DEAD + 1).subquery()
    first_ms, total = (
        await connection.execute(select(func.min(dead.c.ended_ms), func.count()))
    ).one()
    first_ms = now_ms if first_ms is None else int(first_ms)
    width = max(1, -(-(now_ms + 1 - first_ms) // BUCKETS))
    # A clock that is ahead of ours may have told a later instant.
    number = (dead.c.ended_ms - first_ms) // width
    last = case((number >= BUCKETS, BUCKETS - 1), else_=number).label("bucket")
    rows = await connection.execute(
        select(
            dead.c.task,
            dead.c.fingerprint,
            last,
            func.count(),
            func.min(dead.c.ended_ms),
            func.max(dead.c.ended_ms),
            func.sum(case((dead.c.redrives > 0, 1), else_=0)),
            func.max(dead.c.run_id),
        ).group_by(dead.c.task, dead.c.fingerprint, last)
    )
    found = _folded(rows)
    every = sorted(found.values(), key=lambda group: (-group.count, group.task, group.sample))
    shown = every[:MAX_GROUPS]
    await _explain(connection, shown)
    return Groups(shown, first_ms, now_ms, capped=total > MAX_DEAD or len(every) > MAX_GROUPS)


def _folded(rows: Any) -> Mapping[tuple[str, str | None], Group]:
    found: dict[tuple[str, str | None], Group] = {}
    for task, fingerprint, bucket, count, first_ms, last_ms, again, sample in rows:
        group = found.setdefault(
            (task, fingerprint), Group(task=task, fingerprint=fingerprint, first_ms=first_ms)
        )
        group.count += count
        group.first_ms = min(group.first_ms, first_ms)
        group.last_ms = max(group.last_ms, last_ms)
        group.again += int(again)
        group.buckets[int(bucket)] += count
        group.sample = max(group.sample, sample)
    return found


async def _explain(connection: AsyncConnection, groups: Sequence[Group]) -> None:
    """Have each group say what its sample says."""
    told = [runs.c[name] for name in ("run_id", "error_type", "error_message", "reason")]
    wanted = select(*told).where(runs.c.run_id.in_([group.sample for group in groups]))
    by_id = {row.run_id: row for row in await connection.execute(wanted)}
    for group in groups:
        row = by_id[group.sample]
        group.error_type, group.error_message = row.error_type, row.error_message
        group.reason = row.reason


_READ: Final = ("ended_ms", "task", "fingerprint", "redrives", "run_id")
