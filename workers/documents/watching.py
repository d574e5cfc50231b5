"""What the demonstration hears of its runs, by listening to their events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from brokertask import Event
from workers.documents.tasks import process_document, process_section

ENDED: Final = ("completed", "failed", "expired")
SETTLED_AFTER: Final = 0.1
"""From the event that tells of an attempt's end to the ack that follows it."""


@dataclass(slots=True)
class Seen:
    """What was heard of one run."""

    task: str
    name: str = ""
    status: str = "running"
    attempts: int = 1
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in ENDED


class Watch:
    """The documents' runs, and those of their sections as soon as they are known.

    Attributes:
        runs: What was heard of each run, by its id: the documents first.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.runs = {run_id: Seen(process_document.id, name) for run_id, name in names.items()}
        self._began = time.monotonic()
        # Runs of others may be on the broker too, and a section may end before its document.
        self._others: dict[str, Seen] = {}
        self._ends: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def documents(self) -> dict[str, Seen]:
        """The documents' runs."""
        return {id: run for id, run in self.runs.items() if run.task == process_document.id}

    @property
    def sections(self) -> dict[str, Seen]:
        """The runs of sections of documents that are done."""
        return {id: run for id, run in self.runs.items() if run.task == process_section.id}

    @property
    def done(self) -> int:
        """How many of the runs have ended."""
        return sum(run.ended for run in self.runs.values())

    def settled(self, run_id: str) -> int:
        """Return how many attempts of a run, whoever asked for it, are over and acked."""
        before = time.monotonic() - SETTLED_AFTER
        return sum(at < before for at in self._ends[run_id])

    def hear(self, event: Event) -> None:
        """Take note of an event."""
        run = self.runs.get(event.run_id) or self._others.setdefault(event.run_id, Seen(event.task))
        run.attempts = event.attempt
        if event.error is not None:
            run.error = event.error.message
        if event.event in (*ENDED, "retrying"):
            self._ends[event.run_id].append(time.monotonic())
        if event.event not in ENDED:
            return
        run.status, run.reason = event.event, event.reason or ""
        run.seconds = time.monotonic() - self._began
        run.result = msgpack.unpackb(event.result) if event.result else {}
        if event.run_id in self.runs:
            for section in run.result.get("sections", ()):
                # Not for the first time, if the run was repeated between this event and its ack.
                self.runs.setdefault(section, self._others.get(section, Seen(process_section.id)))
