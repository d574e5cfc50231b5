"""A server's hold on a job: kept while it works, and looked after for an abort; and its pace."""

from __future__ import annotations

from typing import Final

from brokertask.server import bulk
from brokertask.server.bulk import Job
from brokertask.server.resources import Resources

LOOK_MS: Final = 1_000
"""How soon an abort takes effect."""


class Grip:
    """Holds one job.

    Attributes:
        held: Whether the job goes on here: it was neither aborted nor taken by another server.
    """

    def __init__(self, resources: Resources, job: Job, *, server: str) -> None:
        self._resources = resources
        self._job = job
        self._server = server
        self._looked_ms = resources.clock.now_ms()
        self._due_ms = float(self._looked_ms)
        self.held = True

    async def turn(self, count: int = 1) -> bool:
        """Return when so many runs more may be acted on; False if the job does not go on here."""
        rate, clock = self._job.rate, self._resources.clock
        if rate is not None:
            # Time that was lost is not made up for: the pace is what others must bear.
            self._due_ms = max(self._due_ms, clock.now_ms() - 1000 / rate) + 1000 * count / rate
            while self.held and (left_ms := self._due_ms - clock.now_ms()) > 0:
                await clock.sleep(min(left_ms, LOOK_MS) / 1000)
                await self._look()
        await self._look()
        return self.held

    async def _look(self) -> None:
        now_ms = self._resources.clock.now_ms()
        if not self.held or now_ms < self._looked_ms + LOOK_MS:
            return
        self._looked_ms = now_ms
        async with self._resources.store.begin() as connection:
            state = await bulk.keep(connection, self._job.id, server=self._server, now_ms=now_ms)
        self.held = state == ("aborting" if self._job.aborting else "running")
