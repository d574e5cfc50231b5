"""Answers that go on: server-sent events, as the HTML standard has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from brokertask.errors import BrokertaskError
from brokertask.server.api.problems import Problem, problem_of

log = logging.getLogger("brokertask.server")

EVENT_STREAM: Final = "text/event-stream"
BEAT: Final = 15.0
"""Seconds of silence after which something is sent, so that nobody on the way gives up."""
_HEADERS: Final = [
    (b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Stopping:
    """That a server stops: whoever streams ends then."""

    def __init__(self) -> None:
        self.event = asyncio.Event()


class Stream(Response):
    """Sends what an iterator yields until it ends, the client goes, or the server stops.

    What it raises before the first part is answered as a problem.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], stopping: Stopping) -> None:
        super().__init__()
        self._parts = parts
        self._stopping = stopping
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it."""
        sending = asyncio.create_task(self._send(scope, receive, send))
        tasks = {
            sending,
            asyncio.create_task(_gone(receive)),
            asyncio.create_task(self._stopping.event.wait()),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not sending.cancelled():
            sending.result()
        elif self._begun:
            await send({"type": "http.response.body", "body": b""})

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            try:
                first = await anext(parts, b"")
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
            except BrokertaskError as error:
                await problem_of(error).response()(scope, receive, send)
                return
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except BrokertaskError as error:
                log.warning("a stream ends: %s", error)
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sent(event: str, value: BaseModel) -> bytes:
    """Return one server-sent event; JSON has no line breaks, so it is one line of data."""
    return f"event: {event}\ndata: {value.model_dump_json()}\n\n".encode()


BEATING: Final = b": still here\n\n"
