"""A new job over many runs: what it would act on, and its beginning."""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from starlette.responses import Response

from brokertask.server.api.bulk import NewJob, Selection, preview_bulk, start_bulk
from brokertask.server.api.problems import Problem
from brokertask.server.bulk import Action
from brokertask.server.console.desk import Pages
from brokertask.server.console.html import segment
from brokertask.server.console.visit import Visit

pages: Final = Pages()
FOR_GOOD: Final = ("cancel", "discard")
"""Nothing brings back what these took: who wants one types how many runs they are."""


class Chosen(Selection):
    """Which runs."""

    chosen: Literal["1"] | None = None
    """They were picked one by one; without any, that is not all of them."""

    def until(self, now_ms: int) -> Selection:
        """Return the selection without what is triggered from now on."""
        if self.chosen and not self.run_id:
            raise Problem("invalid", "no run is chosen: mark some in their list first")
        given = self.model_dump(exclude={"chosen"})
        given["until_ms"] = min(now_ms + 1, self.until_ms or now_ms + 1)
        return Selection(**given)


@pages.get("jobs/new/{action}")
async def show(visit: Visit) -> Response:
    """Show what would be done to which runs."""
    return await _form(visit, visit.asked(Chosen).until(visit.now_ms))


@pages.post("jobs/new/{action}")
async def start(visit: Visit) -> Response:
    """Begin it, and lead to the job."""
    visit.check(start_bulk)
    form, action, selection = visit.form, _action(visit), visit.asked(Selection)
    try:
        if action in FOR_GOOD and form.get("typed", "").strip() != form.get("expected"):
            raise Problem("invalid", "type how many runs there are: nothing brings them back")
        body = visit.sent(
            NewJob,
            select=selection.model_dump(exclude_unset=True),
            expected=form.get("expected"),
            rate=form.get("rate") or None,
            reason=form.get("reason", ""),
            **{name: name in form for name in ("children", "forget") if name in form},
        )
        job = await visit.ask(start_bulk, action=action, body=body)
    except Problem as problem:
        if problem.kind not in ("invalid", "conflict"):
            raise
        return await _form(visit, selection, problem)
    return visit.go(f"jobs/{segment(job.id)}", done="start")


async def _form(visit: Visit, selection: Selection, problem: Problem | None = None) -> Response:
    action = _action(visit)
    given: dict[str, Any] = selection.model_dump(exclude_defaults=True)
    return visit.page(
        "many.html",
        status=200 if problem is None else problem.status,
        action=action,
        for_good=action in FOR_GOOD,
        selection=given,
        filters={name: value for name, value in given.items() if name != "run_id"},
        preview=await visit.ask(preview_bulk, action=action, query=selection),
        given=visit.form,
        refused=None if problem is None else problem.view,
    )


def _action(visit: Visit) -> Action:
    for known in get_args(Action):
        if visit.part("action") == known:
            action: Action = known
            return action
    raise Problem("not_found", "there are jobs that cancel, redrive, discard and replay runs")
