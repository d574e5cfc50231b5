"""The console as an ASGI application: every page, behind the desk."""

from __future__ import annotations

from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from brokertask import __version__
from brokertask.server.api.gate import Gate
from brokertask.server.api.problems import Problem
from brokertask.server.console.desk import Desk, Page, Pages
from brokertask.server.console.html import environment
from brokertask.server.console.pages import (
    again,
    audit,
    dead,
    inside,
    jobs,
    many,
    overview,
    queues,
    run,
    runs,
    schedules,
    settings,
    sign,
    tasks,
    waits,
    workers,
)
from brokertask.server.console.static import Static

SECTIONS: Final[tuple[Pages, ...]] = tuple(
    module.pages
    for module in (
        *(overview, runs, run, inside, again, tasks, queues, dead, jobs, many),
        *(waits, schedules, workers, audit, settings, sign),
    )
)
"""Every page, in the order of the navigation."""


def make_console(gate: Gate, *, trace_url: str | None = None) -> ASGIApp:
    """Return the application, for a mount beside the API.

    Args:
        gate: The gate in front of the operations that pages ask.
        trace_url: Where a trace is shown, with `{trace_id}` in it.
    """
    static = Static()
    frame = {
        "sections": [each for each in SECTIONS if each.title is not None],
        "assets": f"static/{static.version}",
        "version": __version__,
        "trace_url": trace_url,
    }
    desk = Desk(gate, environment(), frame)

    async def asset(request: Request) -> Response:
        given = request.path_params
        try:
            return static.response(given["version"], given["name"])
        except Problem as problem:
            return problem.response()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = dict(error.headers or {})
            problem = Problem("method_not_allowed", "it is not for that", headers=allowed)
        elif error.status_code == 404:
            problem = Problem("not_found", "there is no such page")
        else:
            problem = Problem("malformed", str(error.detail))
        return await desk.refuse(request, problem)

    async def fail(request: Request, error: Exception) -> Response:
        return await desk.refuse(request, Problem("internal", "it is in the server's log"))

    routes = [_route(desk, page) for section in SECTIONS for page in section.list]
    routes.append(Route("/static/{version}/{name}", asset, methods=["GET"]))
    inner = Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: fail})
    inner.router.redirect_slashes = False
    return inner


def _route(desk: Desk, page: Page) -> Route:
    async def serve(request: Request) -> Response:
        return await desk.serve(page, request)

    return Route(f"/{page.path}", serve, methods=[page.method])
