"""The history of runs: one row for each, folded from facts that come in any order and repeatedly.

A fact has a place in its run: how often it was redriven, whether it is an end, its attempt, and the
number of its message. The row tells what the fact with the highest place said, and what any fact
said of what never changes. So the same facts in another order, or again, give the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import ColumnCollection, and_, case, or_, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Envelope
from brokertask.events import ENDS, RETRYING, SLEEPING, WAITING, Event
from brokertask.server.redactor import Kept
from brokertask.server.store.schema import attempts, known_tasks, run_tags, runs
from brokertask.server.store.upsert import Merged, merge, put
from brokertask.telemetry import fingerprint
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
_TOLD: Final = (*sorted(ENDS), RETRYING, SLEEPING, WAITING)
"""Events that say what a run is at; any other says that it is at work."""
STATUSES: Final = (*_TOLD, QUEUED, DELAYED, RUNNING)
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
    ended, news = event.event in ENDS, event.event not in _TOLD
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
            "status": RUNNING if news else event.event,
            "redrives": redrives,
            "attempt": event.attempt,
            "worker": event.worker,
            "reason": event.reason,
            "error_type": error.type if error else None,
            "error_message": error.message if error else None,
            "fingerprint": fingerprint(error) if error else None,
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

    Cost: a few statements, and a row of each for each fact.
    """
    # Everybody in the same order: two servers never wait for each other's rows.
    known = sorted(facts, key=lambda fact: fact.run_id)
    await merge(connection, runs, [_row(fact) for fact in known], _folded)
    tagged = [row for fact in known if fact.asked for row in _tagged(fact)]
    await put(connection, run_tags, tagged, newer=run_tags.c.place)
    ended = [fact.attempt for fact in known if fact.attempt is not None]
    await put(connection, attempts, ended, newer=attempts.c.ended_ms)
    tasks = {fact.task: fact.at_ms for fact in facts}
    since = [{"task": task, "since_ms": tasks[task]} for task in sorted(tasks)]
    await put(connection, known_tasks, since)


def _row(fact: Fact) -> dict[str, Any]:
    """Return the row of a run of which nothing else is known yet."""
    return {
        **_UNKNOWN,
        **fact.latest,
        **fact.asked,
        **fact.noted,
        **fact.done,
        "run_id": fact.run_id,
        "task": fact.task,
        "triggered_ms": fact.asked.get("triggered_ms", fact.at_ms),
        "place": fact.place,
        "at_ms": fact.at_ms,
        "asked_place": fact.place if fact.asked else -1,
        "noted_ms": fact.at_ms if fact.noted else -1,
        "done_ms": fact.at_ms if fact.done else -1,
    }


def _folded(new: ColumnCollection[str, Any]) -> Merged:
    """Return what a row holds when another fact is known."""
    old = runs.c
    later = tuple_(new.place, new.at_ms) > tuple_(old.place, old.at_ms)
    asked = new.asked_place > old.asked_place
    groups = (
        (later, (*_LATEST, "place", "at_ms")),
        (asked, (*_ASKED_FOR, "asked_place")),
        (new.noted_ms > old.noted_ms, (*_NOTED, "noted_ms")),
        (new.done_ms > old.done_ms, (*_DONE, "done_ms")),
    )
    folded = {
        name: case((newer, new[name]), else_=old[name]) for newer, names in groups for name in names
    }
    # Before its trigger is seen, a run was triggered when it was first heard of.
    first = and_(old.asked_place < 0, new.asked_place < 0, new.triggered_ms < old.triggered_ms)
    triggered = case((or_(asked, first), new.triggered_ms), else_=old.triggered_ms)
    return {**folded, "triggered_ms": triggered}


def _tagged(fact: Fact) -> list[dict[str, Any]]:
    keys = {"run_id": fact.run_id, "triggered_ms": fact.asked["triggered_ms"], "place": fact.place}
    return [{"tag": tag, **keys} for tag in fact.asked["tags"].split(TAG) if tag]


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


_LATEST: Final = (
    *("status", "redrives", "attempt", "worker", "reason", "error_type", "error_message"),
    *("fingerprint", "waits", "due_ms", "ended_ms"),
)
_ASKED_FOR: Final = (
    *("triggered_ms", "tags", "parent", "root", "trace_id", "app_id"),
    *("payload", "content_type", "payload_state"),
)
_NOTED: Final = ("notes",)
_DONE: Final = ("done", "total")
_UNKNOWN: Final[Mapping[str, Any]] = {
    **dict.fromkeys((*_LATEST, *_ASKED_FOR, *_NOTED, *_DONE)),
    "tags": "",
}
