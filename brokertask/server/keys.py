"""What becomes of a trigger that comes with a key: its row in the table `keys`, and the decision.

Each decision is made in one transaction with the row locked, and with what follows from it in the
outbox. A trigger that comes again, because its server died after the commit, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.admission import Admission
from brokertask.envelope import Envelope, Message
from brokertask.events import CANCELLED, EXPIRED, FAILED, Event
from brokertask.server.messages import pack_message, unpack_message
from brokertask.server.store.schema import endings, keys, runs
from brokertask.server.store.upsert import put_new
from brokertask.values import kind_of

ENDED_BADLY: Final = (FAILED, EXPIRED, CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A trigger that a server is to decide on."""

    envelope: Envelope
    admission: Admission
    redelivered: bool = False

    @property
    def kind(self) -> str:
        """What its key is of: debounces of both modes know nothing of each other."""
        asked = self.admission
        return f"{asked.kind}.{asked.mode}" if asked.kind == "debounce" else asked.kind

    @property
    def place(self) -> tuple[str, str, str]:
        """What it may share with others; whoever locks several, does it in this order."""
        return self.envelope.task, self.kind, self.admission.key

    @property
    def trailing(self) -> bool:
        """Whether its run waits for quiet."""
        return self.admission.mode == "trailing"

    def digest(self) -> bytes:
        """Return what tells its payload from others."""
        kind = kind_of(self.envelope.content_type).encode()
        return hashlib.sha256(kind + b"\0" + self.envelope.payload).digest()

    def quiet_ms(self, *, first_ms: int, now_ms: int) -> int:
        """Return when a debounce ends if nothing else comes."""
        end, longest = now_ms + self.admission.ttl_ms, self.admission.max_delay_ms
        return end if longest is None else min(end, first_ms + longest)


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of it."""

    run_id: str
    """The run that the trigger stands for."""
    begins: bool = False
    """The run is its own, to be published now."""
    replaces: str | None = None
    """The run that is to be cancelled for it."""
    refused: str | None = None


async def decide(connection: AsyncConnection, request: Request, *, now_ms: int) -> Decision:
    """Decide on a trigger, and write it down; the caller publishes what begins."""
    mine = _mine(request)
    held: Row[Any] | None = None
    while held is None:
        if await put_new(connection, keys, _row(request, now_ms)):
            return Decision(request.envelope.run_id, begins=not request.trailing)
        # Between the two, a debounce may have ended.
        found = await connection.execute(select(keys).where(*mine).with_for_update())
        held = found.one_or_none()
    if request.trailing:
        return await _put_off(connection, request, held, now_ms)
    if held.expires_ms > now_ms and not await _is_free(connection, request, held.run_id):
        if request.admission.mode == "replace":
            return await _replaced(connection, request, held, now_ms)
        return await _joined(connection, request, held, now_ms)
    if await _ending(connection, request.envelope.run_id) is not None:
        # It has been through here before, and its key is another's since.
        return Decision(request.envelope.run_id)
    await connection.execute(update(keys).where(*mine).values(_row(request, now_ms)))
    return Decision(request.envelope.run_id, begins=held.run_id != request.envelope.run_id)


async def _replaced(
    connection: AsyncConnection, request: Request, held: Row[Any], now_ms: int
) -> Decision:
    """Let a trigger take the key from the run that holds it."""
    own = request.envelope.run_id
    # One that comes again must not take it from the run that has replaced its own since.
    if await connection.scalar(select(runs.c.run_id).where(runs.c.run_id == own)) is not None:
        return Decision(own)
    await connection.execute(update(keys).where(*_mine(request)).values(_row(request, now_ms)))
    return Decision(own, begins=True, replaces=held.run_id)


async def _joined(
    connection: AsyncConnection, request: Request, held: Row[Any], now_ms: int
) -> Decision:
    """Let a trigger stand for the run that holds its key."""
    kind = request.admission.kind
    if kind == "idempotency" and held.digest != request.digest():
        said = f"the idempotency key of run {held.run_id} was used with another payload"
        return Decision(held.run_id, refused=said)
    if kind == "debounce":
        end = request.quiet_ms(first_ms=held.created_ms, now_ms=now_ms)
        await connection.execute(update(keys).where(*_mine(request)).values(expires_ms=end))
    return Decision(held.run_id)


async def _put_off(
    connection: AsyncConnection, request: Request, held: Row[Any], now_ms: int
) -> Decision:
    """Let a run that waits for quiet begin later, with this payload."""
    first, last = unpack_message(held.message), request.envelope
    if not (request.redelivered and (last.triggered_ms or 0) < (first.timestamp_ms or 0)):
        # Its events go to the caller that has its id from the start; others ask for its end.
        told = replace(last, run_id=held.run_id, reply_to=first.reply_to)
        due_ms = request.quiet_ms(first_ms=held.created_ms, now_ms=now_ms)
        await connection.execute(
            update(keys)
            .where(*_mine(request))
            .values(message=pack_message(told.message()), due_ms=due_ms)
        )
    return Decision(held.run_id)


async def _is_free(connection: AsyncConnection, request: Request, run_id: str) -> bool:
    """Return whether what became of a run frees its key."""
    match request.admission.kind:
        case "idempotency":
            return await _ending(connection, run_id) in ENDED_BADLY
        case "singleton":
            return await _ending(connection, run_id) is not None
        case "debounce":
            return False


async def take_due(connection: AsyncConnection, *, now_ms: int, limit: int = 200) -> list[Message]:
    """Take out debounced runs that are due, for whoever publishes them in this transaction."""
    due = select(keys).where(keys.c.due_ms <= now_ms).order_by(keys.c.due_ms).limit(limit)
    taken = []
    for row in (await connection.execute(due)).all():
        gone = await connection.execute(
            delete(keys).where(
                keys.c.task == row.task,
                keys.c.kind == row.kind,
                keys.c.key == row.key,
                keys.c.run_id == row.run_id,
                keys.c.due_ms == row.due_ms,
            )
        )
        if gone.rowcount == 1:
            taken.append(unpack_message(row.message))
    return taken


async def next_due(connection: AsyncConnection) -> int | None:
    """Return when the next debounced run is due, in ms since the epoch."""
    due: int | None = await connection.scalar(select(func.min(keys.c.due_ms)))
    return due


async def forget_expired(connection: AsyncConnection, *, now_ms: int) -> int:
    """Delete keys whose time is over, and return how many."""
    return (await connection.execute(delete(keys).where(keys.c.expires_ms <= now_ms))).rowcount


async def _ending(connection: AsyncConnection, run_id: str) -> str | None:
    """Return the event that a run ended with, if it has."""
    body = await connection.scalar(select(endings.c.body).where(endings.c.run_id == run_id))
    return None if body is None else Event.read(Message(body=body)).event


def _mine(request: Request) -> tuple[ColumnElement[bool], ...]:
    task, kind, key = request.place
    return keys.c.task == task, keys.c.kind == kind, keys.c.key == key


def _row(request: Request, now_ms: int) -> Mapping[str, Any]:
    task, kind, key = request.place
    end = request.quiet_ms(first_ms=now_ms, now_ms=now_ms)
    trailing = request.trailing
    return {
        "task": task,
        "kind": kind,
        "key": key,
        "run_id": request.envelope.run_id,
        "digest": request.digest(),
        "created_ms": now_ms,
        "expires_ms": None if trailing else end,
        "due_ms": end if trailing else None,
        "message": pack_message(request.envelope.message()) if trailing else None,
    }
