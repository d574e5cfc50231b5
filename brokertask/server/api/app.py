"""The API as an ASGI application: every operation, behind the gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from brokertask.server.api import (
    beginnings,
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
from brokertask.server.api.guard import Rates
from brokertask.server.api.hub import Hub
from brokertask.server.api.openapi import document
from brokertask.server.api.operations import Operation
from brokertask.server.api.problems import Problem
from brokertask.server.api.stream import Stopping
from brokertask.server.resources import Resources

OPERATIONS: Final[tuple[Operation, ...]] = tuple(
    operation
    for module in (
        *(triggers, runs, beginnings, details, why, results, control, tasks, waits, schedules),
        *(workers, figures, bulk, system),
    )
    for operation in module.routes.operations
)
"""Every operation, in the order of the document."""
BODY_SPARE: Final = 65_536


def make_gate(
    resources: Resources, *, open_here: bool, stopping: Stopping | None, rate: float
) -> Gate:
    """Return the gate in front of every operation.

    Args:
        resources: The server's store, broker and clock, open.
        open_here: Let in who has no token, until there was a first one. For loopback only.
        stopping: Set when streams are to end.
        rate: Requests a second of one caller.
    """
    return Gate(
        resources,
        open_here=open_here,
        # As text, a payload takes more room than in msgpack.
        max_body=2 * resources.broker_settings.max_payload_bytes + BODY_SPARE,
        rates=Rates(rate),
        state={Hub: Hub(resources), Stopping: stopping or Stopping()},
    )


def make_api(gate: Gate) -> ASGIApp:
    """Return the application, for a mount at `PREFIX`."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    routes = [_route(gate, path, by_method) for path, by_method in by_path.items()]
    routes.append(Route("/openapi.json", _openapi, methods=["GET"]))
    inner = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _refuse, Exception: _fail},
    )
    inner.router.redirect_slashes = False
    return inner


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
