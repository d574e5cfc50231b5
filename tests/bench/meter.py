"""What processes cost: processor time and memory of whole trees of them, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a tree of processes, in bytes."""

    resident: int
    """As `ps` shows it, added up: what processes share counts for each."""
    proportional: int
    """With what is shared divided by those that share it; 0 if the kernel does not say."""
    processes: int


def tree(pid: int) -> Iterator[int]:
    """Return a process and all below it, those that live."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        for thread in threads:
            for child in (thread / "children").read_text().split():
                yield from tree(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return


def cpu_seconds(pid: int) -> float:
    """Return the processor time, user and system, that a tree has used.

    What ended and was waited for is counted with its parent, so the sum never falls. The kernel
    counts in steps of 10 ms.
    """
    return sum(_ticks(each) for each in tree(pid)) / _TICKS


def machine_seconds() -> float:
    """Return the processor time that anybody has used on this machine since it was started."""
    user, nice, system, _idle, _iowait, irq, softirq = (
        int(number) for number in Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
    )
    return (user + nice + system + irq + softirq) / _TICKS


def memory(pid: int) -> Memory:
    """Return the memory of a tree."""
    resident = proportional = processes = 0
    for each in tree(pid):
        try:
            resident += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * _PAGE
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        processes += 1
        proportional += next(
            (int(line.split()[1]) * 1024 for line in rollup.splitlines() if line[:4] == "Pss:"), 0
        )
    return Memory(resident, proportional, processes)


def _ticks(pid: int) -> int:
    try:
        # The name, in brackets, may hold blanks; user, system and waited-for children follow.
        after = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(number) for number in after[11:15])
