"""The rows of schedules: which ticks are due, and what becomes of each, once and for all.

Whoever decides on a schedule holds its row locked, writes each tick under its primary key, and
adds its run to the outbox in the same transaction. So a server that dies leaves all of it or
nothing, and any other goes on; no tick has two runs, as the id of a run follows from its tick.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, takewhile
from typing import Any, Final

from sqlalchemy import Row, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Envelope
from brokertask.schedule import Schedule
from brokertask.server.store.schema import endings, schedules, ticks
from brokertask.server.store.upsert import put_new
from brokertask.ticks import offset_ms
from brokertask.values import MSGPACK, decode, pack

GRACE_MS: Final = 60_000
"""A tick that is decided within this time is not late: a server has to be able to restart."""
TURN: Final = 200
"""Ticks of one schedule that are decided in one transaction."""
TURNED_BACK_MS: Final = 600_000
"""Two servers' clocks may differ by this much; more, and a clock has been turned back."""
HELD_MS: Final = 7 * 86_400_000
"""A run whose end nobody heard of holds up its schedule no longer than this."""
KEPT_MS: Final = 30 * 86_400_000
"""How long what became of ticks is kept."""
TRIGGERED: Final = "triggered"
OVERLAPPED: Final = "overlapped"
MISSED: Final = "missed"
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "brokertask:schedule")


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule as it is stored.

    Attributes:
        sends_tick: Its runs get a `Tick` for payload.
        payload: Otherwise this one, in msgpack.
    """

    name: str
    task: str
    schedule: Schedule
    payload: bytes
    sends_tick: bool

    @staticmethod
    def read(row: Row[Any]) -> Plan:
        """Return the plan in a row.

        Raises:
            InvalidOption: This server does not understand it.
        """
        spec = spec_of(row)
        schedule = Schedule.read(spec)
        return Plan(row.name, row.task, schedule, row.payload, bool(spec.get("sends_tick")))

    def columns(self) -> Mapping[str, Any]:
        """Return what of its row does not change with time."""
        spec = {**self.schedule.plain(), "sends_tick": self.sends_tick}
        return {"task": self.task, "spec": pack(spec), "payload": self.payload}

    @property
    def offset_ms(self) -> int:
        """How long after each tick it is due."""
        return offset_ms(self.name, self.schedule.jitter_ms)

    def next_ms(self, after_ms: int) -> int:
        """Return its first tick later than an instant."""
        return next(self.schedule.ticks.after(after_ms))

    def due(self, tick_ms: int) -> Mapping[str, int]:
        """Return the columns that say what its next tick is."""
        return {"tick_ms": tick_ms, "due_ms": tick_ms + self.offset_ms}

    def run(self, run_id: str, tick_ms: int, previous_ms: int | None, now_ms: int) -> Envelope:
        """Return the trigger of a tick."""
        payload = self.payload
        if self.sends_tick:
            at, before = _datetime(tick_ms), previous_ms and _datetime(previous_ms)
            payload = pack({"schedule": self.name, "at": at, "previous": before})
        return Envelope(
            run_id=run_id,
            task=self.task,
            payload=payload,
            triggered_ms=now_ms,
            sent_ms=now_ms,
            tags=(f"schedule:{self.name}",),
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """What is to be done about the ticks of a schedule at one moment."""

    run: list[int]
    missed: tuple[int, int] | None
    """The first and the last of those that are too late to run."""
    next_ms: int
    """The first tick of later."""


def turn(plan: Plan, tick_ms: int, now_ms: int) -> Turn:
    """Decide on the ticks from `tick_ms`, the first undecided one, until now. Pure."""
    schedule, every = plan.schedule, plan.schedule.ticks
    until = now_ms - plan.offset_ms
    if tick_ms > until:
        return Turn([], None, tick_ms)
    window = GRACE_MS
    if schedule.catch_up == "all":
        window = max(GRACE_MS, schedule.catch_up_window_ms)
    begin = max(tick_ms, until - window)
    fresh = takewhile(lambda tick: tick <= until, every.after(begin - 1))
    run = list(islice(fresh, TURN))
    last = every.latest(begin - 1, not_before_ms=tick_ms) if tick_ms < begin else None
    if last is not None and schedule.catch_up == "last" and not run:
        run = [last]
        last = every.latest(last - 1, not_before_ms=tick_ms) if tick_ms < last else None
    # Of more than a turn's, the rest is for the next one.
    decided = run[-1] if len(run) == TURN else until
    return Turn(run, None if last is None else (tick_ms, last), plan.next_ms(decided))


def run_id_of(schedule: str, tick_ms: int) -> str:
    """Return the id of the run of a tick: whoever triggers it, and however often."""
    return str(uuid.uuid5(_NAMESPACE, f"{schedule}\0{tick_ms}"))


async def due(connection: AsyncConnection, now_ms: int, *, limit: int = 50) -> list[Row[Any]]:
    """Return schedules to decide on, locked; those that another server is at are left to it."""
    # A clock that was ahead has put ticks off until then: they are looked at anew.
    turned_back = schedules.c.checked_ms > now_ms + TURNED_BACK_MS
    wanted = or_(schedules.c.due_ms <= now_ms, turned_back)
    rows = select(schedules).where(schedules.c.paused.is_(False), wanted)
    rows = rows.order_by(schedules.c.due_ms).limit(limit).with_for_update(skip_locked=True)
    return list((await connection.execute(rows)).all())


async def decide(
    connection: AsyncConnection, plan: Plan, row: Row[Any], *, now_ms: int
) -> list[Envelope]:
    """Write what becomes of the due ticks of a locked schedule; return the runs to publish."""
    tick_ms = row.tick_ms
    if row.checked_ms > now_ms + TURNED_BACK_MS:
        tick_ms = await _turn_back(connection, plan, now_ms)
    now = turn(plan, tick_ms, now_ms)
    runs: list[Envelope] = []
    last = {"run_id": row.run_id, "run_ms": row.run_ms}
    if now.missed is not None:
        first, end = now.missed
        await _write(connection, plan, first, MISSED, now_ms=now_ms, until_ms=end)
    for tick in now.run:
        if plan.schedule.overlap == "skip" and await _unfinished(connection, last, now_ms):
            await _write(connection, plan, tick, OVERLAPPED, now_ms=now_ms)
            continue
        run_id = run_id_of(plan.name, tick)
        if await _write(connection, plan, tick, TRIGGERED, now_ms=now_ms, run_id=run_id):
            runs.append(plan.run(run_id, tick, last["run_ms"], now_ms))
            last = {"run_id": run_id, "run_ms": tick}
    values = {**plan.due(now.next_ms), **last, "checked_ms": now_ms}
    await connection.execute(update(schedules).where(schedules.c.name == plan.name).values(values))
    return runs


async def put_off(connection: AsyncConnection, name: str, *, until_ms: int) -> None:
    """Look at a schedule again later, without deciding on anything."""
    later = update(schedules).where(schedules.c.name == name).values(due_ms=until_ms)
    await connection.execute(later)


async def next_due(connection: AsyncConnection) -> int | None:
    """Return when the next schedule is due, in ms since the epoch."""
    found: int | None = await connection.scalar(
        select(func.min(schedules.c.due_ms)).where(schedules.c.paused.is_(False))
    )
    return found


async def forget_ticks(connection: AsyncConnection, *, now_ms: int) -> None:
    """Delete what became of ticks long ago."""
    await connection.execute(delete(ticks).where(ticks.c.tick_ms < now_ms - KEPT_MS))


async def _turn_back(connection: AsyncConnection, plan: Plan, now_ms: int) -> int:
    """Return the first tick after the present, which was decided on in a future that is none.

    What was triggered then stays so; what was too late then is not.
    """
    undone = (
        ticks.c.schedule == plan.name,
        ticks.c.outcome == MISSED,
        ticks.c.tick_ms > now_ms,
    )
    await connection.execute(delete(ticks).where(*undone))
    return plan.next_ms(now_ms - plan.offset_ms)


async def _write(
    connection: AsyncConnection,
    plan: Plan,
    tick_ms: int,
    outcome: str,
    *,
    now_ms: int,
    run_id: str | None = None,
    until_ms: int | None = None,
) -> bool:
    row = {
        "schedule": plan.name,
        "tick_ms": tick_ms,
        "outcome": outcome,
        "run_id": run_id,
        "until_ms": until_ms,
        "decided_ms": now_ms,
    }
    return await put_new(connection, ticks, row)


async def _unfinished(connection: AsyncConnection, last: Mapping[str, Any], now_ms: int) -> bool:
    """Return whether the run of an earlier tick goes on, as far as is known."""
    if last["run_id"] is None or now_ms - (last["run_ms"] or 0) > HELD_MS:
        return False
    ended = select(endings.c.run_id).where(endings.c.run_id == last["run_id"])
    return await connection.scalar(ended) is None


def spec_of(row: Row[Any]) -> dict[str, Any]:
    """Return a schedule as it is stored, but for its payload."""
    spec: dict[str, Any] = decode(row.spec, MSGPACK)
    return spec


def _datetime(instant_ms: int) -> datetime:
    return datetime.fromtimestamp(instant_ms / 1000, UTC)
