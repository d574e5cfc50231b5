"""How long a page of a large history takes: `python -m tests.bench.history --runs 1000000`.

A store is filled with runs, then asked by every kind of filter, in random order: for its first
page, for one further behind, and for its counts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from brokertask.server.history import RunFilter, counted, listed
from brokertask.server.runs import TAG, Fact, record
from brokertask.server.store.engine import Database
from tests.postgres import cluster

BATCH: Final = 2_000
DAY_MS: Final = 86_400_000
BEGAN_MS: Final = 1_760_000_000_000
DAYS: Final = 30
TASKS: Final = 50
WORKERS: Final = 20
ROUNDS: Final = 10
GOAL_MS: Final = 50.0
PAYLOAD: Final = bytes(200)


def run_id(number: int) -> str:
    return f"0199c0de-0000-7000-8000-{number:012d}"


def fact(number: int, total: int) -> Fact:
    """A run that is one of a plausible month: 3 of 100 failed, 1 of 1,000 is under way."""
    chance = random.Random(number)
    at_ms = BEGAN_MS + number * DAYS * DAY_MS // total
    status = chance.choices(
        ["completed", "failed", "retrying", "running", "queued", "cancelled"],
        [960, 30, 2, 1, 2, 5],
    )[0]
    tags = ["web"] * (chance.random() < 0.5) + [f"customer-{chance.randrange(total // 100 + 1)}"]
    erred = status in ("failed", "retrying")
    return Fact(
        run_id=run_id(number),
        task=f"task-{min(int(chance.expovariate(0.1)), TASKS - 1)}",
        place=10**16,
        at_ms=at_ms + 100,
        latest={
            "status": status,
            "redrives": 0,
            "attempt": 1 + erred,
            "worker": None if status == "queued" else f"worker-{chance.randrange(WORKERS)}",
            "reason": "max_attempts" if status == "failed" else None,
            "error_type": chance.choice(["TimeoutError", "ValueError"]) if erred else None,
            "error_message": f"order {number} is not there" if erred else None,
            "ended_ms": at_ms + 100 if status in ("completed", "failed", "cancelled") else None,
        },
        asked={
            "triggered_ms": at_ms,
            "tags": f"{TAG}{TAG.join(tags)}{TAG}",
            "parent": run_id(chance.randrange(total // 10 + 1)) if chance.random() < 0.2 else None,
            "root": run_id(chance.randrange(total // 100 + 1)) if chance.random() < 0.2 else None,
            "trace_id": f"{chance.getrandbits(128):032x}",
            "payload": PAYLOAD,
            "content_type": "application/msgpack",
            "payload_state": "kept",
        },
    )


def filters(total: int, chance: random.Random) -> dict[str, RunFilter]:
    """One of each kind, with random values."""
    task = f"task-{chance.randrange(TASKS // 2)}"
    since_ms = BEGAN_MS + chance.randrange(DAYS) * DAY_MS
    day: dict[str, Any] = {"since_ms": since_ms, "until_ms": since_ms + DAY_MS}
    number = chance.randrange(total // 100 + 1)
    return {
        "all": RunFilter(),
        "a day": RunFilter(**day),
        "status completed": RunFilter(statuses=("completed",)),
        "status failed": RunFilter(statuses=("failed",)),
        "status of three": RunFilter(statuses=("completed", "failed", "running")),
        "status queued, a day": RunFilter(statuses=("queued",), **day),
        "task": RunFilter(task=task),
        "task, failed": RunFilter(task=task, statuses=("failed",)),
        "task, a day": RunFilter(task=task, **day),
        "tag of half": RunFilter(tags=("web",)),
        "tag of few": RunFilter(tags=(f"customer-{number}",)),
        "two tags": RunFilter(tags=(f"customer-{number}", "web")),
        "tag, failed": RunFilter(tags=("web",), statuses=("failed",)),
        "error, common": RunFilter(error="timeout"),
        "error, of one": RunFilter(error=f"order {number} is"),
        "parent": RunFilter(parent=run_id(chance.randrange(total // 10 + 1))),
        "root": RunFilter(root=run_id(number)),
        "trace": RunFilter(trace_id=f"{chance.getrandbits(128):032x}"),
        "worker": RunFilter(worker=f"worker-{chance.randrange(WORKERS)}"),
        "worker, failed": RunFilter(worker="worker-1", statuses=("failed",)),
    }


@dataclass(slots=True)
class Times:
    """What was measured, in milliseconds, by the kind of filter."""

    pages: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)

    def show(self) -> None:
        print(f"{'filter':22} {'page':>9} {'worst':>9} {'counts':>9} {'worst':>9}   (ms)")
        for kind, pages in self.pages.items():
            counts = self.counts[kind]
            found = statistics.median(pages), max(pages), statistics.median(counts), max(counts)
            print(f"{kind:22} " + " ".join(f"{value:9.1f}" for value in found))
        for name, by_kind in (("pages", self.pages), ("counts", self.counts)):
            every = sorted(value for values in by_kind.values() for value in values)
            median, slow = statistics.median(every), every[len(every) * 95 // 100]
            verdict = "within" if median <= GOAL_MS else "OVER"
            print(f"{name}: median {median:.1f} ms, p95 {slow:.1f} ms; {verdict} {GOAL_MS:g} ms")


async def fill(store: Database, total: int) -> None:
    began = time.monotonic()
    for first in range(0, total, BATCH):
        some = [fact(number, total) for number in range(first, min(first + BATCH, total))]
        async with store.begin() as connection:
            await record(connection, some)
    print(f"{total} runs in {time.monotonic() - began:.0f} s", flush=True)


async def measure(store: Database, total: int) -> Times:
    times, chance = Times(), random.Random(1)
    async with store.read() as connection:
        for _ in range(ROUNDS):
            asked = list(filters(total, chance).items())
            chance.shuffle(asked)
            for kind, wanted in asked:
                page, rows = await timed(lambda: listed(connection, wanted))  # noqa: B023
                if len(rows) == 50:
                    behind = rows[-1]["triggered_ms"], rows[-1]["run_id"]
                    again, _ = await timed(lambda: listed(connection, wanted, before=behind))  # noqa: B023
                    times.pages.setdefault(kind, []).append(again)
                times.pages.setdefault(kind, []).append(page)
                count, _ = await timed(lambda: counted(connection, wanted))  # noqa: B023
                times.counts.setdefault(kind, []).append(count)
    return times


async def timed(work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = await work()
    return (time.perf_counter() - began) * 1000, found


@asynccontextmanager
async def opened(kind: str) -> AsyncIterator[Database]:
    async with AsyncExitStack() as stack:
        if kind == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = Database(f"sqlite+aiosqlite:///{folder}/server.db")
        else:
            store = Database(stack.enter_context(cluster()))
        stack.push_async_callback(store.close)
        await store.open()
        yield store


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    options = parser.parse_args()
    async with opened(options.store) as store:
        await fill(store, options.runs)
        print(options.store)
        (await measure(store, options.runs)).show()


if __name__ == "__main__":
    asyncio.run(main())
