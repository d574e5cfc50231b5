"""Tasks: how each did of late, what it takes, and a form to trigger it."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.control import Why, pause_task, resume_task
from brokertask.server.api.figures import (
    DeadQuery,
    WindowQuery,
    list_dead,
    list_figures,
    show_figures,
)
from brokertask.server.api.problems import Problem
from brokertask.server.api.runs import RunsQuery, list_runs
from brokertask.server.api.tasks import list_tasks, show_task
from brokertask.server.api.triggers import NewRun, trigger_run
from brokertask.server.console import html
from brokertask.server.console.desk import Pages
from brokertask.server.console.forms import fields, payload_of
from brokertask.server.console.html import segment
from brokertask.server.console.visit import Visit

pages: Final = Pages("Tasks", "tasks", "t")
DAY: Final = WindowQuery()
RECENT: Final = 10


@pages.get("tasks")
async def show_all(visit: Visit) -> Response:
    """Show the tasks."""
    figures = {each.task: each for each in await visit.ask(list_figures, query=DAY)}
    return visit.page("tasks.html", tasks=await visit.ask(list_tasks), figures=figures)


@pages.get("tasks/{task}")
async def show(visit: Visit) -> Response:
    """Show a task."""
    return await _page(visit)


@pages.post("tasks/{task}/trigger")
async def trigger(visit: Visit) -> Response:
    """Trigger a run as the form says, and lead to it; or show the form again, and what is wrong."""
    task, form = visit.part("task"), visit.form
    known = await visit.ask(show_task, task=task)
    try:
        wanted = visit.sent(
            NewRun,
            payload=payload_of(fields(known.payload_schema), form),
            delay=form.get("delay") or 0.0,
            tags=[tag for tag in form.get("tags", "").split() if tag],
            idempotency_key=form.get("key") or None,
        )
        began = await visit.ask(trigger_run, task=task, body=wanted)
    except Problem as problem:
        return await _page(visit, problem)
    return visit.go(f"runs/{segment(began.run_id)}")


@pages.post("tasks/{task}/pause")
async def pause(visit: Visit) -> Response:
    """Let no worker begin runs of it."""
    task, why = visit.part("task"), visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(pause_task, task=task, body=why)
    return visit.go(f"tasks/{segment(task)}", done="pause")


@pages.post("tasks/{task}/resume")
async def resume(visit: Visit) -> Response:
    """Let workers begin runs of it again."""
    task, why = visit.part("task"), visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(resume_task, task=task, body=why)
    return visit.go(f"tasks/{segment(task)}", done="resume")


async def _page(visit: Visit, problem: Problem | None = None) -> Response:
    task = visit.part("task")
    known = await visit.ask(show_task, task=task)
    recent = await visit.ask(list_runs, query=RunsQuery(task=task, limit=RECENT))
    dead = await visit.ask(list_dead, query=DeadQuery(task=task))
    return visit.page(
        "task.html",
        status=200 if problem is None else problem.status,
        task=known,
        figures=await visit.ask(show_figures, task=task, query=DAY),
        fields=fields(known.payload_schema),
        given=visit.form,
        refused=None if problem is None else problem.view,
        runs=recent.items,
        groups=dead.groups,
        takes=html.block(known.payload_schema),
        returns=html.block(known.result_schema),
    )
