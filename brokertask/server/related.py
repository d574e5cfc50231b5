"""The runs that were triggered by one another, as a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.store.schema import runs

MAX_RELATED: Final = 1_000


@dataclass(frozen=True, slots=True)
class Related:
    """The runs of a tree."""

    rows: Sequence[Mapping[str, Any]]
    """The one at the top first; each with `parent`."""
    capped: bool


async def tree_of(connection: AsyncConnection, run_id: str) -> Related | None:
    """Return the runs of the tree that a run is in, `MAX_RELATED` at most; None if it is unknown.

    The run itself is among them, however many there are. Cost: two look-ups in an index.
    """
    shown = [
        runs.c[name]
        for name in ("run_id", "parent", "root", "task", "status", "triggered_ms", "ended_ms")
    ]
    self = (await connection.execute(select(*shown).where(runs.c.run_id == run_id))).one_or_none()
    if self is None:
        return None
    top_id = self.root or self.parent or run_id
    below = select(*shown).where(runs.c.root == top_id, runs.c.run_id != top_id)
    below = below.order_by(runs.c.triggered_ms, runs.c.run_id).limit(MAX_RELATED)
    found = [dict(row._mapping) for row in await connection.execute(below)]
    top = (await connection.execute(select(*shown).where(runs.c.run_id == top_id))).one_or_none()
    first = [] if top is None else [dict(top._mapping)]
    known = {row["run_id"] for row in (*first, *found)}
    also = [] if run_id in known else [dict(self._mapping)]
    rows = [*first, *also, *found]
    return Related(rows[:MAX_RELATED], capped=len(rows) > MAX_RELATED)
