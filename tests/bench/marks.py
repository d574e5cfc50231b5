"""What a measured program is told, and how it says when each task began.

Standard library only: the programs of the peers import it, in an environment of their own.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["classic", "quorum"]

VARIABLE: Final = "BENCH_SETUP"
QUEUE: Final = "bench"
"""The queue of every peer."""
BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a measured program has to know; it is passed on in one variable of its environment."""

    url: str
    folder: str
    kind: Kind = "classic"
    concurrency: int = 100
    processes: int = 1
    confirm: bool = True
    """False only to fill a queue before a measurement, where waiting would measure nothing."""
    sync: bool = False
    """The task is a plain function, which runs in a thread."""
    tasks: int = 1
    """How many tasks the messages are spread over."""
    retry_after: float = 0.0
    """If set, every first attempt fails and asks for this delay."""

    @classmethod
    def read(cls) -> Setup:
        """Return what the harness has put into the environment."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> Mapping[str, str]:
        """Return the variables of a process that is to read it."""
        return {VARIABLE: json.dumps(asdict(self))}

    def started(self) -> Marks:
        """Return the marks of the tasks that began."""
        return Marks(Path(self.folder) / "started")

    def sent(self) -> Marks:
        """Return the marks of the calls that enqueued them."""
        return Marks(Path(self.folder) / "sent")


class Marks:
    """For each task number an instant of the monotonic clock, which all processes share.

    They are in a file that is mapped into memory: to mark costs 0.2 µs and no system call.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._at = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self._reached = 0

    @staticmethod
    def create(path: Path, count: int) -> Marks:
        """Make the file for this many tasks, none of them marked."""
        path.write_bytes(bytes(count * BYTES))
        return Marks(path)

    def mark(self, number: int) -> None:
        """Say that task `number` is here, now."""
        self._at[number] = monotonic_ns()

    def reached(self) -> int:
        """Return below which number all are marked; each call goes on where the last one ended."""
        while self._reached < len(self._at) and self._at[self._reached]:
            self._reached += 1
        return self._reached

    def seconds(self) -> list[float]:
        """Return when each of them was marked, those that were."""
        return [at / 1e9 for at in self._at if at]

    def __getitem__(self, number: int) -> float:
        return self._at[number] / 1e9
