"""The inside of a run: its steps, its log, and the runs that it is related to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from starlette.responses import Response

from brokertask.server.api.details import (
    RelatedRun,
    list_lines,
    list_step_results,
    list_steps,
    show_tree,
)
from brokertask.server.api.paging import PageQuery
from brokertask.server.api.runs import show_run
from brokertask.server.console import html
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages()
STEPS: Final = 100
LINES: Final = 500


@pages.get("runs/{run_id}/steps")
async def show_steps(visit: Visit) -> Response:
    """Show its finished steps."""
    run_id, query = visit.part("run_id"), _query(visit, STEPS)
    found = await visit.ask(list_steps, run_id=run_id, query=query)
    run = await visit.ask(show_run, run_id=run_id)
    return visit.page("run-steps.html", run=run, steps=found.items, more=found.next, results=None)


@pages.get("runs/{run_id}/steps/results")
async def show_results(visit: Visit) -> Response:
    """Show them with what they returned; each time it is written down."""
    run_id, query = visit.part("run_id"), _query(visit, STEPS)
    found = await visit.ask(list_step_results, run_id=run_id, query=query)
    run = await visit.ask(show_run, run_id=run_id)
    results = [html.block(step.result)[0] for step in found.items]
    return visit.page(
        "run-steps.html", run=run, steps=found.items, more=found.next, results=results
    )


@pages.get("runs/{run_id}/logs")
async def show_log(visit: Visit) -> Response:
    """Show the lines of its log."""
    run_id, query = visit.part("run_id"), _query(visit, LINES)
    found = await visit.ask(list_lines, run_id=run_id, query=query)
    run = await visit.ask(show_run, run_id=run_id)
    return visit.page("run-log.html", run=run, lines=found.items, more=found.next, query=query)


@pages.get("runs/{run_id}/related")
async def show_related(visit: Visit) -> Response:
    """Show the tree that it is in."""
    run_id = visit.part("run_id")
    tree = await visit.ask(show_tree, run_id=run_id)
    run = await visit.ask(show_run, run_id=run_id)
    return visit.page("run-related.html", run=run, rows=depths(tree.runs), capped=tree.capped)


def depths(runs: Sequence[RelatedRun]) -> list[tuple[int, RelatedRun]]:
    """Return runs in the order of their tree, each with its depth; parents may be missing."""
    known = {run.run_id for run in runs}
    below: dict[str | None, list[RelatedRun]] = defaultdict(list)
    for run in reversed(runs):
        below[run.parent if run.parent in known and run.parent != run.run_id else None].append(run)
    left = [(0, run) for run in below[None]]
    found: list[tuple[int, RelatedRun]] = []
    while left:
        depth, run = left.pop()
        found.append((depth, run))
        left += [(depth + 1, child) for child in below[run.run_id]]
    return found


def _query(visit: Visit, limit: int) -> PageQuery:
    return visit.asked(PageQuery).model_copy(update={"limit": limit})
