"""The history of runs: one row for each, folded from facts that come in any order and repeatedly.

A fact has a place in its run: how often it was redriven, whether it is an end, its attempt, and the
number of its message. The row tells what the fact with the highest place said, and what any fact
said of what never changes. So the same facts in another order, or again, give the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Envelope
from brokertask.events import ENDS, RETRYING, SLEEPING, WAITING, Event
from brokertask.server.outcomes import parts
from brokertask.server.redactor import Kept
from brokertask.server.store.schema import attempts, known_tasks, runs
from brokertask.server.store.upsert import put
from brokertask.values import LAST_INSTANT_MS, pack

QUEUED: Final = "queued"
DELAYED: Final = "delayed"
RUNNING: Final = "running"
TAG: Final = "\x1f"
"""Around each tag in a row; no tag holds it, as it cannot be printed."""
_REDRIVE: Final = 2 * 10**16
_ENDED: Final = 10**16
_ATTEMPT: Final = 10**10
_MESSAGE: Final = 10
_STATUSES: Final = (*ENDS, RETRYING, SLEEPING, WAITING)
"""Events that say what a run is at; any other says that it is at work."""
_ASKED, _AT_WORK, _LEFT = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that is known of a run from now on."""

    run_id: str
    task: str
    place: int
    at_ms: int
    latest: Mapping[str, Any]
    """The columns that follow the fact with the highest place."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The columns that follow the latest trigger."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """The column that follows the latest notes of the run about itself."""
    done: Mapping[str, Any] = field(default_factory=dict)
    """The columns that follow what it said last of how far it is."""
    attempt: Mapping[str, Any] | None = None
    """The row of the attempt that ended with it."""


def trigger_fact(envelope: Envelope, kept: Kept, *, now_ms: int) -> Fact:
    """Return what the trigger of a run tells: that it is asked for, and with what."""
    triggered_ms = envelope.triggered_ms or now_ms
    delayed = envelope.due_ms is not None and envelope.due_ms > now_ms
    traceparent = (envelope.trace.get("traceparent") or "").split("-")
    return Fact(
        run_id=envelope.run_id,
        task=envelope.task,
        place=_place(envelope.redrives, envelope.attempt, envelope.seq, _ASKED),
        at_ms=envelope.sent_ms or triggered_ms,
        latest={
            **_LATEST,
            "status": DELAYED if delayed else QUEUED,
            "redrives": envelope.redrives,
            "attempt": envelope.attempt,
            "due_ms": envelope.due_ms if delayed else None,
        },
        asked={
            "triggered_ms": triggered_ms,
            "tags": f"{TAG}{TAG.join(envelope.tags)}{TAG}" if envelope.tags else "",
            "parent": envelope.parent,
            "root": envelope.root,
            "trace_id": traceparent[1] if len(traceparent) == 4 else None,
            "app_id": envelope.app_id,
            "payload": kept.body,
            "content_type": kept.content_type,
            "payload_state": kept.state,
        },
    )


def event_fact(event: Event) -> Fact:
    """Return what an event of a run tells."""
    redrives, seq, error = event.redrives or 0, event.seq or 0, event.error
    ended, news = event.event in ENDS, event.event not in _STATUSES
    if ended:
        # Of two ends the first is right: the lower its instant, the higher its place.
        place = min(redrives, 400) * _REDRIVE + _ENDED + (LAST_INSTANT_MS - event.at_ms)
    else:
        place = _place(redrives, event.attempt, seq, _AT_WORK if news else _LEFT)
    return Fact(
        run_id=event.run_id,
        task=event.task,
        place=place,
        at_ms=event.at_ms,
        latest={
            **_LATEST,
            "status": RUNNING if news else event.event,
            "redrives": redrives,
            "attempt": event.attempt,
            "worker": event.worker,
            "reason": event.reason,
            "error_type": error.type if error else None,
            "error_message": error.message if error else None,
            "waits": pack(list(event.waits)) if event.waits else None,
            "due_ms": None if event.delay_ms is None else event.at_ms + event.delay_ms,
            "ended_ms": event.at_ms if ended else None,
        },
        noted={"notes": pack(dict(event.metadata))} if event.metadata else {},
        done={} if event.done is None else {"done": event.done, "total": event.total},
        attempt=_attempt(event, redrives) if ended or event.event == RETRYING else None,
    )


async def record(connection: AsyncConnection, facts: Sequence[Fact]) -> None:
    """Write what is known from now on; within a transaction, before it is acked.

    Cost: a few statements for each 500 runs.
    """
    by_run: dict[str, list[Fact]] = {}
    for fact in facts:
        by_run.setdefault(fact.run_id, []).append(fact)
    # Everybody in the same order: two servers never wait for each other's rows.
    for run_ids in parts(sorted(by_run)):
        await put(connection, runs, [_blank(by_run[run_id][0]) for run_id in run_ids])
        locked = select(runs).where(runs.c.run_id.in_(run_ids)).with_for_update()
        rows = (await connection.execute(locked.order_by(runs.c.run_id))).all()
        changed = [folded for row in rows if (folded := _fold(row, by_run[row.run_id]))]
        for values in changed:
            mine = runs.c.run_id == values.pop("run_id")
            await connection.execute(update(runs).where(mine).values(values))
    await put(connection, attempts, _last_of_each(facts), newer=attempts.c.ended_ms)
    tasks = {fact.task: fact.at_ms for fact in facts}
    await put(
        connection,
        known_tasks,
        [{"task": task, "since_ms": tasks[task]} for task in sorted(tasks)],
    )


def _last_of_each(facts: Sequence[Fact]) -> list[Mapping[str, Any]]:
    """Return the rows of attempts; of one that ended twice, as a doubled run may, the last."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in (fact.attempt for fact in facts if fact.attempt is not None):
        key = (row["run_id"], row["redrives"], row["attempt"])
        if key not in found or row["ended_ms"] > found[key]["ended_ms"]:
            found[key] = row
    return [found[key] for key in sorted(found)]


def _blank(fact: Fact) -> dict[str, Any]:
    """Return the row of a run of which nothing is known yet; any fact is later than its place."""
    return {
        **_LATEST,
        "run_id": fact.run_id,
        "task": fact.task,
        "status": QUEUED,
        "place": -1,
        "asked_place": -1,
        "noted_ms": -1,
        "done_ms": -1,
        "redrives": 0,
        "attempt": 1,
        "at_ms": -1,
        "triggered_ms": fact.at_ms,
        "tags": "",
    }


def _fold(row: Row[Any], facts: Sequence[Fact]) -> dict[str, Any] | None:
    """Return the columns that facts change in a row; None if they say nothing new."""
    known = dict(row._mapping)
    for fact in facts:
        if fact.asked and fact.place > known["asked_place"]:
            known.update(fact.asked, asked_place=fact.place)
        elif known["asked_place"] < 0:
            known["triggered_ms"] = min(known["triggered_ms"], fact.at_ms)
        if fact.noted and fact.at_ms > known["noted_ms"]:
            known.update(fact.noted, noted_ms=fact.at_ms)
        if fact.done and fact.at_ms > known["done_ms"]:
            known.update(fact.done, done_ms=fact.at_ms)
        if (fact.place, fact.at_ms) > (known["place"], known["at_ms"]):
            known.update(fact.latest, place=fact.place, at_ms=fact.at_ms)
    changed = {name: value for name, value in known.items() if value != getattr(row, name)}
    return {**changed, "run_id": row.run_id} if changed else None


def _place(redrives: int, attempt: int, seq: int, stage: int) -> int:
    return (
        min(redrives, 400) * _REDRIVE
        + min(attempt, 99_999) * _ATTEMPT
        + min(seq, 99_999_999) * _MESSAGE
        + stage
    )


def _attempt(event: Event, redrives: int) -> dict[str, Any]:
    error = event.error
    return {
        "run_id": event.run_id,
        "redrives": redrives,
        "attempt": event.attempt,
        "outcome": event.event,
        "worker": event.worker,
        "ended_ms": event.at_ms,
        "delay_ms": event.delay_ms,
        "error_type": error.type if error else None,
        "error_message": error.message if error else None,
        "traceback": error.traceback if error else None,
    }


_LATEST: Final[Mapping[str, Any]] = dict.fromkeys(
    ("worker", "reason", "error_type", "error_message", "waits", "due_ms", "ended_ms")
)
