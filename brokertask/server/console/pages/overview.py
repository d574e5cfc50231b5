"""The overview: how it is going, at a glance; each number leads to what it counts."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.figures import DeadQuery, list_dead, show_overview
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages("Overview", "", "o")
GROUPS: Final = 8
DAY_MS: Final = 86_400_000


@pages.get("")
async def show(visit: Visit) -> Response:
    """Show it."""
    going = await visit.ask(show_overview)
    lately = DeadQuery(since_ms=visit.now_ms - DAY_MS)
    dead = await visit.ask(list_dead, query=lately)
    return visit.page("overview.html", going=going, groups=dead.groups[:GROUPS])
