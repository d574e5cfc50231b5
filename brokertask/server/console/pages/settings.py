"""Settings: who the visitor is, what he may, and the servers that he may ask."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.system import list_servers, show_me
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages("Settings", "settings", "e")


@pages.get("settings")
async def show(visit: Visit) -> Response:
    """Show them."""
    me, servers = await visit.ask(show_me), await visit.ask(list_servers)
    return visit.page("settings.html", me=me, servers=servers)
