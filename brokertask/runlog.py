"""The lines that runs write to `ctx.log`, told in batches."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from brokertask.events import Event, log_event
from brokertask.reports import Reports
from brokertask.values import clip

PAUSE: Final = 0.5
"""Seconds within which the lines of one run go together."""
MOST: Final = 10_000
"""Lines that are kept until then; more are dropped."""


class RunLog(logging.Handler):
    """Takes the records of one worker's runs, from any thread; none, while nobody keeps them."""

    def __init__(self, reports: Reports, *, worker: str) -> None:
        super().__init__()
        self._reports = reports
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._kept = threading.Lock()
        self._lines: dict[tuple[str, str, int], list[tuple[int, str, str]]] = {}
        self._count = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take the records that runs write inside the block; the last are told at its end."""
        written = logging.getLogger("brokertask.task")
        written.addHandler(self)
        try:
            yield
        finally:
            written.removeHandler(self)
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line of a run for a moment."""
        if getattr(record, "worker", None) != self._worker or not self._reports.wanted:
            return
        key = record.run_id, record.task, record.attempt  # type: ignore[attr-defined]
        line = round(record.created * 1000), record.levelname, clip(_text(record))
        with self._kept:
            first, self._count = not self._lines, self._count + 1
            if self._count <= MOST:
                self._lines.setdefault(key, []).append(line)
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, PAUSE, self.flush)

    def flush(self) -> None:
        """Tell what is kept."""
        with self._kept:
            lines, self._lines, self._count = self._lines, {}, 0
        for (run_id, task, attempt), some in lines.items():
            self._reports.tell(self._event(run_id, task, attempt, some))

    def _event(
        self, run_id: str, task: str, attempt: int, lines: list[tuple[int, str, str]]
    ) -> Event:
        return log_event(run_id, task, attempt=attempt, worker=self._worker, lines=lines)


def _text(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:
        # A line that does not fit its arguments is a mistake, and none that a run must fail for.
        return str(record.msg)
