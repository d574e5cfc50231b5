"""Dead letters: dead runs by kind of error, and what is done to all of a kind."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field
from starlette.responses import Response

from brokertask.server.api.bulk import NewJob, Selection, preview_bulk, start_bulk
from brokertask.server.api.figures import DeadQuery, GroupView, list_dead
from brokertask.server.api.operations import Strict
from brokertask.server.api.paging import Cursor
from brokertask.server.api.problems import Problem
from brokertask.server.api.runs import RunsQuery, list_runs
from brokertask.server.api.tasks import list_tasks
from brokertask.server.bulk import Action
from brokertask.server.console.desk import Pages
from brokertask.server.console.html import segment
from brokertask.server.console.pages.runs import WINDOWS, Within
from brokertask.server.console.visit import Visit
from brokertask.values import LAST_INSTANT_MS

pages: Final = Pages("Dead letters", "dead", "d")
PER_PAGE: Final = 50
UNTOLD: Final = "-"
"""In the place of a fingerprint: of runs that are dead without an error."""


class Asked(Strict):
    """Which groups."""

    task: str | None = None
    within: Within | None = None
    """Died since so long before now."""


class Seen(Strict):
    """Which page of a group, and until when its runs were triggered."""

    cursor: Cursor | None = None
    as_of: int | None = Field(default=None, ge=0, le=LAST_INSTANT_MS)


@pages.get("dead")
async def show(visit: Visit) -> Response:
    """Show the groups."""
    asked = visit.asked(Asked)
    since_ms = visit.now_ms - WINDOWS[asked.within] if asked.within else 0
    query = DeadQuery.model_validate({"task": asked.task, "since_ms": since_ms})
    return visit.page(
        "dead.html",
        asked=asked,
        dead=await visit.ask(list_dead, query=query),
        tasks=[each.task for each in await visit.ask(list_tasks)],
        windows=WINDOWS,
    )


@pages.get("dead/{task}/{fingerprint}")
async def show_group(visit: Visit) -> Response:
    """Show the runs of a group, and what can be done to them."""
    return await _group(visit, visit.asked(Seen))


@pages.post("dead/{task}/{fingerprint}/redrive")
async def redrive(visit: Visit) -> Response:
    """Have all that were shown begin again, so many a second."""
    form = visit.form
    return await _start(
        visit, "redrive", {"rate": form.get("rate") or None, "forget": "forget" in form}
    )


@pages.post("dead/{task}/{fingerprint}/discard")
async def discard(visit: Visit) -> Response:
    """Discard all that were shown, for a reason."""
    return await _start(visit, "discard", {})


async def _start(visit: Visit, action: Action, values: dict[str, Any]) -> Response:
    visit.check(start_bulk)
    form = visit.form
    try:
        if action == "discard" and not form.get("reason", "").strip():
            raise Problem("invalid", "say why they are discarded: nothing brings them back")
        seen = visit.sent(Seen, as_of=form.get("as_of"))
        body = visit.sent(
            NewJob,
            select=_selected(visit, seen),
            expected=form.get("expected"),
            reason=form.get("reason", ""),
            **values,
        )
        job = await visit.ask(start_bulk, action=action, body=body)
    except Problem as problem:
        if problem.kind not in ("invalid", "conflict"):
            raise
        return await _group(visit, Seen(), problem)
    return visit.go(f"jobs/{segment(job.id)}", done="start")


async def _group(visit: Visit, seen: Seen, problem: Problem | None = None) -> Response:
    """Show what is dead now; what dies later is not touched by what is done on this page."""
    task, whole = visit.part("task"), _selected(visit, seen)
    these = {**whole, "status": ["failed"], "discarded": False}
    query = RunsQuery.model_validate({**these, "limit": PER_PAGE, "cursor": seen.cursor})
    found = await visit.ask(list_runs, query=query)
    newest = max((run.triggered_ms for run in found.items), default=0)
    as_of = seen.as_of or max(visit.now_ms, newest)
    frozen = Selection.model_validate(_selected(visit, Seen(as_of=as_of)))
    preview = await visit.ask(preview_bulk, action="redrive", query=frozen)
    dead = await visit.ask(list_dead, query=DeadQuery(task=task))
    return visit.page(
        "dead-group.html",
        status=200 if problem is None else problem.status,
        base=_base(visit),
        task=task,
        group=_of(dead.groups, whole["fingerprint"]),
        runs=found.items,
        older=found.next,
        seen=seen,
        as_of=as_of,
        preview=preview,
        given=visit.form,
        refused=None if problem is None else problem.view,
    )


def _selected(visit: Visit, seen: Seen) -> dict[str, Any]:
    fingerprint = visit.part("fingerprint")
    return {
        "task": visit.part("task"),
        "fingerprint": "" if fingerprint == UNTOLD else fingerprint,
        "until_ms": None if seen.as_of is None else seen.as_of + 1,
    }


def _of(groups: list[GroupView], fingerprint: str) -> GroupView | None:
    return next((each for each in groups if (each.fingerprint or "") == fingerprint), None)


def _base(visit: Visit) -> str:
    return f"dead/{segment(visit.part('task'))}/{segment(visit.part('fingerprint'))}"
