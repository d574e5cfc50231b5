"""From a request to an operation's handler and back: who asks, is it allowed, is it well-formed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from brokertask.errors import BrokertaskError, EnvelopeError
from brokertask.identity import uuid7
from brokertask.server.api import audit
from brokertask.server.api.auth import (
    LOCAL,
    USED_EVERY_MS,
    Principal,
    closed,
    note_use,
    principal_of,
)
from brokertask.server.api.guard import Rates, read_body
from brokertask.server.api.operations import Call, Operation
from brokertask.server.api.problems import Problem, invalid_values, problem_of
from brokertask.server.resources import Resources
from brokertask.values import JSON, clip, decode, kind_of

log = logging.getLogger("brokertask.server")

MAX_TARGET: Final = 300
NOBODY: Final = Principal("callback", "viewer", payloads=False)
"""Who comes with a secret in the path, and with nothing else."""


class Gate:
    """Lets requests in.

    Args:
        resources: What handlers get.
        open_here: Whether the address is one of loopback, open until there is a first token.
        max_body: Bytes of a body.
        rates: How often anybody may ask.
        state: What handlers share beside.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        open_here: bool,
        max_body: int,
        rates: Rates,
        state: Mapping[type[Any], Any],
    ) -> None:
        self._resources = resources
        self._open_here = open_here
        self._max_body = max_body
        self._rates = rates
        self._state = state
        self._noted_ms: dict[str, int] = {}

    async def serve(self, operation: Operation, request: Request) -> Response:
        """Return the answer to a request: of the handler, or a problem."""
        try:
            return await self._serve(operation, request)
        except Problem as problem:
            return problem.response()
        except BrokertaskError as error:
            told = problem_of(error)
            if told.status == 503:
                log.warning("%s: %s", operation.name, error)
            return told.response()

    async def _serve(self, operation: Operation, request: Request) -> Response:
        address = request.client.host if request.client else "unknown"
        principal = await self._principal(operation, request, address)
        if not principal.may(operation.role) and not operation.public:
            raise Problem(
                "forbidden", f"it takes the role {operation.role}; this token is a {principal.role}"
            )
        if operation.reveals and not principal.payloads:
            raise Problem("forbidden", "it takes the right to see payloads, which this token lacks")
        given = _path_values(operation, request)
        if operation.query is not None:
            given["query"] = _query(operation.query, request)
        if operation.body is not None:
            given["body"] = await self._body(operation.body, request)
        call = Call(request, self._resources, principal, self._state)
        if not operation.audited:
            return await _answer(operation, call, given)
        return await self._audited(operation, call, given, address)

    async def _principal(self, operation: Operation, request: Request, address: str) -> Principal:
        """Return who asks. Each is let in only so often: a token, or an address without one."""
        if operation.public:
            self._rates.take(address)
            return NOBODY
        authorization = request.headers.get("authorization")
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.read() as connection:
            principal = await principal_of(connection, authorization, now_ms=now_ms)
            if principal is None and authorization is None and self._open_here:
                principal = None if await closed(connection) else LOCAL
        self._rates.take(address if principal is None else principal.token or address)
        if principal is None:
            raise Problem(
                "unauthenticated",
                "send `Authorization: Bearer` and a token that was neither revoked nor has "
                "expired; `brokertask tokens create` makes one",
                headers={"www-authenticate": 'Bearer realm="brokertask"'},
            )
        await self._note(principal, now_ms)
        return principal

    async def _note(self, principal: Principal, now_ms: int) -> None:
        """Write that a token is in use, once a minute: any more, and each reader would write."""
        token = principal.token
        if token is None or now_ms - self._noted_ms.get(token, 0) < USED_EVERY_MS:
            return
        self._noted_ms[token] = now_ms
        async with self._resources.store.begin() as connection:
            await note_use(connection, token, now_ms=now_ms)

    async def _body(self, model: type[BaseModel], request: Request) -> BaseModel:
        kind = kind_of(request.headers.get("content-type", ""))
        if kind != JSON:
            raise Problem(
                "unsupported_media_type", f"the content type is {JSON}, not {clip(kind, 80)!r}"
            )
        content = await read_body(request, self._max_body)
        try:
            value = decode(content, JSON)
        except EnvelopeError as error:
            raise Problem("malformed", f"the body is not what is read here: {error}") from None
        return _validated(model, value, "body")

    async def _audited(
        self, operation: Operation, call: Call, given: Mapping[str, Any], address: str
    ) -> Response:
        """Make a call that is written down first: what nobody can look up later is not done."""
        identity = uuid7(call.now_ms)
        target = " ".join(str(given[name]) for name in operation.path_types) or "-"
        reason = getattr(given.get("body"), "reason", None)
        async with self._resources.store.begin() as connection:
            await audit.begin(
                connection,
                call.principal,
                identity=identity,
                action=operation.name,
                target=clip(_hidden(operation, target), MAX_TARGET),
                reason=reason,
                address=address,
                now_ms=call.now_ms,
            )
        status = 500
        try:
            response = await _answer(operation, call, given)
            status = response.status_code
        except Problem as problem:
            status = problem.status
            raise
        except BrokertaskError as error:
            status = problem_of(error).status
            raise
        finally:
            async with self._resources.store.begin() as connection:
                await audit.end(connection, identity, status)
        return response


def _hidden(operation: Operation, target: str) -> str:
    return "-" if operation.public else target


async def _answer(operation: Operation, call: Call, given: Mapping[str, Any]) -> Response:
    value = await operation.handler(call, **given)
    if isinstance(value, Response):
        return value
    if operation.answer is None:
        return Response(status_code=operation.status)
    content = operation.answer.dump_json(value, by_alias=True)
    return Response(content, operation.status, media_type=JSON)


def _path_values(operation: Operation, request: Request) -> dict[str, Any]:
    """Return the values in the path, which is routed as it was written: an id may hold a slash."""
    values: dict[str, Any] = {}
    for name, adapter in operation.path_types.items():
        try:
            text = unquote(request.path_params[name], errors="strict")
        except UnicodeDecodeError:
            raise Problem("malformed", f"path.{name}: it is not UTF-8") from None
        values[name] = _adapted(adapter, text, f"path.{name}")
    return values


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    given: dict[str, Any] = {}
    lists = {name for name, field in model.model_fields.items() if _is_list(field.annotation)}
    for name, value in request.query_params.multi_items():
        if name in lists:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise Problem("invalid", f"query.{clip(name, 80)}: it is given twice")
        else:
            given[name] = value
    return _validated(model, given, "query")


def _is_list(annotation: object) -> bool:
    return getattr(annotation, "__origin__", None) in (list, tuple)


def _validated(model: type[BaseModel], value: object, where: str) -> BaseModel:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_values(where, error) from None


def _adapted(adapter: TypeAdapter[Any], value: object, where: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise invalid_values(where, error) from None
