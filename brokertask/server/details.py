"""What is known of the inside of runs: when they were begun, their finished steps, and their logs.

Workers tell it without waiting for an answer, so some of it may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.errors import EnvelopeError
from brokertask.events import LOG, STARTED, STEP, Event
from brokertask.server.outcomes import parts
from brokertask.server.redactor import redact_body
from brokertask.server.store.schema import beginnings, log_lines, steps
from brokertask.server.store.upsert import put
from brokertask.values import clip

MAX_LINE: Final = 4_000
MAX_LEVEL: Final = 32
LINE: Final = ("at_ms", "batch_ms", "number", "attempt", "worker")
"""What says where a line is in a log."""


async def record(connection: AsyncConnection, events: Sequence[Event]) -> None:
    """Write what events tell of beginnings, steps and logs; the others are passed over."""
    began = [_beginning(event) for event in events if event.event == STARTED]
    done = [_step(event) for event in events if event.event == STEP and event.step is not None]
    said = [line for event in events if event.event == LOG for line in _lines(event)]
    # Everybody in the same order: two servers never wait for each other's rows.
    await put(connection, beginnings, sorted(began, key=lambda row: (row["run_id"], row["seq"])))
    await put(connection, steps, sorted(done, key=lambda row: (row["run_id"], row["number"])))
    await put(connection, log_lines, sorted(said, key=lambda row: (row["run_id"], row["at_ms"])))


async def beginnings_of(
    connection: AsyncConnection, run_id: str, *, limit: int = 1_000
) -> list[Mapping[str, Any]]:
    """Return when a run was begun: each attempt, and again after what it slept or waited for."""
    rows = select(beginnings).where(beginnings.c.run_id == run_id)
    latest_first = rows.order_by(beginnings.c.began_ms.desc(), beginnings.c.seq.desc())
    found = (await connection.execute(latest_first.limit(limit))).all()
    return [dict(row._mapping) for row in reversed(found)]


async def steps_of(
    connection: AsyncConnection,
    run_id: str,
    *,
    after: tuple[int, int] | None = None,
    limit: int | None = None,
) -> list[Mapping[str, Any]]:
    """Return finished steps of a run, in the order in which they have finished.

    Those behind the one with these keys, which are `redrives` and `number`.
    """
    keys = tuple_(steps.c.redrives, steps.c.number)
    rows = select(steps).where(steps.c.run_id == run_id)
    if after is not None:
        rows = rows.where(keys > after)
    rows = rows.order_by(steps.c.redrives, steps.c.number).limit(limit)
    return [dict(row._mapping) for row in await connection.execute(rows)]


async def log_of(
    connection: AsyncConnection,
    run_id: str,
    *,
    after: tuple[int, int, int, int, str] | None = None,
    limit: int = 1_000,
) -> list[Mapping[str, Any]]:
    """Return lines of a run's log, the first first, behind the one with these keys.

    The keys are those of `LINE`.
    """
    columns = [log_lines.c[name] for name in LINE]
    keys = tuple_(*columns)
    rows = select(log_lines).where(log_lines.c.run_id == run_id)
    if after is not None:
        rows = rows.where(keys > after)
    rows = rows.order_by(*columns)
    return [dict(row._mapping) for row in await connection.execute(rows.limit(limit))]


async def forget(connection: AsyncConnection, run_ids: Sequence[str]) -> None:
    """Delete what is known of the inside of runs that are not kept any longer."""
    for part in parts(run_ids):
        for table in (beginnings, steps, log_lines):
            await connection.execute(delete(table).where(table.c.run_id.in_(part)))


def _beginning(event: Event) -> dict[str, Any]:
    return {
        "run_id": event.run_id,
        "redrives": event.redrives or 0,
        "attempt": event.attempt,
        "seq": event.seq or 0,
        "worker": event.worker,
        "began_ms": event.at_ms,
    }


def _step(event: Event) -> dict[str, Any]:
    return {
        "run_id": event.run_id,
        "redrives": event.redrives or 0,
        "number": event.number or 0,
        "name": event.step,
        "attempt": event.attempt,
        "worker": event.worker,
        "ended_ms": event.at_ms,
        "result": None if event.result is None else _kept(event.result),
    }


def _kept(result: bytes) -> bytes | None:
    try:
        return redact_body(result)
    except EnvelopeError:
        return None


def _lines(event: Event) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(event.lines or ()):
        match line:
            case [int(at_ms), str(level), str(text)]:
                row = {"at_ms": at_ms, "level": level[:MAX_LEVEL], "text": clip(text, MAX_LINE)}
                whose = {"run_id": event.run_id, "attempt": event.attempt, "worker": event.worker}
                found.append({**whose, "batch_ms": event.at_ms, "number": number, **row})
    return found
