"""The desk: from a browser's request to a page and back, in front of every page."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from brokertask.errors import BrokertaskError
from brokertask.server.api.auth import Principal, Role
from brokertask.server.api.gate import NOBODY, Gate
from brokertask.server.api.guard import read_body
from brokertask.server.api.problems import Problem, problem_of
from brokertask.server.console import sessions
from brokertask.server.console.visit import THEME, Visit
from brokertask.values import kind_of

log = logging.getLogger("brokertask.server")

FORM: Final = "application/x-www-form-urlencoded"
CSRF: Final = "csrf"
MAX_FIELDS: Final = 600
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",
}
AGAIN: Final = (
    '<!doctype html><html lang="en"><title>brokertask</title>'
    '<meta http-equiv="refresh" content="0"><p>One moment.</p></html>'
)
"""Makes a browser that follows a link of another site ask again: now with its cookie."""
Handler: TypeAlias = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Page:
    """A page, or something that is done to what it shows."""

    handler: Handler
    method: str
    path: str
    public: bool = False
    """Is for who has not signed in, too."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of one module, and its entry in the navigation.

    Attributes:
        title: What it is called there; None: it has no entry.
        path: Where that leads.
        key: What to press behind `g` to get there.
        role: Who sees that entry; what is behind it is guarded by its operations.
    """

    title: str | None = None
    path: str = ""
    key: str = ""
    role: Role = "viewer"
    list: list[Page] = field(default_factory=list)

    def get(self, path: str, *, public: bool = False) -> Callable[[Handler], Handler]:
        """Declare a page."""
        return partial(self._add, "GET", path, public)

    def post(self, path: str, *, public: bool = False) -> Callable[[Handler], Handler]:
        """Declare what a form does; it answers with `Visit.go`."""
        return partial(self._add, "POST", path, public)

    def _add(self, method: str, path: str, public: bool, handler: Handler) -> Handler:
        self.list.append(Page(handler, method, path, public))
        return handler


class Desk:
    """Lets browsers in.

    Args:
        gate: The gate in front of the operations that pages ask.
        templates: What renders pages.
        frame: What every template is given.
    """

    def __init__(self, gate: Gate, templates: Environment, frame: Mapping[str, Any]) -> None:
        self._gate = gate
        self._templates = templates
        self._frame = frame

    async def serve(self, page: Page, request: Request) -> Response:
        """Return the answer to a request: a page, or one that says why not."""
        secret = sessions.secret_of(request)
        if secret is None and request.headers.get("sec-fetch-site") == "cross-site":
            return _headed(HTMLResponse(AGAIN))
        fresh = secret or sessions.new_secret()
        visit = self._visit(request, fresh, NOBODY)
        try:
            principal = await self._principal(request, fresh)
            self._gate.take(request, principal)
            if principal is None and not page.public:
                return _headed(visit.go("sign-in", next=_own(request)))
            visit = self._visit(request, fresh, principal or NOBODY)
            if request.method == "POST":
                visit = replace(visit, form=await _form(visit, self._gate.max_body))
            response = await page.handler(visit)
        except Problem as problem:
            response = refusal(visit, problem)
        except BrokertaskError as error:
            log.warning("the console at %s: %s", request.url.path, error)
            response = refusal(visit, problem_of(error))
        if secret is None and "set-cookie" not in response.headers:
            sessions.keep(response, fresh, request)
        return _headed(response)

    async def refuse(self, request: Request, problem: Problem) -> Response:
        """Return the page for what is not even a page."""
        return _headed(refusal(self._visit(request, sessions.new_secret(), NOBODY), problem))

    def _visit(self, request: Request, secret: str, principal: Principal) -> Visit:
        return Visit(
            gate=self._gate,
            request=request,
            templates=self._templates,
            frame={**self._frame, "theme": request.cookies.get(THEME)},
            principal=principal,
            csrf=sessions.csrf_of(secret),
        )

    async def _principal(self, request: Request, secret: str) -> Principal | None:
        resources = self._gate.resources
        async with resources.store.read() as connection:
            now_ms = resources.clock.now_ms()
            known = await sessions.principal_of(connection, secret, now_ms=now_ms)
            return known or await self._gate.local(connection)


def refusal(visit: Visit, problem: Problem) -> Response:
    """Return the page that says why something is not done."""
    response = visit.page("problem.html", status=problem.status, problem=problem.view)
    response.headers.update(problem.headers)
    return response


def _headed(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _own(request: Request) -> str:
    """Return where a browser wanted to go, as a path inside the console."""
    inside = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return f"{inside}?{request.url.query}" if request.url.query else inside


async def _form(visit: Visit, limit: int) -> dict[str, str]:
    request = visit.request
    if kind_of(request.headers.get("content-type", "")) != FORM:
        raise Problem("unsupported_media_type", f"the content type of a form is {FORM}")
    body = await read_body(request, limit)
    try:
        text = body.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError:
        raise Problem("malformed", "the form cannot be read") from None
    form = dict(pairs)
    if not hmac.compare_digest(form.pop(CSRF, "").encode(), visit.csrf.encode()):
        raise Problem(
            "forbidden", "the form is not of this session: load the page again, and repeat it"
        )
    return form
