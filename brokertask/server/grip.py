"""A server's hold on a job: kept while it works, and looked after for an abort; and its pace."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from brokertask.errors import BrokertaskError
from brokertask.server import bulk
from brokertask.server.bulk import Job
from brokertask.server.resources import Resources

LOOK: Final = 1.0
"""Seconds after which an abort takes effect; a fraction of what a claim lasts."""


class Grip:
    """Holds one job inside its block.

    Attributes:
        held: Whether the job goes on here: it was neither aborted nor taken by another server.
    """

    def __init__(self, resources: Resources, job: Job, *, server: str) -> None:
        self._resources = resources
        self._job = job
        self._server = server
        self._due_ms = float(resources.clock.now_ms())
        self._keeping: asyncio.Task[None] | None = None
        self.held = True

    async def __aenter__(self) -> Grip:
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def turn(self, count: int = 1) -> bool:
        """Return when so many runs more may be acted on; False if the job does not go on here."""
        rate, clock = self._job.rate, self._resources.clock
        if rate is not None:
            # Time that was lost is not made up for: the pace is what others must bear.
            self._due_ms = max(self._due_ms, clock.now_ms() - 1000 / rate) + 1000 * count / rate
            while self.held and (left_ms := self._due_ms - clock.now_ms()) > 0:
                await clock.sleep(min(left_ms / 1000, LOOK))
        return self.held

    async def _keep(self) -> None:
        wanted = "aborting" if self._job.aborting else "running"
        while self.held:
            await asyncio.sleep(LOOK)
            now_ms = self._resources.clock.now_ms()
            try:
                async with self._resources.store.begin() as connection:
                    state = await bulk.keep(
                        connection, self._job.id, server=self._server, now_ms=now_ms
                    )
            except BrokertaskError:
                state = None
            self.held = state == wanted
