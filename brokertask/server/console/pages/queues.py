"""Queues: how much waits for each task, how long, and what holds it up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from starlette.responses import Response

from brokertask.server.api.control import Why, pause_task, resume_task
from brokertask.server.api.runs import CountsView, Selected, count_runs
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.api.tasks import QueueView, list_queues, list_tasks
from brokertask.server.api.workers import list_workers
from brokertask.server.console.changes import changes
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages("Queues", "queues", "q")
EVERY: Final = 2.0
"""Seconds between two looks at the broker, for each page that is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The queues of one task."""

    task: str
    paused: bool
    work: QueueView | None
    """None: the broker has none, as no worker of it was ever there."""
    intake: int
    """Triggers in front of a bounded queue."""
    dead: int
    later: CountsView
    """Runs whose time has not come."""
    workers: int
    """Those that take its runs."""
    slots: int
    busy: int

    @property
    def limited_by(self) -> str:
        """What keeps the next run from beginning, or nothing."""
        if self.paused:
            return "paused"
        if not self.workers:
            return "no worker"
        if self.busy >= self.slots:
            return "every slot is busy"
        return ""


@pages.get("queues")
async def show(visit: Visit) -> Response:
    """Show them."""
    rows, others = await _look(visit)
    return visit.page("queues.html", rows=rows, others=others)


@pages.get("live/queues")
async def follow(visit: Visit) -> Response:
    """Tell that a queue has changed."""
    parts = changes(partial(_look, visit), every=EVERY)
    return Stream(parts, visit.call.state[Stopping])


@pages.post("queues/{task}/pause")
async def pause(visit: Visit) -> Response:
    """Let no worker begin runs of its task."""
    why = visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(pause_task, task=visit.part("task"), body=why)
    return visit.go("queues", done="pause")


@pages.post("queues/{task}/resume")
async def resume(visit: Visit) -> Response:
    """Let workers begin runs of its task again."""
    why = visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(resume_task, task=visit.part("task"), body=why)
    return visit.go("queues", done="resume")


async def _look(visit: Visit) -> tuple[list[Row], list[QueueView]]:
    """Return the queues of tasks, and those of the servers."""
    queues = await visit.ask(list_queues)
    known = {(queue.task, queue.kind): queue for queue in queues}
    working = [one for one in await visit.ask(list_workers) if one.state == "working"]
    found = []
    for task in await visit.ask(list_tasks):
        intake, dead = known.get((task.task, "intake")), known.get((task.task, "dead"))
        told = [of for one in working for of in one.tasks if of.task == task.task]
        later = Selected(task=task.task, status=["delayed", "retrying", "sleeping"])
        found.append(
            Row(
                task=task.task,
                paused=task.paused,
                work=known.get((task.task, "work")),
                intake=0 if intake is None else intake.ready,
                dead=0 if dead is None else dead.ready,
                later=await visit.ask(count_runs, query=later),
                workers=len(told),
                slots=sum(of.slots for of in told),
                busy=sum(of.busy for of in told),
            )
        )
    return found, [queue for queue in queues if queue.task is None]
