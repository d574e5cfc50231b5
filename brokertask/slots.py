"""The slots of a worker: how many runs of each task it executes at a time, and never more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from brokertask.attempt import Attempt
from brokertask.telemetry import Telemetry
from brokertask.window import Window


class Slots:
    """One semaphore for each task.

    Code that ignores its cancellation has lost its run, but it runs: it keeps its slot, and no
    message is taken for that, until it ends.
    """

    def __init__(
        self, concurrency: Mapping[str, int], windows: Mapping[str, Window], telemetry: Telemetry
    ) -> None:
        self._free = {task: asyncio.Semaphore(count) for task, count in concurrency.items()}
        self._windows = windows
        self._telemetry = telemetry

    @asynccontextmanager
    async def one(self, attempt: Attempt) -> AsyncIterator[None]:
        """Wait for a free slot, and have it inside the block, and for as long as the code runs."""
        task = attempt.task.id
        await self._free[task].acquire()
        self._telemetry.active(task, 1)
        try:
            yield
        finally:
            code = attempt.user
            if code is None or code.done():
                self._give_back(task)
            else:
                self._windows[task].occupy()
                code.add_done_callback(lambda _: self._left(task))

    def _left(self, task: str) -> None:
        self._windows[task].give_back()
        self._give_back(task)

    def _give_back(self, task: str) -> None:
        self._telemetry.active(task, -1)
        self._free[task].release()
