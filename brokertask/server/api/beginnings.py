"""When a run was begun."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

from brokertask.server import details
from brokertask.server.api.operations import Call, Routes, RunId

routes: Final = Routes("runs")


class BeginningView(BaseModel):
    """A worker has begun with a run, or gone on with it."""

    redrives: int
    attempt: int
    worker: str
    began_ms: int


@routes.get("/runs/{run_id}/beginnings")
async def list_beginnings(call: Call, run_id: RunId) -> list[BeginningView]:
    """List when a run was begun: each attempt, and again after what it slept or waited for.

    The latest 1,000, in their order. Workers tell of them without waiting for an answer, so some
    may be missing.
    """
    async with call.resources.store.read() as connection:
        rows = await details.beginnings_of(connection, run_id)
    return [BeginningView.model_validate(row) for row in rows]
