"""Workers: who is there, what each has in hands, and the order to take no more."""

from __future__ import annotations

from functools import partial
from typing import Final

from starlette.responses import Response

from brokertask.server.api.control import Why
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.api.workers import drain_worker, list_workers
from brokertask.server.console.changes import changes
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages("Workers", "workers", "k")
EVERY: Final = 2.0
"""Seconds between two looks, for each page that is open."""


@pages.get("workers")
async def show(visit: Visit) -> Response:
    """Show those of the last week."""
    return visit.page("workers.html", workers=await visit.ask(list_workers))


@pages.get("live/workers")
async def follow(visit: Visit) -> Response:
    """Tell that one has come, gone, or said something."""
    parts = changes(partial(visit.ask, list_workers), every=EVERY)
    return Stream(parts, visit.call.state[Stopping])


@pages.post("workers/{worker}/drain")
async def drain(visit: Visit) -> Response:
    """Have one take no more work, until it is started anew."""
    why = visit.sent(Why, reason=visit.form.get("reason", ""))
    await visit.ask(drain_worker, worker=visit.part("worker"), body=why)
    return visit.go("workers", done="drain")
