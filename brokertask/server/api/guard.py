"""What stands in front of every handler: host names, other sites, sizes, rates, headers.

A loopback address is open to every page that a browser on this machine has open. So requests must
name this host (else a page could reach it by way of DNS), and what changes anything must not come
from another site.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brokertask.server.api.problems import Problem

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS: Final = {
    "cache-control": "private, no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""On every answer that does not say otherwise."""
BODY_TIMEOUT: Final = 10.0
"""How long a body may take to arrive."""
MAX_CALLERS: Final = 10_000


class Guard:
    """Wraps an application; what it refuses is answered here.

    Args:
        app: What it protects.
        hosts: Names under which it may be asked, beside those of loopback; no ports.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = LOOPBACK | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["method"], Headers(scope=scope))
        except Problem as problem:
            await problem.response()(scope, receive, send_safely)
            return
        await self._app(scope, receive, send_safely)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        if host_name(host) not in self._hosts:
            raise Problem(
                "misdirected",
                f"the host {host!r:.100} is not one of this server's; add it to "
                "BROKERTASK_SERVER_ALLOWED_HOSTS",
            )
        if method in SAFE:
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site not in (None, "same-origin", "none"):
            raise Problem("forbidden", f"it was asked for by another site (Sec-Fetch-Site: {site})")
        if origin is not None and urlsplit_host(origin) != host:
            raise Problem("forbidden", "it was asked for by another site (Origin)")


def host_name(host: str) -> str:
    """Return a `Host` header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def urlsplit_host(origin: str) -> str:
    """Return host and port of an `Origin` header; empty for one that is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        Problem: More than `limit` bytes, or slower than 10 seconds.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limit:
        raise Problem("too_large", f"a body is at most {limit} bytes", headers=_LAST)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise Problem("too_large", f"a body is at most {limit} bytes", headers=_LAST)
    except TimeoutError:
        raise Problem(
            "malformed", f"the body did not come within {BODY_TIMEOUT:g} s", headers=_LAST
        ) from None
    return bytes(body)


# What is left of the body would be taken for the next request.
_LAST: Final = {"connection": "close"}


class Rates:
    """How often each caller may ask: so many a second, and twice as many at once.

    Counted in this process; of the callers, the 10,000 that asked last are remembered.
    """

    def __init__(self, per_second: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_second
        self._burst = max(1.0, 2 * per_second)
        self._now = now
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count a request.

        Raises:
            Problem: It is one too many.
        """
        now = self._now()
        left, since = self._left.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        self._left[caller] = (max(0.0, left - 1), now)
        if len(self._left) > MAX_CALLERS:
            self._left.popitem(last=False)
        if left < 1:
            wait = max(1, round((1 - left) / self._rate))
            raise Problem(
                "too_many_requests",
                f"more than {self._rate:g} requests a second",
                headers={"retry-after": str(wait)},
            )
