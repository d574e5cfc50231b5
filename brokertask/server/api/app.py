"""The API as an ASGI application: every operation, behind the gate and the guard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from brokertask.server.api import (
    bulk,
    control,
    details,
    figures,
    results,
    runs,
    schedules,
    system,
    tasks,
    triggers,
    waits,
    why,
    workers,
)
from brokertask.server.api.gate import Gate
from brokertask.server.api.guard import Guard, Rates
from brokertask.server.api.hub import Hub
from brokertask.server.api.openapi import PREFIX, document
from brokertask.server.api.operations import Operation
from brokertask.server.api.problems import Problem
from brokertask.server.api.stream import Stopping
from brokertask.server.resources import Resources

OPERATIONS: Final[tuple[Operation, ...]] = tuple(
    operation
    for module in (
        *(triggers, runs, details, why, results, control, tasks, waits, schedules),
        *(workers, figures, bulk, system),
    )
    for operation in module.routes.operations
)
"""Every operation, in the order of the document."""
REQUESTS_A_SECOND: Final = 100.0
"""Of one token, or of one address without; twice as many at once."""
BODY_SPARE: Final = 65_536


def make_app(
    resources: Resources,
    *,
    open_here: bool,
    hosts: Iterable[str] = (),
    stopping: Stopping | None = None,
    rate: float = REQUESTS_A_SECOND,
) -> ASGIApp:
    """Return the application; it can be mounted below a prefix of another one.

    Args:
        resources: The server's store, broker and clock, open.
        open_here: Let in who has no token, until there was a first one. For loopback only.
        hosts: Host names to answer to, beside those of loopback.
        stopping: Set when streams are to end.
        rate: Requests a second of one caller.
    """
    gate = Gate(
        resources,
        open_here=open_here,
        # As text, a payload takes more room than in msgpack.
        max_body=2 * resources.broker_settings.max_payload_bytes + BODY_SPARE,
        rates=Rates(rate),
        state={Hub: Hub(resources), Stopping: stopping or Stopping()},
    )
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(PREFIX + operation.path, {})[operation.method] = operation
    routes = [_route(gate, path, by_method) for path, by_method in by_path.items()]
    routes.append(Route(f"{PREFIX}/openapi.json", _openapi, methods=["GET"]))
    routes.append(Route("/healthz", _health, methods=["GET"]))
    inner = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _refuse, Exception: _fail},
    )
    inner.router.redirect_slashes = False
    return Guard(_AsWritten(inner), hosts=hosts)


class _AsWritten:
    """Routes by the path as it was written, so that a part of it may hold an encoded slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path")
        if scope["type"] == "http" and raw is not None:
            scope = {**scope, "path": raw.partition(b"?")[0].decode("latin-1")}
        await self._app(scope, receive, send)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    return document(OPERATIONS)


def _route(gate: Gate, path: str, by_method: Mapping[str, Operation]) -> Route:
    async def serve(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await gate.serve(by_method[method], request)

    return Route(path, serve, methods=list(by_method))


async def _openapi(request: Request) -> Response:
    return Response(json.dumps(openapi()), media_type="application/json")


async def _health(request: Request) -> Response:
    return Response("{}", media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        problem = Problem("method_not_allowed", f"{request.method} is none of it", headers=allowed)
    elif error.status_code == 404:
        problem = Problem("not_found", "there is nothing at this path; see /api/v1/openapi.json")
    else:
        problem = Problem("malformed", str(error.detail))
    return problem.response()


async def _fail(request: Request, error: Exception) -> Response:
    return Problem("internal", "it is in the server's log").response()
