"""The workers that were heard of, and an order to one of them: take no more work."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, StringConstraints

from brokertask.control import Entry
from brokertask.server import workers
from brokertask.server.api.control import Why
from brokertask.server.api.operations import PRINTABLE, Call, Routes
from brokertask.server.api.problems import Problem

routes: Final = Routes("workers")
WorkerName: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)
]


class WorkerTask(BaseModel):
    """A task of a worker."""

    task: str
    slots: int
    """How many runs of it at once."""
    busy: int
    """How many it has in hands."""
    paused: bool


class WorkerView(BaseModel):
    """A worker, as it said last."""

    worker: str
    state: str
    """`working`; `draining`: it takes no more work; `stopped`; `silent`: 90 s without a word."""
    host: str
    pid: int
    version: str
    started_ms: int
    seen_ms: int
    slots: int
    busy: int
    tasks: list[WorkerTask]


class Drained(BaseModel):
    """What a worker was told."""

    worker: str
    state: str
    """As it was heard of last."""


@routes.get("/workers")
async def list_workers(call: Call) -> list[WorkerView]:
    """List the workers of the last week, the one that started last first."""
    async with call.resources.store.read() as connection:
        rows = await workers.listed(connection, now_ms=call.now_ms)
    found = []
    for row in rows:
        tasks = [
            WorkerTask(
                task=task,
                slots=int(told.get("slots", 0)),
                busy=int(told.get("busy", 0)),
                paused=bool(told.get("paused")),
            )
            for task, told in sorted(row["tasks"].items())
        ]
        slots, busy = sum(one.slots for one in tasks), sum(one.busy for one in tasks)
        found.append(WorkerView(**{**row, "slots": slots, "busy": busy, "tasks": tasks}))
    return found


@routes.post("/workers/{worker}/drain", status=202, problems=("conflict", "broker_unavailable"))
async def drain_worker(call: Call, worker: WorkerName, body: Why) -> Drained:
    """Have a worker take no more work, until it is started anew; what it has in hands goes on."""
    async with call.resources.store.read() as connection:
        rows = await workers.listed(connection, now_ms=call.now_ms)
    state = next((str(row["state"]) for row in rows if row["worker"] == worker), None)
    if state is None:
        raise Problem("not_found", "nothing was heard of such a worker")
    if state == "stopped":
        raise Problem("conflict", "the worker has stopped")
    entry = Entry(kind="drain", subject=worker, at_ms=call.now_ms, reason=body.reason)
    await call.resources.publish(call.resources.names.control_route(), entry.message())
    return Drained(worker=worker, state=state)
