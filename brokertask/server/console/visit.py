"""Visits: what a page is given of who asks for it, and what it answers with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import unquote

from jinja2 import Environment
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from brokertask.server.api.app import OPERATIONS
from brokertask.server.api.auth import Principal, Role
from brokertask.server.api.gate import Gate, adapted, check_right, is_list, validated
from brokertask.server.api.operations import Call, Handler, Operation
from brokertask.server.api.problems import Problem
from brokertask.server.console.html import query

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

BY_HANDLER: Final[Mapping[Handler, Operation]] = {each.handler: each for each in OPERATIONS}
THEME: Final = "brokertask_theme"
DONE: Final = "done"
"""The parameter that says what was done a moment ago; by a word, as anybody can make a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A request of a browser that was let in."""

    gate: Gate
    request: Request
    templates: Environment
    frame: Mapping[str, Any]
    """What every template is given."""
    principal: Principal
    csrf: str
    form: Mapping[str, str] = field(default_factory=dict)
    """What was sent with it: the last of several values."""

    @property
    def now_ms(self) -> int:
        """The present."""
        return self.call.now_ms

    @property
    def call(self) -> Call:
        """It as operations get it."""
        return self.gate.call(self.request, self.principal)

    async def ask(
        self,
        handler: Callable[Concatenate[Call, P], Awaitable[T]],
        *args: P.args,
        **given: P.kwargs,
    ) -> T:
        """Return what an operation of the API answers; its values are given by name.

        Raises:
            Problem: This visitor may not, or it cannot be done.
            BrokertaskError: It cannot be done.
        """
        assert not args, "operations are asked by name"
        operation = BY_HANDLER[handler]
        values: dict[str, Any] = dict(given)
        for name, adapter in operation.path_types.items():
            values[name] = adapted(adapter, values[name], name)
        answer: T = await self.gate.perform(operation, self.call, values)
        return answer

    def may(self, role: Role) -> bool:
        """Whether this visitor may what takes this role."""
        return self.principal.may(role)

    def check(self, handler: Handler) -> None:
        """Refuse who may not ask an operation, before what is sent is looked at.

        Raises:
            Problem: This visitor may not.
        """
        check_right(BY_HANDLER[handler], self.principal)

    def part(self, name: str) -> str:
        """Return a part of the path.

        Raises:
            Problem: It is not UTF-8.
        """
        try:
            return unquote(str(self.request.path_params[name]), errors="strict")
        except UnicodeDecodeError:
            raise Problem("malformed", "a part of the path is not UTF-8") from None

    def asked(self, model: type[M]) -> M:
        """Return the query string as a model; parameters without a value are as if not there.

        Raises:
            Problem: It is none.
        """
        given: dict[str, Any] = {}
        for name, value in self.request.query_params.multi_items():
            if value == "" or name == DONE:
                continue
            known = model.model_fields.get(name)
            if known is not None and is_list(known.annotation):
                given.setdefault(name, []).append(value)
            elif name in given:
                raise Problem("invalid", "a parameter of the query is given twice")
            else:
                given[name] = value
        return validated(model, given, "query")

    def sent(self, model: type[M], **values: Any) -> M:
        """Return values of the form as a model.

        Raises:
            Problem: They are none.
        """
        return validated(model, values, "form")

    def to(self, path: str = "", **values: Any) -> str:
        """Return the address of a page, seen from this one: it holds under any prefix."""
        return f"{self._up}{path}{query(values)}"

    @property
    def _up(self) -> str:
        prefix: str = self.request.scope.get("root_path", "")
        inside = str(self.request.scope["path"]).removeprefix(prefix)
        return "./" + "../" * (inside.count("/") - 1)

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """Return a page made from a template."""
        made = self.templates.get_template(template)
        done = self.request.query_params.get(DONE)
        known = {"visit": self, "to": self.to, "now_ms": self.now_ms, "done": done}
        return HTMLResponse(made.render({**self.frame, **known, **values}), status)

    def go(self, path: str, **values: Any) -> Response:
        """Return the answer that leads to another page, with GET."""
        return RedirectResponse(self.to(path, **values), 303)
