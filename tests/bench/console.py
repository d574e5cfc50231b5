"""How long the console takes over a large history: `python -m tests.bench.console --runs 1000000`.

Each page is asked for as a browser asks, in random order, and made whole: the time is that of the
server, from the request to the last byte.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from typing import Final

import httpx

from brokertask import App, Settings
from brokertask.claims import Claims
from brokertask.clock import SystemClock
from brokertask.server.outbox import Outbox
from brokertask.server.resources import Resources
from brokertask.server.site import make_app
from brokertask.server.store.engine import Database
from tests.bench.history import BEGAN_MS, DAY_MS, fill, opened, run_id, timed

ROUNDS: Final = 20
GOAL_MS: Final = 100.0


def paths(total: int, chance: random.Random) -> dict[str, str]:
    """One of each kind, with random values."""
    number = chance.randrange(total // 100 + 1)
    return {
        "runs": "runs",
        "runs, refreshed": "runs?as_of=1762000000000",
        "runs, failed": "runs?status=failed",
        "runs of a task": f"runs?task=task-{chance.randrange(25)}",
        "runs with a tag": f"runs?tag=customer-{number}",
        "runs by an error": f"runs?error=order+{number}+is",
        "runs of a day": f"runs?since_ms={BEGAN_MS}&until_ms={BEGAN_MS + DAY_MS}",
        "a run": f"runs/{run_id(chance.randrange(total))}",
        "overview": "",
        "tasks": "tasks",
    }


async def measure(store: Database, total: int) -> dict[str, list[float]]:
    settings = Settings(amqp_url="memory:")
    resources = Resources(
        store=store,
        outbox=Outbox(),
        transport=App("bench", settings=settings).connect(),
        broker_settings=settings,
        clock=SystemClock(),
        claims=Claims(None, above=0),
    )
    asgi = httpx.ASGITransport(make_app(resources, open_here=True, rate=1_000_000))
    times: dict[str, list[float]] = {}
    chance = random.Random(1)
    async with httpx.AsyncClient(transport=asgi, base_url="http://localhost/") as client:
        for number in range(ROUNDS + 1):
            asked = list(paths(total, chance).items())
            chance.shuffle(asked)
            for kind, path in asked:
                took, response = await timed(lambda: client.get(path))  # noqa: B023
                response.raise_for_status()
                if number:  # The first one of each compiles its template.
                    times.setdefault(kind, []).append(took)
    return times


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    options = parser.parse_args()
    async with opened(options.store) as store:
        await fill(store, options.runs)
        times = await measure(store, options.runs)
    print(f"{options.store}\n{'page':22} {'median':>9} {'worst':>9}   (ms)")
    for kind, values in times.items():
        print(f"{kind:22} {statistics.median(values):9.1f} {max(values):9.1f}")
    runs = statistics.median(
        value for kind, values in times.items() if kind.startswith("runs") for value in values
    )
    print(f"runs: median {runs:.1f} ms; {'within' if runs <= GOAL_MS else 'OVER'} {GOAL_MS:g} ms")


if __name__ == "__main__":
    asyncio.run(main())
