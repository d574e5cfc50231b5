"""The part of a server that follows the control log.

    cancel ──► written; the runs below it, too, each as an entry of its own
        └────► a run that waits here goes back to its task, where a worker ends it, with its hooks
    pause, resume ──► written; a pause is said again each day, before the log forgets it
    at the start, and each day: `recording`, so that workers tell what happens within runs

Every server does all of it: what was done changes nothing when it is done again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.control import Entry
from brokertask.server import cancels
from brokertask.server.resources import Resources
from brokertask.server.store.schema import pauses
from brokertask.server.store.upsert import put
from brokertask.server.waits import Waits
from brokertask.steering import Steering

RENEWED: Final = 86_400.0
"""Seconds after which what holds is said again: a seventh of what the log keeps."""
KEPT_MS: Final = 30 * 86_400_000
"""How long is known which runs were cancelled; the log has forgotten it by then."""
BATCH: Final = 500


class Control:
    """Follows the control log; each of several servers does."""

    def __init__(self, resources: Resources, waits: Waits) -> None:
        self._resources = resources
        self._waits = waits

    async def run(self) -> None:
        """Take in what is said, and say again what holds, until cancelled."""
        heard: asyncio.Queue[Entry] = asyncio.Queue()
        steering = Steering(
            worker=f"server-{secrets.token_hex(4)}",
            settings=self._resources.broker_settings,
            clock=self._resources.clock,
            obey=heard.put_nowait,
        )
        await steering.start(self._resources.transport)
        try:
            # What was said before, at once: a pause that was lifted since must not show.
            await self._take(_all(heard, heard.qsize()))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._renew())
                while True:
                    entry = await heard.get()
                    await self._take([entry, *_all(heard, BATCH)])
        finally:
            await steering.stop()

    async def _take(self, entries: Sequence[Entry]) -> None:
        orders = [entry for entry in entries if entry.kind == "cancel"]
        latest = {entry.subject: entry for entry in entries if entry.kind in ("pause", "resume")}
        resources = self._resources
        below: list[Entry] = []
        async with resources.store.begin() as connection:
            await cancels.record(connection, orders)
            for order in orders:
                if order.children:
                    below += await cancels.record_below(connection, order)
            for entry in below:
                await resources.outbox.add(
                    connection, resources.names.control_route(), entry.message()
                )
            await _record_pauses(connection, latest)
        resources.outbox.poke()
        await self._waits.look([entry.subject for entry in (*orders, *below)])

    async def _renew(self) -> None:
        resources = self._resources
        while True:
            now_ms = resources.clock.now_ms()
            async with resources.store.begin() as connection:
                await cancels.forget(connection, before_ms=now_ms - KEPT_MS)
                rows = await paused(connection)
            entries = [Entry(kind="recording", subject="server", at_ms=now_ms)]
            entries += [
                Entry(
                    kind="pause",
                    subject=task,
                    at_ms=row["at_ms"],
                    reason=row["reason"],
                    again=True,
                )
                for task, row in rows.items()
            ]
            for entry in entries:
                await resources.publish(resources.names.control_route(), entry.message())
            await asyncio.sleep(RENEWED)


async def paused(connection: AsyncConnection) -> Mapping[str, Mapping[str, Any]]:
    """Return the tasks that are paused, each with `at_ms` and `reason`."""
    rows = await connection.execute(select(pauses).order_by(pauses.c.task))
    return {row.task: dict(row._mapping) for row in rows}


async def _record_pauses(connection: AsyncConnection, latest: Mapping[str, Entry]) -> None:
    lifted = [task for task, entry in latest.items() if entry.kind == "resume"]
    await connection.execute(delete(pauses).where(pauses.c.task.in_(lifted)))
    rows = [
        {"task": task, "at_ms": entry.at_ms, "reason": entry.reason}
        for task, entry in sorted(latest.items())
        # One that is only said again is known, or was lifted meanwhile.
        if entry.kind == "pause" and not entry.again
    ]
    await put(connection, pauses, rows)


def _all(heard: asyncio.Queue[Entry], limit: int) -> list[Entry]:
    return [heard.get_nowait() for _ in range(min(limit, heard.qsize()))]
