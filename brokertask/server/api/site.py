"""The part of a server that serves its API, on one address."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import uvicorn

from brokertask.errors import ConfigurationError, InvalidOption
from brokertask.server.api import auth
from brokertask.server.api.app import REQUESTS_A_SECOND, make_app
from brokertask.server.api.guard import host_name
from brokertask.server.api.stream import Stopping
from brokertask.server.resources import Resources

log = logging.getLogger("brokertask.server")

GRACE: Final = 5
"""Seconds that requests have to end when the server stops."""
MAX_HEAD: Final = 65_536
MAX_CONNECTIONS: Final = 1_000


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
    """Serves the API until cancelled; then it ends streams, and lets other requests end.

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
    ) -> None:
        self._resources = resources
        self._address = address
        self._hosts = hosts
        self._rate = rate
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
        log.info("the API is at http://%s:%d/api/v1", address.host, self.port)
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
