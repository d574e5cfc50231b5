"""Schedules: when each is due, what became of its ticks, and what is done to it."""

from __future__ import annotations

from functools import partial
from typing import Final

from starlette.responses import Response

from brokertask.server.api.paging import Page, PageQuery
from brokertask.server.api.schedules import (
    ScheduleView,
    delete_schedule,
    list_schedules,
    pause_schedule,
    resume_schedule,
    run_schedule,
    show_schedule,
)
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.console.changes import changes
from brokertask.server.console.desk import Pages
from brokertask.server.console.html import segment
from brokertask.server.console.visit import Visit

pages: Final = Pages("Schedules", "schedules", "s")
EVERY: Final = 5.0
"""Seconds between two looks, for each page that is open."""


@pages.get("schedules")
async def show_all(visit: Visit) -> Response:
    """Show them."""
    asked = visit.asked(PageQuery)
    return visit.page("schedules.html", asked=asked, found=await _look(visit))


@pages.get("live/schedules")
async def follow(visit: Visit) -> Response:
    """Tell that one has changed, or has had a tick."""
    parts = changes(partial(_look, visit), every=EVERY)
    return Stream(parts, visit.call.state[Stopping])


@pages.get("schedules/{name}")
async def show(visit: Visit) -> Response:
    """Show one: when it is due next, and what became of its ticks."""
    found = await visit.ask(show_schedule, name=visit.part("name"))
    return visit.page("schedule.html", schedule=found)


@pages.post("schedules/{name}/pause")
async def pause(visit: Visit) -> Response:
    """Let no tick run from now on."""
    name = visit.part("name")
    await visit.ask(pause_schedule, name=name)
    return visit.go(f"schedules/{segment(name)}", done="pause")


@pages.post("schedules/{name}/resume")
async def resume(visit: Visit) -> Response:
    """Go on with the next tick."""
    name = visit.part("name")
    await visit.ask(resume_schedule, name=name)
    return visit.go(f"schedules/{segment(name)}", done="resume")


@pages.post("schedules/{name}/run")
async def run(visit: Visit) -> Response:
    """Trigger a run beside the ticks, and lead to it."""
    began = await visit.ask(run_schedule, name=visit.part("name"))
    return visit.go(f"runs/{segment(began.run_id)}")


@pages.post("schedules/{name}/delete")
async def delete(visit: Visit) -> Response:
    """Delete one that was made at run time."""
    await visit.ask(delete_schedule, name=visit.part("name"))
    return visit.go("schedules", done="delete")


async def _look(visit: Visit) -> Page[ScheduleView]:
    return await visit.ask(list_schedules, query=visit.asked(PageQuery))
