"""A server's HTTP API, as commands use it: BROKERTASK_SERVER_URL and BROKERTASK_TOKEN."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from brokertask.errors import BrokertaskError

URL_VARIABLE: Final = "BROKERTASK_SERVER_URL"
TOKEN_VARIABLE: Final = "BROKERTASK_TOKEN"
DEFAULT_URL: Final = "http://127.0.0.1:8070"
TIMEOUT: Final = 30.0
"""Seconds for each answer; a stream is never silent for half of it."""
PAGE: Final = 200


class ServerUnavailable(BrokertaskError):
    """No `brokertask server` answers at the URL."""


class Refused(BrokertaskError):
    """The server has answered with a problem.

    Attributes:
        status: Its HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Denied(Refused):
    """It takes a token, or more rights than this one has."""


class Impossible(Refused):
    """There is no such thing, or it cannot be done to what is there."""


_KINDS: Final[Mapping[int, type[Refused]]] = {
    401: Denied,
    403: Denied,
    404: Impossible,
    409: Impossible,
}


class Remote:
    """The API of one server; each request has a connection of its own."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url = _checked(url)
        self._token = token

    @staticmethod
    def of_the_environment() -> Remote:
        """Return the server that the environment names, by default one on this machine."""
        url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
        return Remote(url, os.environ.get(TOKEN_VARIABLE) or None)

    def get(self, path: str, **query: object) -> Any:
        """Return what there is at a path, such as `/runs`.

        Raises:
            ServerUnavailable: There is no answer.
            Refused: There is a problem.
        """
        return self._asked("GET", _with_query(path, query))

    def post(self, path: str, body: Mapping[str, object] | None = None) -> Any:
        """Have something done, and return what came of it. Raises what `get` does."""
        return self._asked("POST", path, json.dumps(body or {}).encode())

    def delete(self, path: str) -> None:
        """Delete something. Raises what `get` does."""
        self._asked("DELETE", path)

    def pages(self, path: str, *, limit: int | None = None, **query: object) -> Iterator[Any]:
        """Yield the items of a list, page by page, `limit` at most. Raises what `get` does."""
        cursor, left = None, limit
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = self.get(path, limit=size, cursor=cursor, **query)
            yield from page["items"]
            if (cursor := page["next"]) is None:
                return
            left = None if left is None else left - len(page["items"])

    def stream(self, path: str, **query: object) -> Iterator[tuple[str, Any]]:
        """Yield server-sent events, each with its name, until the server ends them.

        Raises what `get` does, and `ServerUnavailable` if the connection breaks.
        """
        with self._answered("GET", _with_query(path, query), None) as response:
            name = "message"
            for line in response:
                field, _, value = line.decode("utf-8", "replace").strip().partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    yield name, json.loads(value)

    def _asked(self, method: str, path: str, body: bytes | None = None) -> Any:
        with self._answered(method, path, body) as response:
            content = response.read()
            return json.loads(content) if content else None

    @contextmanager
    def _answered(
        self, method: str, path: str, body: bytes | None
    ) -> Iterator[http.client.HTTPResponse]:
        url, connection = self._url, _connection(self._url)
        headers = {"accept": "application/json, text/event-stream", "host": url.netloc}
        if body is not None:
            headers["content-type"] = "application/json"
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, f"{url.path}/api/v1{path}", body, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refused(response)
            yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerUnavailable(
                f"no answer of a `brokertask server` from {url.scheme}://{url.netloc}: {error}; "
                f"start one, or `brokertask dev`, or set {URL_VARIABLE}"
            ) from error
        finally:
            connection.close()


def part(text: str) -> str:
    """Return a text as one part of a path."""
    return quote(text, safe="")


def _checked(url: str) -> SplitResult:
    split = urlsplit(url.rstrip("/"))
    if split.scheme not in ("http", "https") or not split.hostname:
        raise ServerUnavailable(f"{URL_VARIABLE} is http://host:port or https://host, and no other")
    return split


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port, timeout=TIMEOUT)


def _with_query(path: str, query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


def _refused(response: http.client.HTTPResponse) -> Refused:
    try:
        problem = json.loads(response.read(65_536))
        told = f"{problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        told = f"{response.status} {response.reason}"
    return _KINDS.get(response.status, Refused)(told, status=response.status)
