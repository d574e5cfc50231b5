"""The runs that were cancelled, as the control log says, and those that were triggered below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.control import Entry
from brokertask.envelope import Envelope
from brokertask.events import ENDS
from brokertask.server.outcomes import parts
from brokertask.server.store.schema import cancels, runs
from brokertask.server.store.upsert import put, put_new


async def record(connection: AsyncConnection, entries: Sequence[Entry]) -> None:
    """Write which runs are cancelled; the first reason counts."""
    rows = {entry.subject: _row(entry) for entry in reversed(entries)}
    await put(connection, cancels, list(rows.values()))
    for part in parts([entry.subject for entry in entries if entry.children]):
        mine = cancels.c.run_id.in_(part)
        await connection.execute(update(cancels).where(mine).values(children=True))


async def record_below(connection: AsyncConnection, above: Entry) -> list[Entry]:
    """Cancel what a run has triggered, and what that has: return what is new of it, as entries.

    Known are the runs whose trigger or first event was recorded; workers find the others.
    """
    new = []
    for run_id in await _below(connection, above.subject):
        entry = Entry(
            kind="cancel",
            subject=run_id,
            at_ms=above.at_ms,
            reason=above.reason,
            children=True,
        )
        if await put_new(connection, cancels, _row(entry)):
            new.append(entry)
    return new


async def inherit(connection: AsyncConnection, envelopes: Sequence[Envelope]) -> None:
    """Cancel those of these runs that were triggered below one that is cancelled with them."""
    above = {one for each in envelopes for one in (each.parent, each.root) if one is not None}
    found: dict[str, Entry] = {}
    for part in parts(sorted(above)):
        rows = select(cancels).where(cancels.c.run_id.in_(part), cancels.c.children)
        for row in await connection.execute(rows):
            found[row.run_id] = Entry(
                kind="cancel", subject=row.run_id, at_ms=row.at_ms, reason=row.reason
            )
    for each in envelopes:
        entry = found.get(each.parent or "") or found.get(each.root or "")
        if entry is not None:
            await put_new(connection, cancels, {**_row(entry), "run_id": each.run_id})


async def among(connection: AsyncConnection, run_ids: Sequence[str]) -> set[str]:
    """Return which of up to 500 runs are cancelled."""
    found = select(cancels.c.run_id).where(cancels.c.run_id.in_(run_ids))
    return set(await connection.scalars(found))


async def forget(connection: AsyncConnection, *, before_ms: int) -> None:
    """Delete what the control log has long forgotten."""
    await connection.execute(delete(cancels).where(cancels.c.at_ms < before_ms))


async def _below(connection: AsyncConnection, run_id: str) -> list[str]:
    """Return the ids of all runs in the tree below one that have not ended, as far as is known."""
    seen, level, going = {run_id}, [run_id], list[str]()
    while level:
        below: list[str] = []
        for part in parts(level):
            asked = select(runs.c.run_id, runs.c.status).where(runs.c.parent.in_(part))
            for row in await connection.execute(asked.order_by(runs.c.run_id)):
                if row.run_id not in seen:
                    seen.add(row.run_id)
                    below.append(row.run_id)
                    going += [] if row.status in ENDS else [row.run_id]
        level = below
    return going


def _row(entry: Entry) -> Mapping[str, object]:
    return {
        "run_id": entry.subject,
        "reason": entry.reason,
        "children": entry.children,
        "at_ms": entry.at_ms,
    }
