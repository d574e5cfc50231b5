"""What is known of the conditions of waits: how runs ended, tokens, and events that came.

Each of these facts is written before anybody asks what it is good for, and a wait is written before
it is asked what has come of it already; so of a fact and a wait at the same time, the one that is
asked about last finds the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Message, derived_id
from brokertask.errors import EnvelopeError
from brokertask.events import CANCELLED, COMPLETED, Event
from brokertask.server.store.schema import endings, signals, tokens
from brokertask.server.store.upsert import put
from brokertask.values import MSGPACK, decode, kind_of, pack
from brokertask.wait import Condition, Failing, Got, holds

LOOKBACK_MS: Final = 60_000
"""An event counts for a run from so long before its trigger: two clocks tell of them."""
MAX_SIGNAL_BYTES: Final = 65_536
"""A larger event is history, and wakes nobody."""
_UNKNOWN: Final = b"\xc0"


def ending_of(event: Event) -> dict[str, object]:
    """Return the row that tells how a run ended, for `record_endings`."""
    return {
        "run_id": event.run_id,
        "task": event.task,
        "redrives": event.redrives or 0,
        "body": event.message().body,
        "at_ms": event.at_ms,
    }


async def record_endings(connection: AsyncConnection, rows: Sequence[Mapping[str, object]]) -> None:
    """Write how runs ended: the first end counts, until the run was redriven."""
    await put(connection, endings, rows, newer=endings.c.redrives)


def signal_of(message: Message, key: str, *, at_ms: int) -> dict[str, object] | None:
    """Return the row of an event that a user has published; None if it is no map of that size.

    One without a message id is known by what it holds, as the broker may deliver it twice.
    """
    try:
        value = decode(message.body, kind_of(message.content_type or MSGPACK))
        body = pack(value)
    except EnvelopeError:
        return None
    if not isinstance(value, dict) or len(body) > MAX_SIGNAL_BYTES:
        return None
    identity = message.message_id or derived_id(message, key)
    return {"id": identity, "key": key, "body": body, "at_ms": at_ms}


async def record_signals(connection: AsyncConnection, rows: Sequence[Mapping[str, object]]) -> None:
    """Write events that users have published."""
    await put(connection, signals, rows)


class Outcomes:
    """What is known of some conditions at one moment."""

    def __init__(
        self,
        ended: Mapping[str, Got],
        decided: Mapping[str, Got],
        due: Mapping[str, int | None],
        heard: Mapping[str, Sequence[Any]],
    ) -> None:
        self._ended = ended
        self._decided = decided
        self._heard = heard
        self.due = due
        """When tokens are given up, in ms since the epoch; somebody may have put it off."""

    @staticmethod
    async def read(
        connection: AsyncConnection, conditions: Iterable[Condition], *, since_ms: int
    ) -> Outcomes:
        """Look up what is known of conditions, events from `since_ms` on."""
        subjects: dict[str, set[str]] = {"run": set(), "token": set(), "event": set()}
        for condition in conditions:
            subjects[condition.kind].add(condition.subject)
        ended: dict[str, Got] = {}
        for part in parts(sorted(subjects["run"])):
            rows = await connection.execute(
                select(endings.c.run_id, endings.c.task, endings.c.body).where(
                    endings.c.run_id.in_(part)
                )
            )
            ended |= {row.run_id: _ended(row) for row in rows}
        decided: dict[str, Got] = {}
        due: dict[str, int | None] = {}
        for part in parts(sorted(subjects["token"])):
            for row in await connection.execute(select(tokens).where(tokens.c.id.in_(part))):
                due[row.id] = row.due_ms
                if (got := _decided(row)) is not None:
                    decided[row.id] = got
        heard: dict[str, list[Any]] = {}
        for part in parts(sorted(subjects["event"])):
            found = select(signals).where(signals.c.key.in_(part), signals.c.at_ms >= since_ms)
            for row in await connection.execute(found.order_by(signals.c.at_ms, signals.c.id)):
                heard.setdefault(row.key, []).append(row)
        return Outcomes(ended, decided, due, heard)

    def of(self, condition: Condition, *, since_ms: int) -> Got | None:
        """Return what came of a condition, or None."""
        match condition.kind:
            case "run":
                return self._ended.get(condition.subject)
            case "token":
                return self._decided.get(condition.subject)
            case "event":
                return self._heard_by(condition, since_ms - LOOKBACK_MS)

    def _heard_by(self, condition: Condition, since_ms: int) -> Got | None:
        target = condition.target
        for row in self._heard.get(condition.subject, ()):
            if row.at_ms < since_ms or row.id in target.seen:
                continue
            if holds(decode(row.body, MSGPACK), target.where):
                return Got("value", row.body, row.id)
        return None


def parts(items: Sequence[str], size: int = 500) -> Iterable[Sequence[str]]:
    """Return items in portions that a database takes in one statement."""
    return (items[at : at + size] for at in range(0, len(items), size))


def _ended(row: Any) -> Got:
    event = Event.read(Message(body=row.body))
    if event.event == COMPLETED:
        return Got("value", event.claim or event.result or _UNKNOWN)
    error = event.error
    return Got(
        "failed",
        Failing(
            row.run_id,
            row.task,
            event.event if event.event == CANCELLED else event.reason or event.event,
            error.type if error else "",
            error.message if error else "",
        ),
    )


def _decided(row: Any) -> Got | None:
    match row.state:
        case "completed":
            return Got("value", row.value)
        case "rejected":
            return Got("rejected", row.reason)
        case "timed_out":
            return Got("timed_out")
        case _:
            return None
