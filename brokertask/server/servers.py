"""The servers that are there, and how far behind each is with history."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask import __version__
from brokertask.clock import SystemClock
from brokertask.server.store.schema import servers
from brokertask.server.store.upsert import put

EVERY: Final = 10.0
"""Seconds between two words of a server; silent for three times as long, it is gone."""
GONE_MS: Final = round(3 * EVERY * 1000)
KEPT_MS: Final = 86_400_000
NAME: Final = f"{socket.gethostname()}-{os.getpid()}"
STARTED_MS: Final = SystemClock().now_ms()


async def record(connection: AsyncConnection, *, now_ms: int, lag_ms: int) -> None:
    """Write that this server is there."""
    row = {
        "server": NAME,
        "version": __version__,
        "started_ms": STARTED_MS,
        "seen_ms": now_ms,
        "lag_ms": lag_ms,
    }
    await put(connection, servers, [row], newer=servers.c.seen_ms)
    await connection.execute(delete(servers).where(servers.c.seen_ms < now_ms - KEPT_MS))


async def listed(connection: AsyncConnection, *, now_ms: int) -> list[Mapping[str, Any]]:
    """Return the servers that are there, the one that started last first."""
    there = select(servers).where(servers.c.seen_ms >= now_ms - GONE_MS)
    rows = await connection.execute(there.order_by(servers.c.started_ms.desc(), servers.c.server))
    return [dict(row._mapping) for row in rows]
