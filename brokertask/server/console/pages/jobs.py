"""Jobs over many runs: which there are, how far one is, and its end before its time."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.bulk import (
    ItemsQuery,
    JobView,
    Why,
    abort_bulk,
    list_bulk,
    list_bulk_items,
    show_bulk,
)
from brokertask.server.api.operations import Strict
from brokertask.server.api.paging import Cursor, Page, PageQuery
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.bulk import STATES, State
from brokertask.server.console.changes import changes
from brokertask.server.console.desk import Pages
from brokertask.server.console.html import segment
from brokertask.server.console.visit import Visit

pages: Final = Pages("Bulk jobs", "jobs", "b")
PER_PAGE: Final = 50
EVERY: Final = 0.5
"""Seconds between two looks at a job that goes on."""


class Seen(Strict):
    """Which page of jobs, or of the runs of one."""

    cursor: Cursor | None = None
    state: State | None = None


@pages.get("jobs")
async def show_all(visit: Visit) -> Response:
    """Show the jobs, the latest first."""
    seen = visit.asked(Seen)
    found = await _latest(visit, seen.cursor)
    return visit.page("jobs.html", jobs=found.items, older=found.next, seen=seen)


@pages.get("jobs/{job}")
async def show(visit: Visit) -> Response:
    """Show a job, and what became of each of its runs."""
    job, seen = visit.part("job"), visit.asked(Seen)
    shown = await visit.ask(show_bulk, job=job)
    query = ItemsQuery(state=seen.state, cursor=seen.cursor, limit=PER_PAGE)
    items = await visit.ask(list_bulk_items, job=job, query=query)
    return visit.page(
        "job.html", job=shown, items=items.items, more=items.next, seen=seen, states=STATES
    )


@pages.post("jobs/{job}/abort")
async def abort(visit: Visit) -> Response:
    """Stop a job."""
    job, why = visit.part("job"), visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(abort_bulk, job=job, body=why)
    return visit.go(f"jobs/{segment(job)}", done="abort")


@pages.get("live/jobs")
async def follow_all(visit: Visit) -> Response:
    """Tell that one of the latest jobs is further."""

    async def look() -> Page[JobView]:
        return await _latest(visit, None)

    return Stream(changes(look, every=EVERY), visit.call.state[Stopping])


@pages.get("live/jobs/{job}")
async def follow(visit: Visit) -> Response:
    """Tell that a job is further, until it has ended."""
    job = visit.part("job")

    async def look() -> JobView:
        return await visit.ask(show_bulk, job=job)

    parts = changes(look, every=EVERY, over=lambda one: one.ended_ms is not None)
    return Stream(parts, visit.call.state[Stopping])


async def _latest(visit: Visit, cursor: str | None) -> Page[JobView]:
    return await visit.ask(list_bulk, query=PageQuery(limit=PER_PAGE, cursor=cursor))
