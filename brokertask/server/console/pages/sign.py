"""Signing in with an API token, and out."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response

from brokertask.server.api.auth import principal_of
from brokertask.server.api.gate import NOBODY
from brokertask.server.console import sessions
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit

pages: Final = Pages()


@pages.get("sign-in", public=True)
async def show(visit: Visit) -> Response:
    """Ask for a token."""
    if visit.principal is not NOBODY:
        return visit.go("")
    wanted = visit.request.query_params.get("next", "")
    return visit.page("sign-in.html", wanted=wanted, refused=False)


@pages.post("sign-in", public=True)
async def sign_in(visit: Visit) -> Response:
    """Begin a session, with a secret of its own: one from before may be known to somebody."""
    wanted = visit.form.get("next", "")
    authorization = f"Bearer {visit.form.get('token', '').strip()}"
    async with visit.gate.resources.store.begin() as connection:
        principal = await principal_of(connection, authorization, now_ms=visit.now_ms)
        if principal is None or principal.token is None:
            return visit.page("sign-in.html", status=401, wanted=wanted, refused=True)
        secret = await sessions.begin(connection, principal.token, now_ms=visit.now_ms)
    response = visit.go(_inside(wanted))
    sessions.keep(response, secret, visit.request)
    return response


@pages.post("sign-out")
async def sign_out(visit: Visit) -> Response:
    """End the session."""
    secret = sessions.secret_of(visit.request)
    if secret is not None:
        async with visit.gate.resources.store.begin() as connection:
            await sessions.end(connection, secret)
    response = visit.go("sign-in")
    sessions.keep(response, sessions.new_secret(), visit.request)
    return response


def _inside(wanted: str) -> str:
    """Return a path inside the console, for one that anybody may have made up."""
    path = wanted.lstrip("/\\")
    return path if path.isascii() and path.isprintable() and ":" not in path.split("?")[0] else ""
