"""Operations: the routes of the API, each a function whose signature says all that is to be known.

    routes = Routes("runs")

    @routes.get("/runs/{run_id}")
    async def show_run(call: Call, run_id: RunId) -> RunView: ...

A parameter named `query` is a model of the query string, `body` of the JSON body; any other is a
part of the path. From the same declarations requests are checked, answers written, and the OpenAPI
document is made, so that they agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from brokertask.clock import Clock
from brokertask.envelope import MAX_ID
from brokertask.server.api.auth import Principal, Role
from brokertask.server.api.problems import Kind
from brokertask.server.resources import Resources

Method: TypeAlias = Literal["GET", "POST", "DELETE"]
Handler: TypeAlias = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)

PRINTABLE: Final = r"^[^\x00-\x1f\x7f]*$"
"""No control characters: NUL is none that PostgreSQL takes, the others move terminals."""
Text: TypeAlias = Annotated[str, StringConstraints(max_length=200, pattern=PRINTABLE)]
RunId: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ID, pattern=PRINTABLE)
]
TaskId: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,126}$")
]

DurationText: TypeAlias = (
    Annotated[float, Field(ge=0)] | Annotated[str, StringConstraints(max_length=40)]
)
"""Seconds as a number, or text such as `1h30m`."""


class Strict(BaseModel):
    """A part of a request: what it does not know is refused, as it would otherwise be lost."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in."""

    request: Request
    resources: Resources
    principal: Principal
    state: Mapping[type[Any], Any]
    """What this server's handlers share beside the resources, by type."""

    @property
    def clock(self) -> Clock:
        """The server's clock."""
        return self.resources.clock

    @property
    def now_ms(self) -> int:
        """The present."""
        return self.resources.clock.now_ms()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A route, understood."""

    handler: Handler
    method: Method
    path: str
    tag: str
    role: Role
    status: int
    reveals: bool
    """Shows payloads: takes that right, and is written into the audit log."""
    public: bool
    """Needs no token: what it takes is in its path."""
    media: str
    problems: tuple[Kind, ...]
    path_types: Mapping[str, TypeAdapter[Any]]
    query: type[BaseModel] | None
    body: type[BaseModel] | None
    answer: TypeAdapter[Any] | None

    @property
    def name(self) -> str:
        """Its id in the OpenAPI document, and its name in the audit log."""
        return self.handler.__name__

    @property
    def audited(self) -> bool:
        """Whether each call is written into the audit log before it is made."""
        return self.method != "GET" or self.reveals

    @property
    def words(self) -> tuple[str, str]:
        """What it does: a line, and more."""
        first, _, rest = inspect.cleandoc(self.handler.__doc__ or "").partition("\n")
        return first.rstrip("."), rest.strip()


@dataclass(frozen=True, slots=True)
class Routes:
    """The operations of one module."""

    tag: str
    operations: list[Operation] = field(default_factory=list)

    def get(
        self,
        path: str,
        *,
        role: Role = "viewer",
        reveals: bool = False,
        public: bool = False,
        media: str = "application/json",
        problems: tuple[Kind, ...] = (),
    ) -> Callable[[H], H]:
        """Declare what reads."""
        return partial(
            self._add, "GET", path, role, 200, problems, reveals=reveals, public=public, media=media
        )

    def post(
        self,
        path: str,
        *,
        role: Role = "operator",
        status: int = 200,
        public: bool = False,
        problems: tuple[Kind, ...] = (),
    ) -> Callable[[H], H]:
        """Declare what acts."""
        return partial(self._add, "POST", path, role, status, problems, public=public)

    def delete(
        self, path: str, *, role: Role = "operator", problems: tuple[Kind, ...] = ()
    ) -> Callable[[H], H]:
        """Declare what deletes."""
        return partial(self._add, "DELETE", path, role, 204, problems)

    def _add(
        self,
        method: Method,
        path: str,
        role: Role,
        status: int,
        problems: tuple[Kind, ...],
        handler: H,
        *,
        reveals: bool = False,
        public: bool = False,
        media: str = "application/json",
    ) -> H:
        hints = get_type_hints(handler, include_extras=True)
        answer = hints.pop("return")
        hints.pop("call")
        query, body = hints.pop("query", None), hints.pop("body", None)
        streamed = inspect.isclass(answer) and issubclass(answer, Response)
        self.operations.append(
            Operation(
                handler=handler,
                method=method,
                path=path,
                tag=self.tag,
                role=role,
                status=status,
                reveals=reveals,
                public=public,
                media=media,
                problems=problems,
                path_types={name: TypeAdapter(hint) for name, hint in hints.items()},
                query=query,
                body=body,
                answer=None if streamed or answer is type(None) else TypeAdapter(answer),
            )
        )
        return handler
