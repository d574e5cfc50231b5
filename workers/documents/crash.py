"""The crash of the demonstration: a worker process is killed in the middle of its runs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from workers.documents.accesslog import Access, read
from workers.documents.watching import Watch

PAUSE: Final = 0.02
STILL: Final = 0.05
"""By then a process that was told to stand still does so, and what it has sent has arrived."""


@dataclass(frozen=True, slots=True)
class Crash:
    """A process that was killed, and the documents' runs that it was half-way through."""

    pid: int
    runs: frozenset[str]


async def crash(log: Path, watch: Watch) -> Crash:
    """Kill a worker process that is half-way through a document, once half of them are fetched."""
    while True:
        accesses = read(log)
        fetched = {access.run_id for access in accesses if access.fact == "fetched"}
        if 2 * len(fetched & watch.documents.keys()) >= len(watch.documents):
            for pid in {access.pid for access in accesses}:
                with suppress(ProcessLookupError):
                    if runs := await kill_half_way(pid, log, watch):
                        return Crash(pid, runs)
        await asyncio.sleep(PAUSE)


async def kill_half_way(pid: int, log: Path, watch: Watch) -> frozenset[str]:
    """Kill a process if it is half-way through runs, and return those.

    It stands still while that is decided, so that what the log says of it remains true.
    """
    if not half_way(pid, read(log), watch.settled):
        return frozenset()
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(STILL)
        runs = half_way(pid, read(log), watch.settled) & watch.documents.keys()
        if runs:
            os.kill(pid, signal.SIGKILL)
        return runs
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def half_way(pid: int, accesses: Sequence[Access], settled: Callable[[str], int]) -> frozenset[str]:
    """Return the runs for which a process waits for a summary, having fetched the document.

    None if it may have another run in hand that has done something which is not remembered yet,
    or has ended without an ack: after a crash that would be done once more, as it has to be.

    Args:
        pid: The process.
        accesses: The access log.
        settled: Tells how many attempts of a run are over and acked.
    """
    facts = defaultdict(list)
    pids = {}
    for access in accesses:
        facts[access.run_id].append(access.fact)
        pids[access.run_id] = access.pid
    ours = {run_id for run_id in pids if pids[run_id] == pid}
    waiting = {run_id for run_id in ours if facts[run_id][-1] in ("asked", "busy")}
    for run_id in ours - waiting:
        ends = facts[run_id].count("answered") + facts[run_id].count("down")
        if settled(run_id) < max(1, ends):
            return frozenset()
    return frozenset(waiting)
