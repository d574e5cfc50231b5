"""A health endpoint: `/livez` and `/readyz` over HTTP, for whoever restarts and routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

from brokertask.errors import ConfigurationError

MAX_HEAD: Final = 8_192
TIMEOUT: Final = 5.0
MAX_CONNECTIONS: Final = 32


class HealthServer:
    """Answers GET; each connection gets one answer, within bounds of size and time.

    Args:
        describe: Returns the state of everything; its `ready` decides about `/readyz`.
    """

    def __init__(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        self._describe = describe
        self._connections = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port: 0 asks for a free one.

        Raises:
            ConfigurationError: The address is taken, or not one of this machine.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEAD)
        except OSError as error:
            raise ConfigurationError(
                f"health endpoint: cannot listen on {host}:{port}: {error}"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request. Too large, too slow, one too many: closed without an answer."""
        self._connections += 1
        broken = (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        try:
            with suppress(*broken):
                async with asyncio.timeout(TIMEOUT):
                    if self._connections <= MAX_CONNECTIONS:
                        head = await reader.readuntil(b"\r\n\r\n")
                        writer.write(_response(*self._answer(head)))
                        await writer.drain()
        finally:
            self._connections -= 1
            writer.close()

    def _answer(self, head: bytes) -> tuple[HTTPStatus, object]:
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        if method != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET"}
        match rest.split(" ")[0].partition("?")[0]:
            case "/livez":
                return HTTPStatus.OK, {"live": True}
            case "/readyz":
                state = self._describe()
                return HTTPStatus.OK if state["ready"] else HTTPStatus.SERVICE_UNAVAILABLE, state
        return HTTPStatus.NOT_FOUND, {"error": "there are /livez and /readyz"}


def _response(status: HTTPStatus, body: object) -> bytes:
    content = json.dumps(body).encode() + b"\n"
    allow = "Allow: GET\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n{allow}"
        "Content-Type: application/json\r\nCache-Control: no-store\r\nConnection: close\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
