"""What is said to all workers, now and those that start later: cancel a run, pause a task."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel

from brokertask.control import Entry, Kind
from brokertask.events import ENDS
from brokertask.server import history
from brokertask.server.api.operations import Call, Routes, RunId, Strict, TaskId, Text
from brokertask.server.api.problems import Problem

routes: Final = Routes("control")


class Cancellation(Strict):
    """How a run is cancelled."""

    children: bool = False
    """The runs that it has triggered, too."""
    reason: Text = ""
    """Told to the run, and kept in the audit log."""


class Why(Strict):
    """Why it is done."""

    reason: Text = ""
    """For the audit log."""


class Said(BaseModel):
    """What the workers were told."""

    said: Literal["cancel", "pause", "resume"]
    status: str | None
    """Of a run: its status as it was heard of last; null: nothing was."""


@routes.post("/runs/{run_id}/cancel", status=202, problems=("conflict", "broker_unavailable"))
async def cancel_run(call: Call, run_id: RunId, body: Cancellation) -> Said:
    """Cancel a run.

    One that runs is told so and has a while to end; one that waits ends at once; any other when its
    message comes up, at the end of its delay or its sleep.
    """
    async with call.resources.store.read() as connection:
        row = await history.shown(connection, run_id)
    status = None if row is None else str(row["status"])
    if status in ENDS:
        raise Problem("conflict", f"the run has ended as {status}", run_id=run_id)
    await _say(call, "cancel", run_id, reason=body.reason, children=body.children)
    return Said(said="cancel", status=status)


@routes.post("/tasks/{task}/pause", status=202, problems=("broker_unavailable",))
async def pause_task(call: Call, task: TaskId, body: Why) -> Said:
    """Let no worker begin runs of a task; what has begun goes on."""
    await _say(call, "pause", task, reason=body.reason)
    return Said(said="pause", status=None)


@routes.post("/tasks/{task}/resume", status=202, problems=("broker_unavailable",))
async def resume_task(call: Call, task: TaskId, body: Why) -> Said:
    """Let workers begin runs of a task again."""
    await _say(call, "resume", task, reason=body.reason)
    return Said(said="resume", status=None)


async def _say(
    call: Call, kind: Kind, subject: str, *, reason: str, children: bool = False
) -> None:
    entry = Entry(kind=kind, subject=subject, at_ms=call.now_ms, reason=reason, children=children)
    await call.resources.publish(call.resources.names.control_route(), entry.message())
