"""Tasks that something was heard of, and their queues."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, JsonValue

from brokertask.server import catalog, figures, history
from brokertask.server.api.operations import Call, Routes, TaskId
from brokertask.server.api.problems import Problem
from brokertask.server.control import paused
from brokertask.transport.base import Depth

routes: Final = Routes("tasks")
AT_ONCE: Final = 8


class TaskView(BaseModel):
    """A task."""

    task: str
    paused: bool
    """No worker begins runs of it."""


class TaskDetail(TaskView):
    """A task, and what its workers say of it."""

    payload_schema: JsonValue
    """JSON Schema of what it takes; null: no worker has told, or JSON has nothing like it."""
    result_schema: JsonValue


class QueueView(BaseModel):
    """A queue on the broker."""

    queue: str
    task: str | None
    """Whose it is; null: it is the servers' own."""
    kind: str
    """`work`: runs that wait for a worker. `dead`: dead runs. `intake`: triggers in front of a
    bounded queue. `server`: what servers are asked for. `unrouted`: what had no target."""
    ready: int
    """Messages that wait in it; what workers hold is not among them."""
    consumers: int
    oldest_ms: int | None = None
    """Of `work`: when the run was triggered that waits the longest, as history has it."""


@routes.get("/tasks")
async def list_tasks(call: Call) -> list[TaskView]:
    """List the tasks that something was heard of."""
    async with call.resources.store.read() as connection:
        held = await paused(connection)
        return [
            TaskView(task=task, paused=task in held) for task in await history.tasks(connection)
        ]


@routes.get("/tasks/{task}")
async def show_task(call: Call, task: TaskId) -> TaskDetail:
    """Show a task, with the JSON Schemas of payload and result."""
    async with call.resources.store.read() as connection:
        schemas = await catalog.schemas_of(connection, task)
        held = await paused(connection)
    if schemas is None:
        raise Problem("not_found", "nothing was heard of such a task")
    return TaskDetail(
        task=task,
        paused=task in held,
        payload_schema=schemas.get("payload"),
        result_schema=schemas.get("result"),
    )


@routes.get("/queues", problems=("broker_unavailable",))
async def list_queues(call: Call) -> list[QueueView]:
    """List the queues of these tasks and of the servers, as the broker has them now."""
    names = call.resources.names
    async with call.resources.store.read() as connection:
        tasks = await history.tasks(connection)
        oldest = await figures.oldest(connection, tasks)
    wanted: list[tuple[str, str | None, str]] = []
    for task in tasks:
        wanted.append((names.queue(task), task, "work"))
        wanted.append((names.intake(task), task, "intake"))
        wanted.append((names.dead_queue(task), task, "dead"))
    wanted.append((names.unrouted, None, "unrouted"))
    parts = ("events", "triggers", "waits", "admissions", "asks")
    wanted += [(f"{names.server}.{name}", None, "server") for name in parts]
    depths = await _depths(call, [queue for queue, _, _ in wanted])
    return [
        QueueView(
            queue=queue,
            task=task,
            kind=kind,
            ready=depth.ready,
            consumers=depth.consumers,
            oldest_ms=oldest.get(task or "") if kind == "work" else None,
        )
        for (queue, task, kind), depth in zip(wanted, depths, strict=True)
        if depth is not None
    ]


async def _depths(call: Call, queues: Iterable[str]) -> list[Depth | None]:
    room = asyncio.Semaphore(AT_ONCE)

    async def depth(queue: str) -> Depth | None:
        async with room:
            return await call.resources.transport.depth(queue)

    return list(await asyncio.gather(*(depth(queue) for queue in queues)))
