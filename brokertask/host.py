"""What the code of one attempt may ask of its worker: to save its steps, to sleep, to tell news."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

from brokertask.attempt import Attempt
from brokertask.clock import Clock
from brokertask.events import Event, progress_event, step_event, warning_event
from brokertask.places import UNNAMED
from brokertask.reports import Reports

REPORT_PAUSE: Final = 0.5
"""At least so many seconds are between two events of one run's progress."""


class AttemptHost:
    """What the code of one attempt may ask of its worker: see `steps.Host`."""

    def __init__(
        self,
        attempt: Attempt,
        save: Callable[[Attempt], Awaitable[None]],
        tell: Callable[[Attempt, Event], Coroutine[Any, Any, None]],
        *,
        clock: Clock,
        worker: str,
        reports: Reports,
    ) -> None:
        self._reports = reports
        self._steps_told = len(attempt.envelope.memory.steps)
        self._attempt = attempt
        self._save = save
        self._publish = tell
        self._clock = clock
        self._worker = worker
        self._warnings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._reporting: asyncio.Task[None] | None = None
        self._news = False
        self._over = False

    async def save(self) -> None:
        """Return when the memory survives a crash, if the task wants that of each step."""
        if self._reports.wanted:
            self._tell_steps()
        if self._attempt.task.options.checkpoint == "step":
            await self._save(self._attempt)

    def _tell_steps(self) -> None:
        now, now_ms = self._attempt.now, self._clock.now_ms()
        for number in range(self._steps_told + 1, len(now.memory.steps) + 1):
            event = step_event(now, number, at_ms=now_ms, worker=self._worker)
            if now.memory.steps[number - 1].function not in UNNAMED:
                self._reports.tell(event)
        self._steps_told = len(now.memory.steps)

    def sleep(self, due_ms: int) -> None:
        """Let the run leave its slot until then."""
        self._attempt.sleep(due_ms)

    def wait(self, on: Sequence[str], due_ms: int | None) -> None:
        """Let the run leave its slot until a server says so, or until then."""
        self._attempt.wait(tuple(on), due_ms)

    async def find_server(self) -> int:
        """Return how often the run was redriven, if there is a server that its waits can go to."""
        await self._attempt.task.client.find_server()
        return self._attempt.envelope.redrives

    def warn(self, message: str) -> None:
        """Tell of what will end the run if it goes on; from any thread."""
        self._loop.call_soon_threadsafe(self._start_warning, message)

    def report(self) -> None:
        """Tell progress and metadata to whoever listens, soon; from any thread."""
        self._loop.call_soon_threadsafe(self._schedule)

    async def finish(self) -> None:
        """Tell the last news, so that they come before the end; nothing comes after it."""
        self._over = True
        if self._warnings:
            await asyncio.gather(*self._warnings, return_exceptions=True)
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
            if self._news:
                await self._tell()

    def _start_warning(self, message: str) -> None:
        attempt, now_ms = self._attempt, self._clock.now_ms()
        event = warning_event(attempt.remembering, message, at_ms=now_ms, worker=self._worker)
        warning = asyncio.create_task(self._publish(attempt, event))
        self._warnings.add(warning)
        warning.add_done_callback(self._warnings.discard)

    def _schedule(self) -> None:
        self._news = True
        if self._reporting is None and not self._over:
            self._reporting = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        while self._news:
            await self._tell()
            await asyncio.sleep(REPORT_PAUSE)
        self._reporting = None

    async def _tell(self) -> None:
        self._news = False
        context = self._attempt.context
        if context is not None:
            done, total = context.progressed or (None, None)
            now, now_ms = self._attempt.remembering, self._clock.now_ms()
            event = progress_event(now, done, total, at_ms=now_ms, worker=self._worker)
            try:
                await self._publish(self._attempt, event)
            except asyncio.CancelledError:
                self._news = True
                raise
