"""Runs that wait: their messages are kept here, and sent on when something came of their waits.

    worker ──► bt.server.waits ──► park: message, waits, conditions          transaction 1
                                     └─► look: what is known of them?        transaction 2
    an end, a decision, an event: written ──► look, for the runs it is for   transactions 1, 2
    look: a wait is over ──► the message, with what came of it, to the outbox; state `resumed`

Each side writes before it looks, so whoever looks last sees both. Of several that see it, one
changes the state from `parked` to `resumed`, in the transaction that writes to the outbox.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from sqlalchemy import ColumnElement, Row, and_, delete, exists, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Envelope
from brokertask.memory import Memory
from brokertask.server import cancels
from brokertask.server.outcomes import Outcomes, parts
from brokertask.server.store.schema import (
    conditions,
    endings,
    parked,
    signals,
    tokens,
    waits,
)
from brokertask.server.store.upsert import put
from brokertask.wait import WAIT, Condition, Got, Target, Wait

log = logging.getLogger("brokertask.server")

Ident: TypeAlias = tuple[str, int]
"""Run id and redrives: what a run waits for after a redrive, it waits for anew."""
PARKED: Final = "parked"
RESUMED: Final = "resumed"
WAITING: Final = "waiting"
OVER: Final = "over"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message of a run that waits, as it came, and understood."""

    envelope: Envelope
    blob: bytes

    @property
    def ident(self) -> Ident:
        """What the run is known by."""
        return self.envelope.run_id, self.envelope.redrives


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that goes on: its message, and what came of its waits by their keys."""

    ident: Ident
    seq: int
    blob: bytes
    over: Mapping[str, Wait]
    late: frozenset[str]
    """Tokens whose time has run out."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at parked runs came to."""

    ready: list[Ready]
    next_ms: dict[tuple[str, int, str], int | None]
    """When a wait that goes on is looked at again, where that has changed."""


def pending(memory: Memory) -> dict[str, Wait]:
    """Return the waits of a run that nothing has come of, by their keys."""
    found = {}
    for step in memory.steps:
        if step.function == WAIT and isinstance(step.result, bytes):
            wait = Wait.unpack(step.result)
            if wait.got is None:
                found[step.key] = wait
    return found


async def park(
    connection: AsyncConnection, arrivals: Sequence[Arrival], *, now_ms: int
) -> list[str]:
    """Write messages of runs that wait, and return the ids of those runs.

    Of two messages of one run the later one is kept. One that waits for what has come already is
    the double of a message that went on, and is dropped.
    """
    run_ids = sorted({arrival.envelope.run_id for arrival in arrivals})
    seqs: dict[Ident, int] = {}
    states: dict[tuple[str, int, str], str] = {}
    for part in parts(run_ids):
        # Locked: what is taken out while we look would leave us with what it waited for before.
        rows = select(parked.c.run_id, parked.c.redrives, parked.c.seq).order_by(parked.c.run_id)
        rows = rows.where(parked.c.run_id.in_(part)).with_for_update()
        for row in await connection.execute(rows):
            seqs[row.run_id, row.redrives] = row.seq
        told = select(waits.c.run_id, waits.c.redrives, waits.c.key, waits.c.state)
        for wait in await connection.execute(told.where(waits.c.run_id.in_(part))):
            states[wait.run_id, wait.redrives, wait.key] = wait.state
    kept: dict[Ident, tuple[Arrival, dict[str, Wait]]] = {}
    for arrival in sorted(arrivals, key=lambda one: one.envelope.seq):
        wanted = pending(arrival.envelope.memory)
        if arrival.envelope.seq <= seqs.get(arrival.ident, -1):
            continue
        if any(states.get((*arrival.ident, key)) == OVER for key in wanted):
            log.warning("run %s went on elsewhere; a double ends here", arrival.ident[0])
            continue
        kept[arrival.ident] = arrival, wanted
    await _write(connection, kept, seqs, states, now_ms)
    return run_ids


def _message(arrival: Arrival, now_ms: int) -> dict[str, Any]:
    envelope = arrival.envelope
    return {
        "seq": envelope.seq,
        "task": envelope.task,
        "message": arrival.blob,
        "state": PARKED,
        "triggered_ms": envelope.triggered_ms or now_ms,
        "since_ms": now_ms,
        "wake_ms": envelope.due_ms,
    }


def _token(target: Target, run_id: str, now_ms: int) -> dict[str, Any]:
    return {
        "id": target.subject,
        "run_id": run_id,
        "name": target.name,
        "state": WAITING,
        "due_ms": target.due_ms,
        "created_ms": now_ms,
    }


async def _write(
    connection: AsyncConnection,
    kept: Mapping[Ident, tuple[Arrival, dict[str, Wait]]],
    seqs: Mapping[Ident, int],
    states: Mapping[tuple[str, int, str], str],
    now_ms: int,
) -> None:
    arrived, wanted, facts, named = [], [], [], []
    for ident, (arrival, pending_waits) in kept.items():
        run = {"run_id": ident[0], "redrives": ident[1]}
        message = _message(arrival, now_ms)
        if ident in seqs:
            mine = (parked.c.run_id == ident[0], parked.c.redrives == ident[1])
            await connection.execute(update(parked).where(*mine).values(message))
        else:
            arrived.append({**run, **message})
        for key, wait in pending_waits.items():
            if (*ident, key) in states:
                continue
            due_ms = wait.decide([None] * sum(one.count for one in wait.targets), 0)[1]
            row = {"key": key, "spec": wait.pack(), "state": WAITING, "due_ms": due_ms}
            wanted.append({**run, **row, "since_ms": now_ms, "over_ms": None})
            for number, condition in enumerate(wait.conditions(ident[0], key)):
                where = {"kind": condition.kind, "subject": condition.subject}
                facts.append({**run, "key": key, "number": number, **where})
            named += [
                _token(target, ident[0], now_ms)
                for target in wait.targets
                if target.kind == "token"
            ]
    # If another server has one of them since, that is its double, and as good.
    await put(connection, parked, arrived)
    await put(connection, waits, wanted)
    await put(connection, conditions, facts)
    await put(connection, tokens, named)
    # One that was completed before anybody waited for it learns here whose it is.
    for token in named:
        whose = {name: token[name] for name in ("run_id", "name", "created_ms", "due_ms")}
        unknown = and_(tokens.c.id == token["id"], tokens.c.run_id.is_(None))
        await connection.execute(update(tokens).where(unknown).values(whose))


async def look(connection: AsyncConnection, run_ids: Iterable[str], *, now_ms: int) -> Look:
    """Return which of these runs go on, with what came of their waits. Changes nothing."""
    result = Look([], {})
    for part in parts(sorted(set(run_ids))):
        stopped = select(parked).where(parked.c.run_id.in_(part), parked.c.state == PARKED)
        runs = {(row.run_id, row.redrives): row for row in await connection.execute(stopped)}
        if not runs:
            continue
        candidates = await _candidates(connection, part, now_ms)
        found: dict[Ident, list[tuple[Row[Any], Wait, list[Condition]]]] = {}
        for row in candidates:
            wait = Wait.unpack(row.spec)
            asked = list(wait.conditions(row.run_id, row.key))
            found.setdefault((row.run_id, row.redrives), []).append((row, wait, asked))
        since_ms = min(row.triggered_ms for row in runs.values())
        known = await Outcomes.read(
            connection,
            (one for items in found.values() for _, _, asked in items for one in asked),
            since_ms=since_ms,
        )
        off = await cancels.among(connection, part)
        for ident, run in runs.items():
            _judge(result, run, found.get(ident, []), known, now_ms, off=run.run_id in off)
    return result


async def _candidates(
    connection: AsyncConnection, run_ids: Sequence[str], now_ms: int
) -> list[Row[Any]]:
    """Return the waits of which something may have come.

    Of those that need all of many runs, only those that are due, or of which every run has ended.
    """
    open_runs = exists().where(
        conditions.c.run_id == waits.c.run_id,
        conditions.c.redrives == waits.c.redrives,
        conditions.c.key == waits.c.key,
        conditions.c.kind == "run",
        ~exists().where(endings.c.run_id == conditions.c.subject),
    )
    blocked = open_runs.label("blocked")
    rows = select(waits, blocked).where(waits.c.run_id.in_(run_ids), waits.c.state == WAITING)
    return [
        row
        for row in await connection.execute(rows)
        if not row.blocked
        or (row.due_ms is not None and row.due_ms <= now_ms)
        or Wait.unpack(row.spec).first
    ]


def _judge(
    result: Look,
    run: Row[Any],
    items: Sequence[tuple[Row[Any], Wait, list[Condition]]],
    known: Outcomes,
    now_ms: int,
    *,
    off: bool,
) -> None:
    over: dict[str, Wait] = {}
    late: set[str] = set()
    for row, wait, asked in items:
        # A token may have been given more time since.
        targets = tuple(
            replace(target, due_ms=known.due.get(target.subject, target.due_ms))
            if target.kind == "token"
            else target
            for target in wait.targets
        )
        put_off = replace(wait, targets=targets)
        got, due_ms = put_off.decide(
            [known.of(condition, since_ms=run.triggered_ms) for condition in asked], now_ms
        )
        if got or not asked:
            over[row.key] = wait.over(got)
            late |= _late(put_off, got, now_ms)
        elif due_ms != row.due_ms:
            result.next_ms[row.run_id, row.redrives, row.key] = due_ms
    # Where it is cancelled, a worker will see that before it goes on.
    if over or off or (run.wake_ms is not None and run.wake_ms <= now_ms):
        result.ready.append(
            Ready((run.run_id, run.redrives), run.seq, run.message, over, frozenset(late))
        )


def _late(wait: Wait, got: Sequence[Got | None], now_ms: int) -> set[str]:
    place, late = 0, set()
    for target in wait.targets:
        one = got[place] if target.count else None
        place += target.count
        own = target.due_ms is not None and target.due_ms <= now_ms
        if target.kind == "token" and own and one is not None and one.kind == "timed_out":
            late.add(target.subject)
    return late


async def take(connection: AsyncConnection, ready: Ready, *, now_ms: int) -> bool:
    """Take a run out, for whoever sends it on in this transaction; False: somebody else has."""
    for token in sorted(ready.late):
        expired = and_(tokens.c.id == token, tokens.c.state == WAITING)
        gone = await connection.execute(update(tokens).where(expired).values(state="timed_out"))
        if gone.rowcount != 1 and not await _timed_out(connection, token):
            return False  # Completed in this moment: whoever did that looks again.
    run_id, redrives = ready.ident
    still = and_(
        parked.c.run_id == run_id,
        parked.c.redrives == redrives,
        parked.c.seq == ready.seq,
        parked.c.state == PARKED,
    )
    taken = await connection.execute(
        update(parked).where(still).values(state=RESUMED, message=None, wake_ms=None)
    )
    if taken.rowcount != 1:
        return False
    for key, wait in ready.over.items():
        mine = (waits.c.run_id == run_id, waits.c.redrives == redrives, waits.c.key == key)
        ended = {"state": OVER, "over_ms": now_ms, "due_ms": None, "spec": _brief(wait)}
        await connection.execute(update(waits).where(*mine).values(ended))
    done = [(run_id, redrives, key) for key in ready.over]
    columns = tuple_(conditions.c.run_id, conditions.c.redrives, conditions.c.key)
    await connection.execute(delete(conditions).where(columns.in_(done)))
    return True


async def _timed_out(connection: AsyncConnection, token: str) -> bool:
    state = await connection.scalar(select(tokens.c.state).where(tokens.c.id == token))
    return state == "timed_out"


def _brief(wait: Wait) -> bytes:
    """Return a wait that is over as it is kept for people: without what came of it."""
    return replace(wait, got=None).pack()


async def put_off(
    connection: AsyncConnection, next_ms: Mapping[tuple[str, int, str], int | None]
) -> None:
    """Write when waits are looked at again."""
    for (run_id, redrives, key), due_ms in next_ms.items():
        mine = (waits.c.run_id == run_id, waits.c.redrives == redrives, waits.c.key == key)
        await connection.execute(
            update(waits).where(*mine, waits.c.state == WAITING).values(due_ms=due_ms)
        )


async def waiting_for(connection: AsyncConnection, kind: str, subjects: Iterable[str]) -> list[str]:
    """Return the ids of the runs that wait for one of these runs, tokens or events."""
    found: set[str] = set()
    for part in parts(sorted(set(subjects))):
        asked = select(conditions.c.run_id).where(
            conditions.c.kind == kind, conditions.c.subject.in_(part)
        )
        found.update(await connection.scalars(asked.distinct()))
    return sorted(found)


async def due(connection: AsyncConnection, now_ms: int, *, limit: int = 500) -> list[str]:
    """Return the ids of runs whose waits or sleeps are due, the first due first."""
    late = select(waits.c.run_id).where(*_stopped(), waits.c.due_ms <= now_ms)
    woken = select(parked.c.run_id).where(parked.c.state == PARKED, parked.c.wake_ms <= now_ms)
    first = await connection.scalars(late.order_by(waits.c.due_ms).limit(limit))
    second = await connection.scalars(woken.order_by(parked.c.wake_ms).limit(limit))
    return list(dict.fromkeys([*first, *second]))


def _stopped() -> tuple[ColumnElement[bool], ...]:
    """A run that is awake, and left a wait behind, comes back to it by itself."""
    run = (parked.c.run_id == waits.c.run_id, parked.c.redrives == waits.c.redrives)
    return waits.c.state == WAITING, exists().where(*run, parked.c.state == PARKED)


async def forget(connection: AsyncConnection, run_ids: Sequence[str], *, before_ms: int) -> None:
    """Delete what is kept of runs that are not kept any longer, and of old events and tokens.

    Never a message that is parked: the event that says its run has ended may be of a double, or
    of a time before a redrive.
    """
    for part in parts(run_ids):
        gone = and_(parked.c.run_id.in_(part), parked.c.state != PARKED)
        await connection.execute(delete(parked).where(gone))
        asleep = select(parked.c.run_id).where(parked.c.run_id.in_(part))
        for table in (waits, conditions, endings, tokens):
            mine = [table.c.run_id.in_(part), table.c.run_id.not_in(asleep)]
            if table is endings:
                asked = select(conditions.c.subject).where(conditions.c.kind == "run")
                mine.append(endings.c.run_id.not_in(asked))
            await connection.execute(delete(table).where(*mine))
    await connection.execute(delete(signals).where(signals.c.at_ms < before_ms))
    unclaimed = and_(tokens.c.run_id.is_(None), tokens.c.created_ms < before_ms)
    await connection.execute(delete(tokens).where(unclaimed))


async def next_due(connection: AsyncConnection) -> int | None:
    """Return when the next wait or sleep is due, in ms since the epoch."""
    late = select(waits.c.due_ms).where(*_stopped(), waits.c.due_ms.is_not(None))
    woken = select(parked.c.wake_ms).where(parked.c.state == PARKED, parked.c.wake_ms.is_not(None))
    times = [
        await connection.scalar(late.order_by(waits.c.due_ms).limit(1)),
        await connection.scalar(woken.order_by(parked.c.wake_ms).limit(1)),
    ]
    return min((time for time in times if time is not None), default=None)
