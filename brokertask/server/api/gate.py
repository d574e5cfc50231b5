"""From a request to an operation's handler and back: who asks, is it allowed, is it well-formed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection
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

M = TypeVar("M", bound=BaseModel)

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
        self.resources = resources
        self._open_here = open_here
        self.max_body = max_body
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
        principal = await self._principal(operation, request)
        check_right(operation, principal)
        given = _path_values(operation, request)
        if operation.query is not None:
            given["query"] = _query(operation.query, request)
        if operation.body is not None:
            given["body"] = await self._body(operation.body, request)
        value = await self.perform(operation, self.call(request, principal), given)
        return _answer(operation, value)

    def call(self, request: Request, principal: Principal) -> Call:
        """Return what handlers get of a request."""
        return Call(request, self.resources, principal, self._state)

    async def perform(self, operation: Operation, call: Call, given: Mapping[str, Any]) -> Any:
        """Do what an operation does, and return what its handler does.

        Whatever acts or reveals is written down first.

        Raises:
            Problem: Its caller may not, or its handler says so.
            BrokertaskError: It cannot be done.
        """
        check_right(operation, call.principal)
        if not operation.audited:
            return await operation.handler(call, **given)
        return await self._audited(operation, call, given)

    def take(self, request: Request, principal: Principal | None) -> None:
        """Count a request: of a token, or of an address without one.

        Raises:
            Problem: It is one too many.
        """
        address = address_of(request)
        self._rates.take(address if principal is None else principal.token or address)

    async def local(self, connection: AsyncConnection) -> Principal | None:
        """Return who comes without any proof: None where a token is needed."""
        return LOCAL if self._open_here and not await closed(connection) else None

    async def _principal(self, operation: Operation, request: Request) -> Principal:
        """Return who asks. Each is let in only so often: a token, or an address without one."""
        if operation.public:
            self.take(request, NOBODY)
            return NOBODY
        authorization = request.headers.get("authorization")
        now_ms = self.resources.clock.now_ms()
        async with self.resources.store.read() as connection:
            principal = await principal_of(connection, authorization, now_ms=now_ms)
            if principal is None and authorization is None:
                principal = await self.local(connection)
        self.take(request, principal)
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
        async with self.resources.store.begin() as connection:
            await note_use(connection, token, now_ms=now_ms)

    async def _body(self, model: type[BaseModel], request: Request) -> BaseModel:
        kind = kind_of(request.headers.get("content-type", ""))
        if kind != JSON:
            raise Problem(
                "unsupported_media_type", f"the content type is {JSON}, not {clip(kind, 80)!r}"
            )
        content = await read_body(request, self.max_body)
        try:
            value = decode(content, JSON)
        except EnvelopeError as error:
            raise Problem("malformed", f"the body is not what is read here: {error}") from None
        return validated(model, value, "body")

    async def _audited(self, operation: Operation, call: Call, given: Mapping[str, Any]) -> Any:
        """Make a call that is written down first: what nobody can look up later is not done."""
        identity = uuid7(call.now_ms)
        target = " ".join(str(given[name]) for name in operation.path_types) or "-"
        reason = getattr(given.get("body"), "reason", None)
        async with self.resources.store.begin() as connection:
            await audit.begin(
                connection,
                call.principal,
                identity=identity,
                action=operation.name,
                target=clip(_hidden(operation, target), MAX_TARGET),
                reason=reason,
                address=address_of(call.request),
                now_ms=call.now_ms,
            )
        status = 500
        try:
            value = await operation.handler(call, **given)
            status = value.status_code if isinstance(value, Response) else operation.status
        except Problem as problem:
            status = problem.status
            raise
        except BrokertaskError as error:
            status = problem_of(error).status
            raise
        finally:
            async with self.resources.store.begin() as connection:
                await audit.end(connection, identity, status)
        return value


def address_of(request: Request) -> str:
    """Return where a request comes from."""
    return request.client.host if request.client else "unknown"


def check_right(operation: Operation, principal: Principal) -> None:
    """Refuse who may not.

    Raises:
        Problem: It takes another role, or the right to see payloads.
    """
    if not principal.may(operation.role) and not operation.public:
        raise Problem(
            "forbidden", f"it takes the role {operation.role}; this token is a {principal.role}"
        )
    if operation.reveals and not principal.payloads:
        raise Problem("forbidden", "it takes the right to see payloads, which this token lacks")


def _hidden(operation: Operation, target: str) -> str:
    return "-" if operation.public else target


def _answer(operation: Operation, value: Any) -> Response:
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
        values[name] = adapted(adapter, text, f"path.{name}")
    return values


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    given: dict[str, Any] = {}
    lists = {name for name, field in model.model_fields.items() if is_list(field.annotation)}
    for name, value in request.query_params.multi_items():
        if name in lists:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise Problem("invalid", f"query.{clip(name, 80)}: it is given twice")
        else:
            given[name] = value
    return validated(model, given, "query")


def is_list(annotation: object) -> bool:
    """Whether a field of a query may be given repeatedly."""
    return getattr(annotation, "__origin__", None) in (list, tuple)


def validated(model: type[M], value: object, where: str) -> M:
    """Return the model in a value of a request.

    Raises:
        Problem: It is none.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_values(where, error) from None


def adapted(adapter: TypeAdapter[Any], value: object, where: str) -> Any:
    """Return a value of a request as its type has it.

    Raises:
        Problem: It has not.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise invalid_values(where, error) from None
