"""What steps cost on RabbitMQ: `python -m tests.bench.steps [--runs 200]`.

One worker in this process executes runs of ten steps that do nothing, with `checkpoint="step"` and
with `"retry"`, side by side and alternating; the broker itself counts what each checkpoint made it
do.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import quote

from brokertask import App, Context, Settings, Task
from infra.rabbitmq.node import Node
from tests.crash.stage import eventually, private_node

STEPS: Final = 10
ROUNDS: Final = 5
VHOST: Final = quote("/", safe="")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run, in ms."""

    latency: float
    """From trigger to result, alone."""
    wall: float
    """Its part of the time that many take together."""
    cpu: float
    """Of this process: publisher and worker."""


def make_app(url: str) -> tuple[App, dict[str, Task[None, int]]]:
    app = App("bench", settings=Settings(amqp_url=url))

    async def nothing() -> int:
        return 1

    async def ten_steps(ctx: Context) -> int:
        return sum([await ctx.step(f"step {number}", nothing) for number in range(STEPS)])

    tasks: dict[str, Task[None, int]] = {
        "step": app.task(id="saved_each", concurrency=50, checkpoint="step")(ten_steps),
        "retry": app.task(id="saved_at_the_end", concurrency=50, checkpoint="retry")(ten_steps),
    }
    return app, tasks


async def measure(task: Task[None, int], runs: int) -> Cost:
    """Return what a run of `task` costs, alone and among many."""
    alone = []
    for _ in range(10):
        begun = time.perf_counter()
        await (await task.trigger()).result(timeout=30)
        alone.append(time.perf_counter() - begun)
    begun, cpu = time.perf_counter(), time.process_time()
    triggered = await task.trigger_many([None] * runs)
    for run in triggered:
        assert await run.result(timeout=60) == STEPS
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return Cost(median(alone) * 1e3, wall / runs * 1e3, cpu / runs * 1e3)


async def bench(node: Node, runs: int) -> None:
    app, tasks = make_app(node.url())
    async with app, app.worker():
        costs: dict[str, list[Cost]] = {name: [] for name in tasks}
        for _ in range(ROUNDS):
            for name, task in tasks.items():
                costs[name].append(await measure(task, runs))
        print(f"a run of {STEPS} steps, medians of {ROUNDS} rounds of {runs} runs, in ms")
        print(f"{'checkpoint':12}{'alone':>8}{'of many':>10}{'CPU':>8}")
        for name, found in costs.items():
            middle = [median(getattr(cost, part) for cost in found) for part in Cost.__slots__]
            print(f"{name:12}{middle[0]:8.1f}{middle[1]:10.2f}{middle[2]:8.2f}")
        saved = ROUNDS * (runs + 10) * STEPS
        counted = await stats(node, "bt.inflight.", saved)
        told = ", ".join(f"{counted[what] / saved:.3f} {what}" for what in counted)
        print(f"{saved} checkpoints, by the broker's count of each: {told}")


async def stats(node: Node, prefix: str, published: int) -> dict[str, int]:
    """Return what happened to the messages of a queue, once the broker has counted them."""

    def seen() -> dict[str, Any] | None:
        for queue in node.api("GET", f"/api/queues/{VHOST}"):
            if queue["name"].startswith(prefix):
                found: dict[str, Any] = queue.get("message_stats", {})
                return found if found.get("ack", 0) >= published else None
        return None

    found = await eventually(seen, "statistics", timeout=15)
    return {"publishes": found["publish"], "deliveries": found["deliver"], "acks": found["ack"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="brokertask-bench-") as folder:
        node = private_node(Path(folder) / "node")
        try:
            asyncio.run(bench(node, runs))
        finally:
            node.destroy()


if __name__ == "__main__":
    main()
