"""Tokens: decided once, by whoever comes first; before the run waits for them, or while it does."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.parking import WAITING
from brokertask.server.store.schema import tokens, waits
from brokertask.server.store.upsert import put
from brokertask.values import MSGPACK, decode, encode
from brokertask.wait import SECRET, Wait

MAX_VALUE_BYTES: Final = 65_536
"""Of what a token is completed with: it becomes part of the run's memory."""
MAX_EARLY: Final = 1_000
"""Callbacks that are kept before anybody has heard of their token: whoever calls needs no right."""
MAX_EARLY_BYTES: Final = 4_096
"""Of what such a callback brings; once its token is known, it may bring as much as any other."""
EARLY_MS: Final = 3_600_000
"""How long such a callback is kept: its run is on its way to a server."""
CALLBACK: Final = "callback"
"""Who decides by a secret alone."""
Answer: TypeAlias = Literal["done", "repeated", "late", "too_large", "unknown"]
"""What came of a decision: taken; the same as before; another was before, or its time has run
out; too large; no token has such an id."""


async def complete(
    connection: AsyncConnection, token: str, value: object, *, by: str, now_ms: int
) -> Answer:
    """Complete a token with a plain value of up to 64 KiB; then see `Waits.came`.

    Raises:
        InvalidPayload: The value has no form in msgpack.
    """
    body = encode(value)
    if len(body) > MAX_VALUE_BYTES:
        return "too_large"
    return await _decide(connection, token, {"state": "completed", "value": body}, by, now_ms)


async def reject(
    connection: AsyncConnection, token: str, reason: str, *, by: str, now_ms: int
) -> Answer:
    """Reject a token: what waits for it gets `Rejected`, with the reason."""
    if len(reason.encode()) > MAX_VALUE_BYTES:
        return "too_large"
    return await _decide(connection, token, {"state": "rejected", "reason": reason}, by, now_ms)


async def extend(connection: AsyncConnection, token: str, due_ms: int | None) -> Answer:
    """Give a token time until `due_ms`, in ms since the epoch; None: for ever."""
    open_one = and_(tokens.c.id == token, tokens.c.state == WAITING)
    changed = await connection.execute(update(tokens).where(open_one).values(due_ms=due_ms))
    row = (await connection.execute(select(tokens).where(tokens.c.id == token))).one_or_none()
    if row is None:
        return "unknown"
    if changed.rowcount != 1:
        return "late"
    # It is looked at at its old time, or now, and then put off.
    mine = (waits.c.run_id == row.run_id, waits.c.state == WAITING)
    later = or_(waits.c.due_ms.is_(None), waits.c.due_ms > (due_ms or 0))
    if due_ms is not None:
        await connection.execute(update(waits).where(*mine, later).values(due_ms=due_ms))
    return "done"


async def _decide(
    connection: AsyncConnection, token: str, decision: dict[str, Any], by: str, now_ms: int
) -> Answer:
    if not token.startswith(f"{SECRET}_"):
        return "unknown"
    values = {**decision, "decided_ms": now_ms, "decided_by": by}
    if by == CALLBACK and not await _may_keep(connection, token, decision, now_ms):
        return "unknown"
    # Nobody may have heard of it yet: then this is kept until the run comes to wait for it.
    await put(connection, tokens, [{"id": token, "created_ms": now_ms, **values}])
    open_one = and_(tokens.c.id == token, tokens.c.state == WAITING)
    await connection.execute(update(tokens).where(open_one).values(values))
    row = (await connection.execute(select(tokens).where(tokens.c.id == token))).one()
    if any(getattr(row, name) != value for name, value in decision.items()):
        return "late"
    return "done" if (row.decided_ms, row.decided_by) == (now_ms, by) else "repeated"


async def _may_keep(
    connection: AsyncConnection, token: str, decision: dict[str, Any], now_ms: int
) -> bool:
    """Whether a token is known, or there is room for a callback that comes before it."""
    if await connection.scalar(select(tokens.c.id).where(tokens.c.id == token)) is not None:
        return True
    early = and_(tokens.c.run_id.is_(None), tokens.c.decided_by == CALLBACK)
    await connection.execute(delete(tokens).where(early, tokens.c.created_ms < now_ms - EARLY_MS))
    kept = await connection.scalar(select(func.count()).select_from(tokens).where(early)) or 0
    return kept < MAX_EARLY and len(decision.get("value", b"")) <= MAX_EARLY_BYTES


async def listed(
    connection: AsyncConnection, *, open_only: bool = True, after: str = "", limit: int = 100
) -> list[dict[str, Any]]:
    """Return tokens by id, without their values, behind the id `after`."""
    wanted = select(tokens).where(tokens.c.id > after).order_by(tokens.c.id).limit(limit)
    if open_only:
        wanted = wanted.where(tokens.c.state == WAITING)
    hidden = {"value"}
    return [
        {name: value for name, value in row._mapping.items() if name not in hidden}
        for row in await connection.execute(wanted)
    ]


async def of_run(connection: AsyncConnection, run_id: str) -> list[dict[str, Any]]:
    """Return the waits of a run: their keys, states and instants, and what they are for."""
    rows = await connection.execute(
        select(waits).where(waits.c.run_id == run_id).order_by(waits.c.since_ms, waits.c.key)
    )
    return [
        {
            "key": row.key,
            "state": row.state,
            "since_ms": row.since_ms,
            "due_ms": row.due_ms,
            "over_ms": row.over_ms,
            "for": [target.words for target in Wait.unpack(row.spec).targets],
        }
        for row in rows
    ]


async def value_of(connection: AsyncConnection, token: str) -> object:
    """Return what a token was completed with, or None."""
    body = await connection.scalar(select(tokens.c.value).where(tokens.c.id == token))
    return None if body is None else decode(body, MSGPACK)
