"""An API before a real store and a broker in this process, and clients for it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from starlette.types import ASGIApp

from brokertask import App, Settings
from brokertask.server.api import auth
from brokertask.server.api.auth import Role
from brokertask.server.resources import Resources
from brokertask.server.service import Server
from brokertask.server.settings import ServerSettings
from brokertask.server.site import make_app

BASE = "http://localhost/api/v1"


@dataclass(frozen=True, slots=True)
class Stage:
    """An API, and what is behind it."""

    app: App
    server: Server
    resources: Resources
    asgi: ASGIApp

    def client(self, token: str | None = None, *, base: str = BASE) -> httpx.AsyncClient:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.asgi), base_url=base, headers=headers
        )

    async def token(self, role: Role, *, payloads: bool = False, ttl_ms: int | None = None) -> str:
        now_ms = self.resources.clock.now_ms()
        async with self.resources.store.begin() as connection:
            _, text = await auth.create(
                connection,
                f"a {role}",
                role,
                payloads=payloads,
                now_ms=now_ms,
                expires_ms=None if ttl_ms is None else now_ms + ttl_ms,
            )
        return text


@asynccontextmanager
async def stage(
    app: App | None = None,
    *,
    open_here: bool = True,
    rate: float = 1_000_000,
    store_url: str | None = None,
) -> AsyncIterator[Stage]:
    owner = app or App("shop", settings=Settings(amqp_url="memory:"))
    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(
            store_url=store_url or f"sqlite+aiosqlite:///{folder}/store.db", bind="127.0.0.1:0"
        )
        server = Server(owner.settings, settings, owner.connect())
        running = asyncio.create_task(server.run())
        starting = asyncio.create_task(server.started.wait())
        await asyncio.wait({running, starting}, return_when=asyncio.FIRST_COMPLETED)
        try:
            assert server.resources is not None
            assert server.site is not None
            await server.site.listening.wait()
            asgi = make_app(server.resources, open_here=open_here, rate=rate)
            yield Stage(owner, server, server.resources, asgi)
        finally:
            starting.cancel()
            server.stop()
            await running
