"""The part of a server that serves its API and its console, on one address."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from brokertask.errors import ConfigurationError, InvalidOption
from brokertask.server.api import auth
from brokertask.server.api.app import make_api, make_gate
from brokertask.server.api.guard import Guard, host_name
from brokertask.server.api.openapi import PREFIX
from brokertask.server.api.problems import Problem
from brokertask.server.api.stream import Stopping
from brokertask.server.console.app import make_console
from brokertask.server.resources import Resources

log = logging.getLogger("brokertask.server")

GRACE: Final = 5
"""Seconds that requests have to end when the server stops."""
MAX_HEAD: Final = 65_536
MAX_CONNECTIONS: Final = 1_000
REQUESTS_A_SECOND: Final = 100.0
"""Of one token, or of one address without; twice as many at once."""


def make_app(
    resources: Resources,
    *,
    open_here: bool,
    hosts: Iterable[str] = (),
    stopping: Stopping | None = None,
    rate: float = REQUESTS_A_SECOND,
    trace_url: str | None = None,
) -> ASGIApp:
    """Return API and console as one application; it can be mounted below a prefix of another one.

    Args:
        resources: The server's store, broker and clock, open.
        open_here: Let in who has no token, until there was a first one. For loopback only.
        hosts: Host names to answer to, beside those of loopback.
        stopping: Set when streams are to end.
        rate: Requests a second of one caller.
        trace_url: Where a trace is shown, with `{trace_id}` in it.
    """
    gate = make_gate(resources, open_here=open_here, stopping=stopping, rate=rate)
    routes = [
        Mount(PREFIX, make_api(gate)),
        Route("/api{rest:path}", _no_api),
        Route("/healthz", _health, methods=["GET"]),
        Mount("", make_console(gate, trace_url=trace_url)),
    ]
    return Guard(_AsWritten(Router(routes, redirect_slashes=False)), hosts=hosts)


class _AsWritten:
    """Routes by the path as it was written, so that a part of it may hold an encoded slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path")
        if scope["type"] == "http" and raw is not None:
            scope = {**scope, "path": raw.partition(b"?")[0].decode("latin-1")}
        await self._app(scope, receive, send)


async def _no_api(request: Request) -> Response:
    return Problem("not_found", "there is no such version of the API: it is /api/v1").response()


async def _health(request: Request) -> Response:
    return Response("{}", media_type="application/json")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @staticmethod
    def read(text: str) -> Address:
        """Return the address in `host:port`.

        Raises:
            InvalidOption: It is none.
        """
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isdecimal() and int(port) < 65_536):
            raise InvalidOption(f"an address is host:port, such as 127.0.0.1:8070, not {text!r}")
        return Address(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


class Site:
    """Serves API and console until cancelled; then it ends streams, and lets other requests end.

    Attributes:
        port: Where it listens, once it does: of port 0, the one that was free.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        address: Address,
        hosts: Sequence[str] = (),
        rate: float = REQUESTS_A_SECOND,
        trace_url: str | None = None,
    ) -> None:
        self._resources = resources
        self._address = address
        self._hosts = hosts
        self._rate = rate
        self._trace_url = trace_url
        self.port: int | None = None
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen and answer, until cancelled.

        Raises:
            ConfigurationError: The address cannot be had, or is open and nobody has a token.
        """
        address = self._address
        if not address.loopback:
            await self._check_tokens()
        stopping = Stopping()
        app = make_app(
            self._resources,
            open_here=address.loopback,
            hosts=(*self._hosts, *([] if address.loopback else [host_name(address.host)])),
            stopping=stopping,
            rate=self._rate,
            trace_url=self._trace_url,
        )
        listener = _listen(address)
        self.port = listener.getsockname()[1]
        server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEAD,
                timeout_graceful_shutdown=GRACE,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        self.listening.set()
        log.info("the console is at http://%s:%d/", address.host, self.port)
        try:
            await asyncio.shield(serving)
        finally:
            stopping.event.set()
            server.should_exit = True
            await asyncio.wait({serving})
            self.listening.clear()

    async def _check_tokens(self) -> None:
        async with self._resources.store.read() as connection:
            now_ms = self._resources.clock.now_ms()
            tokens = await auth.list_tokens(connection)
        if not any(token.valid(now_ms) for token in tokens):
            raise ConfigurationError(
                f"{self._address.host} is not a loopback address, and nobody has an API token: "
                "make one with `brokertask tokens create --role admin NAME`, or bind to 127.0.0.1"
            )


class _Server(uvicorn.Server):
    """Leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"the API cannot listen on {address.host}:{address.port}: {error}; set "
            "BROKERTASK_SERVER_BIND"
        ) from error
    return listener
