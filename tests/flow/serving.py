"""A server without its API, in this process: on the broker and the clock of a test's app."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from brokertask import App
from brokertask.server.service import Server
from brokertask.server.service import serving as running
from brokertask.server.settings import ServerSettings


@asynccontextmanager
async def serving(app: App, store_url: str) -> AsyncIterator[Server]:
    """Have a server for an app until the end of the block."""
    settings = ServerSettings(store_url=store_url)
    server = Server(app.settings, settings, app.connect(), clock=app.clock, api=False)
    # Before its own topology, so that what its app declares is there for it.
    transport = server.resources.transport
    await transport.open(timeout=10)
    await transport.declare(app.topology())
    async with running(server):
        yield server


async def _serve(app: App, url: str) -> None:
    async with serving(app, url):
        print("serving", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(App("server"), sys.argv[1]))
