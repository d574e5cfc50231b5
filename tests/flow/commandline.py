"""`brokertask` as a command that ends: run in a folder against a broker, with what it printed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from brokertask.transport.base import Transport
from brokertask.transport.memory import MemoryBroker
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.transport.socket import SocketTransport, serve

SECONDS = 60.0
"""How long a command may take; only a failing test takes that long."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, and the broker that commands started in it use."""

    folder: Path
    url: str

    @property
    def environment(self) -> dict[str, str]:
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BROKERTASK_", "OTEL_"))
        }
        settings = {"BROKERTASK_AMQP_URL": self.url, "BROKERTASK_CONNECT_TIMEOUT": "5"}
        return {**own, **settings, "COLUMNS": "200"}

    async def brokertask(self, *words: str, stdin: str = "", **environment: str) -> Done:
        """Run a command to its end; its standard input is no terminal."""
        process = await self.start(*words, **environment)
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def start(self, *words: str, **environment: str) -> Process:
        return await asyncio.create_subprocess_exec(
            *command(*words),
            cwd=self.folder,
            env=self.environment | environment,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
        )

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[Transport]:
        """An open transport to the same broker."""
        transport = transport_to(self.url)
        await transport.open(timeout=SECONDS)
        try:
            yield transport
        finally:
            await transport.close()


def command(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "brokertask.cli", *words)


def transport_to(url: str) -> Transport:
    if url.startswith("unix:"):
        return SocketTransport(Path(url.removeprefix("unix:")))
    return RabbitTransport(url)


@asynccontextmanager
async def place(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Place]:
    """A place with an empty broker of the kind the fixture's parameter names."""
    async with AsyncExitStack() as stack:
        if request.param == "rabbitmq":
            yield Place(folder, request.getfixturevalue("amqp_url"))
            return
        broker = MemoryBroker()
        stack.callback(broker.close)
        path = folder / "broker" / "dev.sock"
        stack.push_async_callback((await serve(broker, path)).close)
        yield Place(folder, f"unix:{path}")
