"""The workers that servers have heard of, each as it said last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.presence import EVERY, Presence
from brokertask.server.store.schema import workers
from brokertask.server.store.upsert import put
from brokertask.values import MSGPACK, decode, pack

SILENT_MS: Final = round(3 * EVERY * 1000)
"""A worker that was not heard of for so long is gone."""
KEPT_MS: Final = 7 * 86_400_000


async def record(connection: AsyncConnection, heard: Sequence[Presence]) -> None:
    """Write what workers say of themselves; of two things the later one counts."""
    latest: dict[str, Presence] = {}
    for one in heard:
        if one.worker not in latest or latest[one.worker].at_ms < one.at_ms:
            latest[one.worker] = one
    rows = [
        {
            "worker": one.worker,
            "state": one.state,
            "host": one.host,
            "pid": one.pid,
            "started_ms": one.started_ms,
            "seen_ms": one.at_ms,
            "tasks": pack(dict(one.tasks)),
            "version": one.version,
        }
        for _, one in sorted(latest.items())
    ]
    await put(connection, workers, rows, newer=workers.c.seen_ms)


async def listed(connection: AsyncConnection, *, now_ms: int) -> list[Mapping[str, Any]]:
    """Return the workers, the one that started last first.

    `state` is `working`, `draining`, `stopped`, or `silent` where nothing was heard for 90 s;
    `tasks` has, by task, `slots`, `busy` and `paused`.
    """
    rows = await connection.execute(select(workers).order_by(workers.c.started_ms.desc()))
    found: list[Mapping[str, Any]] = []
    for row in rows:
        silent = row.state != "stopped" and row.seen_ms < now_ms - SILENT_MS
        told = {"state": "silent" if silent else row.state, "tasks": decode(row.tasks, MSGPACK)}
        found.append({**row._mapping, **told})
    return found


async def forget(connection: AsyncConnection, *, now_ms: int) -> None:
    """Delete workers that were not heard of for a week."""
    await connection.execute(delete(workers).where(workers.c.seen_ms < now_ms - KEPT_MS))
