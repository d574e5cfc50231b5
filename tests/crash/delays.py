"""How late delays are: `python -m tests.crash.delays`, on a private RabbitMQ of its own."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from infra.rabbitmq.node import Node
from tests.crash.stage import Stage, eventually, private_node

CLOCK_STEP = 0.001
"""Due times are whole milliseconds, so a start may be early by a part of one."""


async def lateness(stage: Stage, delays: Sequence[float]) -> list[float]:
    """Trigger one run for each delay, at once, and return by how many seconds each was late."""
    due: dict[str, float] = {}
    for delay in delays:
        now = time.monotonic()
        run = await stage.trigger("quick", 1, delay=delay)
        due[run.run_id] = now + delay

    def started() -> dict[str, float]:
        starts = {
            entry.run_id: entry.at for entry in stage.journal.entries if entry.fact == "started"
        }
        return {run_id: starts[run_id] for run_id in due if run_id in starts}

    await eventually(
        lambda: len(started()) == len(due), "start of every run", timeout=max(delays) + 30
    )
    starts = started()
    return [starts[run_id] - at for run_id, at in due.items()]


def early(lates: Sequence[float]) -> int:
    """Return how many started before they were due."""
    return sum(late < -CLOCK_STEP for late in lates)


def report(lates: Sequence[float]) -> str:
    """Return one line about them."""
    percentiles = statistics.quantiles(lates, n=100, method="inclusive")
    return (
        f"{len(lates)} delays: late by p50 {percentiles[49] * 1000:.0f} ms, "
        f"p99 {percentiles[98] * 1000:.0f} ms, at most {max(lates) * 1000:.0f} ms; "
        f"early: {early(lates)}"
    )


async def _measure(node: Node, folder: Path, count: int, seed: int) -> int:
    choice = random.Random(seed)
    async with Stage(node, node.url(), folder) as stage:
        await stage.worker()
        longer, shorter = await lateness(stage, [30, 1])
        print(f"1 s behind 30 s: late by {shorter * 1000:.0f} ms (and {longer * 1000:.0f} ms)")
        lates = await lateness(stage, [choice.uniform(0.1, 30) for _ in range(count)])
        print(report(lates))
        await stage.check()
    return 1 if early([longer, shorter, *lates]) or shorter > 1 else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="brokertask-delays-") as name:
        folder = Path(name)
        node = private_node(folder / "node")
        try:
            sys.exit(asyncio.run(_measure(node, folder, options.count, options.seed)))
        finally:
            node.destroy()


if __name__ == "__main__":
    main()
