"""What tasks really did, told outside brokertask: one line a fact, appended in one write.

What is written survives kill -9 of its writer; with `durable` it is also on the disk before the
task goes on.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from brokertask import Context

VARIABLE = "CRASH_JOURNAL"
DURABLE_VARIABLE = "CRASH_JOURNAL_DURABLE"
STARTED = "started"
LEFT = "left"
"""The body ended by an exception, or was cancelled."""
ENDED = ("finished", LEFT)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    fact: str
    """`started`, `finished` or `left`; what else a task tells, such as a step it does."""
    run_id: str
    task: str
    attempt: int
    pid: int
    at: float
    """Seconds on the machine's monotonic clock, the same in every process."""


class Pen:
    """Writes the journal of the environment; a process opens it at its first line."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def write(self, fact: str, context: Context) -> None:
        if self._descriptor is None:
            flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
            self._descriptor = os.open(os.environ[VARIABLE], flags)
        words = (fact, context.run_id, context.task, context.attempt, os.getpid(), time.monotonic())
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())
        if os.environ.get(DURABLE_VARIABLE):
            os.fsync(self._descriptor)

    @contextmanager
    def told(self, context: Context) -> Iterator[None]:
        """Tell when the body of a task starts, and how it ends."""
        self.write("started", context)
        try:
            yield
        except BaseException:
            self.write(LEFT, context)
            raise
        self.write("finished", context)


class Journal:
    """Reads a journal, again and again while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._entries: list[Entry] = []
        self._finished: Counter[str] = Counter()

    @property
    def entries(self) -> list[Entry]:
        """Every line so far, in the order they were written."""
        self._catch_up()
        return self._entries

    def finished(self) -> Counter[str]:
        """How often the body of each run came to its end."""
        self._catch_up()
        return self._finished

    def of(self, run_id: str, fact: str | None = None) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if entry.run_id == run_id and (fact is None or entry.fact == fact)
        ]

    def running(self) -> list[Entry]:
        """The starts that have no end yet."""
        open_: dict[tuple[int, str, int], Entry] = {}
        for entry in self.entries:
            key = entry.pid, entry.run_id, entry.attempt
            if entry.fact == STARTED:
                open_[key] = entry
            elif entry.fact in ENDED:
                open_.pop(key, None)
        return list(open_.values())

    def most_at_once(self) -> dict[str, int]:
        """The largest number of runs of each task that one process had at a time."""
        now: dict[tuple[int, str], int] = defaultdict(int)
        most: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            key = entry.pid, entry.task
            now[key] += (entry.fact == STARTED) - (entry.fact in ENDED)
            most[entry.task] = max(most[entry.task], now[key])
        return dict(most)

    def _catch_up(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            entry = _entry(line)
            self._entries.append(entry)
            if entry.fact == "finished":
                self._finished[entry.run_id] += 1


def _entry(line: str) -> Entry:
    fact, run_id, task, attempt, pid, at = line.rsplit(" ", 5)
    return Entry(fact, run_id, task, int(attempt), int(pid), float(at))
