"""Jobs over many runs, as rows: a selection that is frozen, and what became of each run of it.

    create ──► items `waiting` ──► `done`, `skipped` or `failed`
                  └──► `sent`: begun with; whoever goes on finds out how far it came

An item leaves a state only if it is in it, within the transaction that does what is done to it. So
of two servers that work on one job, each after its own crash, one does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import (
    Subquery,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.events import ENDS
from brokertask.server.history import RunFilter
from brokertask.server.runs import STATUSES
from brokertask.server.store.schema import bulk_items, bulk_jobs, runs
from brokertask.values import MSGPACK, decode, pack

Action: TypeAlias = Literal["redrive", "discard", "cancel", "replay"]
State: TypeAlias = Literal["waiting", "sent", "done", "skipped", "failed"]
STATES: Final[tuple[State, ...]] = get_args(State)
OPEN: Final[tuple[State, ...]] = ("waiting", "sent")
MAX_SELECTED: Final = 50_000
CLAIM_MS: Final = 15_000
"""A server that has said nothing for so long works on a job no longer."""
_FAILED: Final = ("failed",)
_TAKEN: Final[Mapping[Action, tuple[str, ...]]] = {
    "redrive": _FAILED,
    "discard": _FAILED,
    "cancel": tuple(status for status in STATUSES if status not in ENDS),
    "replay": STATUSES,
}
"""The statuses of runs to which an action can be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it was asked for."""

    id: str
    action: Action
    reason: str
    rate: float | None
    """Runs a second at most."""
    options: Mapping[str, Any]
    """By action: `children` of a cancel, `forget` of a redrive, `payload` of a replay."""
    aborting: bool = False

    @property
    def of_letters(self) -> bool:
        """Whether it acts on dead letters, queue by queue."""
        return self.action in ("redrive", "discard")


@dataclass(frozen=True, slots=True)
class Item:
    """One run of a job."""

    job: str
    number: int
    run_id: str
    task: str
    state: State


@dataclass(frozen=True, slots=True)
class Preview:
    """What a job would act on."""

    by_task: Mapping[str, int]
    first: Sequence[str]
    """The ids of those that would be first."""

    @property
    def count(self) -> int:
        """How many runs in all."""
        return sum(self.by_task.values())

    @property
    def capped(self) -> bool:
        """Whether there may be more: the newest 50,000 are taken."""
        return self.count == MAX_SELECTED


async def previewed(
    connection: AsyncConnection, action: Action, wanted: RunFilter, *, limit: int = 10
) -> Preview:
    """Return which runs an action would be done to now."""
    newest = _selected(action, wanted, MAX_SELECTED)
    counted = select(runs.c.task, func.count()).join(newest, newest.c.run_id == runs.c.run_id)
    rows = await connection.execute(counted.group_by(runs.c.task).order_by(runs.c.task))
    by_task = {row[0]: int(row[1]) for row in rows}
    order = select(newest.c.run_id).order_by(newest.c.triggered_ms, newest.c.run_id)
    return Preview(by_task, (await connection.scalars(order.limit(limit))).all())


async def create(
    connection: AsyncConnection, job: Job, wanted: RunFilter, *, now_ms: int, by: str
) -> int:
    """Freeze a selection into a new job; return how many runs it has, the newest 50,000 at most.

    They are worked off in the order in which they were triggered.
    """
    newest = _selected(job.action, wanted, MAX_SELECTED)
    number = func.row_number().over(order_by=(newest.c.triggered_ms, newest.c.run_id))
    chosen = select(literal(job.id), number, newest.c.run_id, runs.c.task, literal("waiting")).join(
        runs, runs.c.run_id == newest.c.run_id
    )
    names = ["job", "number", "run_id", "task", "state"]
    await connection.execute(insert(bulk_items).from_select(names, chosen))
    mine = select(func.count()).select_from(bulk_items).where(bulk_items.c.job == job.id)
    total = await connection.scalar(mine) or 0
    values = {
        "id": job.id,
        "action": job.action,
        "options": pack(dict(job.options)),
        "state": "running",
        "total": total,
        "rate": job.rate,
        "reason": job.reason,
        "created_ms": now_ms,
        "created_by": by,
    }
    await connection.execute(insert(bulk_jobs).values(values))
    return total


async def abort(connection: AsyncConnection, job: str) -> bool:
    """Have a job end with what has begun; False if it has ended, or there is none."""
    going = update(bulk_jobs).where(bulk_jobs.c.id == job, bulk_jobs.c.ended_ms.is_(None))
    return (await connection.execute(going.values(state="aborting"))).rowcount == 1


async def take(connection: AsyncConnection, *, server: str, now_ms: int) -> Job | None:
    """Return a job that nobody works on, which is this server's from now on; or None."""
    free = or_(bulk_jobs.c.claimed_ms.is_(None), bulk_jobs.c.claimed_ms <= now_ms - CLAIM_MS)
    wanted = select(bulk_jobs).where(bulk_jobs.c.ended_ms.is_(None), free)
    oldest = wanted.order_by(bulk_jobs.c.created_ms).limit(1).with_for_update(skip_locked=True)
    row = (await connection.execute(oldest)).one_or_none()
    if row is None:
        return None
    mine = update(bulk_jobs).where(bulk_jobs.c.id == row.id)
    await connection.execute(mine.values(server=server, claimed_ms=now_ms))
    return Job(
        id=row.id,
        action=row.action,
        reason=row.reason,
        rate=row.rate,
        options=decode(row.options, MSGPACK),
        aborting=row.state == "aborting",
    )


async def keep(connection: AsyncConnection, job: str, *, server: str, now_ms: int) -> str | None:
    """Go on with a job; return its state, or None if it is another server's, or at its end."""
    mine = and_(bulk_jobs.c.id == job, bulk_jobs.c.server == server, bulk_jobs.c.ended_ms.is_(None))
    kept = update(bulk_jobs).where(mine).values(claimed_ms=now_ms)
    state = await connection.scalar(kept.returning(bulk_jobs.c.state))
    return None if state is None else str(state)


async def leave(connection: AsyncConnection, job: str, *, server: str) -> None:
    """Let another server go on with a job at once."""
    mine = update(bulk_jobs).where(bulk_jobs.c.id == job, bulk_jobs.c.server == server)
    await connection.execute(mine.values(claimed_ms=None))


async def finish(connection: AsyncConnection, job: str, *, now_ms: int) -> None:
    """End a job that nothing is left to do of."""
    state = case((bulk_jobs.c.state == "aborting", "aborted"), else_="done")
    going = update(bulk_jobs).where(bulk_jobs.c.id == job, bulk_jobs.c.ended_ms.is_(None))
    await connection.execute(going.values(state=state, ended_ms=now_ms))


async def next_items(
    connection: AsyncConnection, job: Job, *, states: Sequence[State], limit: int
) -> list[Item]:
    """Return the next items in one of these states; of dead letters, those of one task."""
    mine = select(bulk_items).where(bulk_items.c.job == job.id, bulk_items.c.state.in_(states))
    mine = mine.order_by(bulk_items.c.number)
    if job.of_letters:
        first = (await connection.execute(mine.limit(1))).one_or_none()
        mine = mine.where(bulk_items.c.task == (None if first is None else first.task))
    return [
        Item(row.job, row.number, row.run_id, row.task, row.state)
        for row in await connection.execute(mine.limit(limit))
    ]


async def move(
    connection: AsyncConnection,
    item: Item,
    state: State,
    *,
    now_ms: int,
    before: Sequence[State] = OPEN,
    detail: str | None = None,
    redrives: int | None = None,
) -> bool:
    """Bring an item from one of some states to another one; False if it is in none of these."""
    values: dict[str, Any] = {"state": state, "at_ms": now_ms, "detail": detail}
    if redrives is not None:
        values["redrives"] = redrives
    moved = update(bulk_items).where(*_is(item), bulk_items.c.state.in_(before))
    return (await connection.execute(moved.values(values))).rowcount == 1


async def sent(connection: AsyncConnection, item: Item) -> int | None:
    """Return how often the run of an item had been redriven when that was done to it; or None."""
    found = await connection.scalar(select(bulk_items.c.redrives).where(*_is(item)))
    return None if found is None else int(found)


async def discarded(connection: AsyncConnection, run_id: str, *, now_ms: int) -> None:
    """Write into history that a dead run is in the dead letters no longer."""
    dead = update(runs).where(runs.c.run_id == run_id, runs.c.status == "failed")
    await connection.execute(dead.values(discarded_ms=now_ms))


async def forget(connection: AsyncConnection, *, before_ms: int) -> None:
    """Delete one job that ended before, with what became of its runs; the others come next."""
    ended = select(bulk_jobs.c.id).where(bulk_jobs.c.ended_ms < before_ms)
    job = await connection.scalar(ended.order_by(bulk_jobs.c.created_ms).limit(1))
    if job is not None:
        await connection.execute(delete(bulk_items).where(bulk_items.c.job == job))
        await connection.execute(delete(bulk_jobs).where(bulk_jobs.c.id == job))


async def listed(
    connection: AsyncConnection, *, before: tuple[int, str] | None = None, limit: int = 50
) -> list[Mapping[str, Any]]:
    """Return jobs, the latest first, from behind the one with these keys."""
    wanted = select(bulk_jobs).order_by(bulk_jobs.c.created_ms.desc(), bulk_jobs.c.id.desc())
    if before is not None:
        wanted = wanted.where(tuple_(bulk_jobs.c.created_ms, bulk_jobs.c.id) < before)
    return [await _shown(connection, row) for row in await connection.execute(wanted.limit(limit))]


async def shown(connection: AsyncConnection, job: str) -> Mapping[str, Any] | None:
    """Return a job with `counts` of its items by state, or None."""
    found = await connection.execute(select(bulk_jobs).where(bulk_jobs.c.id == job))
    row = found.one_or_none()
    return None if row is None else await _shown(connection, row)


async def items_of(
    connection: AsyncConnection,
    job: str,
    *,
    state: State | None = None,
    after: int = 0,
    limit: int = 50,
) -> list[Mapping[str, Any]]:
    """Return items of a job in the order of their numbers, behind the one with this number."""
    wanted = select(bulk_items).where(bulk_items.c.job == job, bulk_items.c.number > after)
    if state is not None:
        wanted = wanted.where(bulk_items.c.state == state)
    rows = await connection.execute(wanted.order_by(bulk_items.c.number).limit(limit))
    return [dict(row._mapping) for row in rows]


async def _shown(connection: AsyncConnection, row: Any) -> Mapping[str, Any]:
    counted = select(bulk_items.c.state, func.count()).where(bulk_items.c.job == row.id)
    found = {each[0]: each[1] for each in await connection.execute(counted.group_by("state"))}
    return {**row._mapping, "counts": {state: found.get(state, 0) for state in STATES}}


def _selected(action: Action, wanted: RunFilter, limit: int) -> Subquery:
    taken = _TAKEN[action]
    statuses = tuple(status for status in wanted.statuses or taken if status in taken)
    # Nothing of what was asked for can be done: a filter without a status takes every one.
    wanted = replace(wanted, statuses=statuses or ("none",))
    if taken is _FAILED:
        wanted = replace(wanted, discarded=False)
    return wanted.newest(before=None, limit=limit)


def _is(item: Item) -> tuple[Any, Any]:
    return bulk_items.c.job == item.job, bulk_items.c.number == item.number
