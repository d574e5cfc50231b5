"""What figures cost over many runs, on SQLite: `python -m tests.bench.figures [RUNS]`."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile

from brokertask.server import bulk, dead, figures
from brokertask.server.history import RunFilter
from brokertask.server.store.engine import Database
from tests.bench.history import BEGAN_MS, DAY_MS, DAYS, fill, timed

ROUNDS = 10


async def main(total: int) -> None:
    """Fill a store, and measure."""
    now_ms = BEGAN_MS + DAYS * DAY_MS
    with tempfile.TemporaryDirectory() as folder:
        store = Database(f"sqlite+aiosqlite:///{folder}/store.db")
        await store.open()
        await fill(store, total)
        async with store.read() as connection:
            asked = {
                "overview": lambda: figures.going(connection, now_ms=now_ms),
                "tasks, a day": lambda: figures.done(connection, since_ms=now_ms - DAY_MS),
                "tasks, all": lambda: figures.done(connection, since_ms=0),
                "one task, all": lambda: figures.done(connection, since_ms=0, task="task-1"),
                "dead, grouped": lambda: dead.grouped(connection, now_ms=now_ms),
                "preview of a job": lambda: bulk.previewed(connection, "redrive", RunFilter()),
            }
            for name, work in asked.items():
                times = [(await timed(work))[0] for _ in range(ROUNDS)]
                print(f"{name:20} {statistics.median(times):8.1f} ms, at worst {max(times):.1f} ms")
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
