"""The audit log: who did what, and what came of it."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.system import AuditQuery, list_audit
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages("Audit", "audit", "a", role="admin")


@pages.get("audit")
async def show(visit: Visit) -> Response:
    """Show a page of it, the latest first."""
    asked = visit.asked(AuditQuery)
    found = await visit.ask(list_audit, query=asked)
    return visit.page("audit.html", asked=asked, found=found)
