"""The part of a server that forgets: runs that ended long ago, and the oldest of too many.

What is deleted goes in batches, so that it never keeps others waiting for long. Runs that have not
ended are kept, however old.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.clock import Clock
from brokertask.server import bulk, details, parking, workers
from brokertask.server.resources import Store
from brokertask.server.store.schema import attempts, run_tags, runs

log = logging.getLogger("brokertask.server")

BATCH: Final = 500
BREATH: Final = 0.05
"""Seconds between two batches: those who record take their turn."""
PAUSE: Final = 60.0


class Retention:
    """Keeps history within its limits; several servers may do so at once."""

    def __init__(
        self, store: Store, clock: Clock, *, keep_for: float, keep_runs: int | None
    ) -> None:
        self._store = store
        self._clock = clock
        self._keep_ms = round(keep_for * 1000)
        self._keep_runs = keep_runs

    async def run(self) -> None:
        """Forget what is not kept any longer, each minute, until cancelled."""
        while True:
            if forgotten := await self.prune():
                log.info("history: %d runs are not kept any longer", forgotten)
            await asyncio.sleep(PAUSE)

    async def prune(self) -> int:
        """Forget what is not kept any longer now; return how many runs."""
        store, now_ms = self._store, self._clock.now_ms()
        before_ms = now_ms - self._keep_ms
        forgotten = 0
        async with store.begin() as connection:
            await parking.forget(connection, [], before_ms=before_ms)
            await workers.forget(connection, now_ms=now_ms)
            await bulk.forget(connection, before_ms=before_ms)
        if self._keep_runs is not None:
            async with store.read() as connection:
                last_ms = await _last_kept(connection, self._keep_runs)
            before_ms = max(before_ms, last_ms)
        while True:
            async with store.begin() as connection:
                run_ids = await _ended(connection, before_ms)
                await _forget(connection, run_ids, before_ms=now_ms - self._keep_ms)
            forgotten += len(run_ids)
            if len(run_ids) < BATCH:
                return forgotten
            await asyncio.sleep(BREATH)


async def _last_kept(connection: AsyncConnection, count: int) -> int:
    """Return when the last run ended that is within `count`, in ms since the epoch."""
    ended = select(runs.c.ended_ms).where(runs.c.ended_ms.is_not(None))
    last = ended.order_by(runs.c.ended_ms.desc()).offset(count - 1).limit(1)
    return await connection.scalar(last) or 0


async def _ended(connection: AsyncConnection, before_ms: int) -> Sequence[str]:
    """Return the next runs that ended before; none that another server is at."""
    ended = select(runs.c.run_id).where(runs.c.ended_ms < before_ms).order_by(runs.c.ended_ms)
    found = await connection.scalars(ended.limit(BATCH).with_for_update(skip_locked=True))
    return found.all()


async def _forget(connection: AsyncConnection, run_ids: Sequence[str], *, before_ms: int) -> None:
    for table in (runs, attempts, run_tags):
        await connection.execute(delete(table).where(table.c.run_id.in_(run_ids)))
    await details.forget(connection, run_ids)
    await parking.forget(connection, run_ids, before_ms=before_ms)
