"""The access log of the services that the tasks use: what they were asked for, and by whom.

It is kept outside brokertask, so that the demonstration can count what was really done. The
environment variable DOCUMENTS_ACCESS_LOG says where; without it there is none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

VARIABLE: Final = "DOCUMENTS_ACCESS_LOG"
Fact: TypeAlias = Literal["fetched", "asked", "busy", "down", "answered"]
"""A document was fetched; a summary was asked for, and refused for now, or later, or given."""


@dataclass(frozen=True, slots=True)
class Access:
    """One line of the log."""

    pid: int
    """The process that asked."""
    run_id: str
    fact: Fact


def tell(run_id: str, fact: Fact) -> None:
    """Add a line of this process, if there is a log; other processes may do so too."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {run_id} {fact}\n")


def read(path: Path) -> list[Access]:
    """Return what the log holds, the oldest first; nothing if there is none yet."""
    if not path.exists():
        return []
    # The last line may still be in the writing.
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [line.split() for line in whole.splitlines()]
    return [Access(int(pid), run_id, cast("Fact", fact)) for pid, run_id, fact in lines]
