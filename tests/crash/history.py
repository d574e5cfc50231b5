"""Kill servers, or stop their database, while runs are recorded: `python -m tests.crash.history`.

A worker in this process executes runs that succeed, succeed at the second attempt, or fail for
good, and keeps a log of its own of what it did. Afterwards the history of each run is held to it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
import uuid
from asyncio.subprocess import DEVNULL, Process
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask import App, Context, Retry, Settings
from brokertask.errors import StoreUnavailable
from brokertask.server import history
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import attempts, endings, outbox, runs, servers
from brokertask.values import MSGPACK, decode
from tests.crash.stage import ROOT, kill, private_node
from tests.postgres import Cluster, private_cluster

PORTION: Final = 500
AHEAD: Final = 5_000
"""Runs that are triggered before their turn."""
PATIENCE: Final = 60.0
"""Seconds without anything new in history, after which it is not waited for any longer."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is done, and how much harm."""

    runs: int = 100_000
    kills: int = 10
    outages: float = 0.0
    """Seconds for which the database is stopped now and then."""
    seed: int = 1


@dataclass
class Outcome:
    """What came of it."""

    options: Options
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    stops: int = 0
    worked: float = 0.0
    """Seconds from the first trigger to the end of the last run."""
    behind: float = 0.0
    """Seconds from there until history was complete."""
    worst_lag: float = 0.0
    """Seconds between an event and its row, at worst, as servers said."""
    most_behind: int = 0
    """Runs that had ended and were not yet recorded as ended, at worst."""

    def table(self) -> str:
        """Return it for people."""
        rate = self.options.runs / self.worked
        lines = {
            "runs": f"{self.options.runs} in {self.worked:.0f} s, {rate:.0f} a second",
            "servers killed": str(self.kills),
            "database stopped": f"{self.stops} times",
            "history complete": f"{self.behind:.1f} s after the last run",
            "lag, at worst": f"{self.worst_lag:.1f} s, {self.most_behind} runs",
            "wrong": f"{len(self.wrong)} {self.wrong[:5]}",
        }
        return "\n".join(f"{name:20}{value}" for name, value in lines.items())


class Work:
    """The app, and what its worker did."""

    def __init__(self, url: str) -> None:
        self.app = App("history", settings=Settings(amqp_url=url))
        self.begun: dict[str, int] = defaultdict(int)
        self.numbers: dict[str, int] = {}
        self.probes: set[str] = set()
        self.ended = 0
        retry = Retry(max_attempts=2, min_delay=0.01, jitter=False)

        @self.app.task(retry=retry, concurrency=100)
        async def work(number: int, ctx: Context) -> dict[str, int]:
            if ctx.run_id in self.probes:
                return {}
            self.begun[ctx.run_id] += 1
            if number % 97 == 0 or (number % 10 == 0 and self.begun[ctx.run_id] == 1):
                self.ended += number % 97 == 0 and ctx.attempt == 2
                raise ValueError(f"number {number}")
            self.ended += 1
            return {"number": number}

        self.task = work

    async def trigger(self, total: int) -> None:
        """Trigger every run, never too many before their turn."""
        for first in range(0, total, PORTION):
            while first - self.ended > AHEAD:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.05)
            numbers = range(first, min(first + PORTION, total))
            asked = await self.task.trigger_many(numbers, tags=["some"])
            self.numbers |= {run.run_id: n for run, n in zip(asked, numbers, strict=True)}

    def status(self, run_id: str) -> str:
        """Return how a run ended."""
        return "failed" if self.numbers[run_id] % 97 == 0 else "completed"


class Servers:
    """A server that is started again whenever it is gone."""

    def __init__(self, url: str, store: str, log: Path) -> None:
        self._environment = {
            **os.environ,
            "BROKERTASK_AMQP_URL": url,
            "BROKERTASK_SERVER_STORE_URL": store,
            "BROKERTASK_SERVER_BIND": "127.0.0.1:0",
        }
        self._log = log
        self.process: Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "brokertask.cli", "server"),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self._environment,
            )

    async def kill(self) -> None:
        if self.process is not None:
            kill(self.process.pid)
            await self.process.wait()

    async def stop(self) -> int:
        """Stop it in order, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return await self.process.wait()


class Play:
    """Runs, the harm that is done meanwhile, and what history says of it in the end."""

    def __init__(
        self, url: str, store: str, folder: Path, options: Options, cluster: Cluster | None = None
    ) -> None:
        self.work = Work(url)
        self.servers = Servers(url, store, folder / "servers.log")
        self.store = Database(store)
        self.outcome = Outcome(options)
        self._cluster = cluster
        self._random = random.Random(options.seed)

    async def run(self) -> Outcome:
        """Play it."""
        options, outcome = self.outcome.options, self.outcome
        await self.store.open()
        await self.servers.start()
        async with self.work.app as app, app.worker():
            await self._heard()
            began = time.monotonic()
            watching = asyncio.create_task(self._watch())
            async with asyncio.TaskGroup() as group:
                group.create_task(self.work.trigger(options.runs))
                harm = group.create_task(self._harm())
                while not self._over:  # noqa: ASYNC110 (nobody tells)
                    await asyncio.sleep(0.1)
                harm.cancel()
            outcome.worked = time.monotonic() - began
            await self._complete()
            watching.cancel()
            outcome.behind = time.monotonic() - began - outcome.worked
        # In order, it leaves nothing behind that it has begun.
        if code := await self.servers.stop():
            outcome.wrong.append(f"the server ended with {code}")
        outcome.wrong += [problem async for problem in self._problems()]
        await self.store.close()
        return outcome

    @property
    def _over(self) -> bool:
        """Whether every run has ended, and every server was killed that was to be."""
        options, outcome = self.outcome.options, self.outcome
        return self.work.ended >= options.runs and outcome.kills >= options.kills

    async def _heard(self) -> None:
        """Return when servers have copies of the task's triggers: from then on they miss none."""
        payload = None
        while payload is None:
            self.work.probes.add(run_id := str(uuid.uuid4()))
            run = await self.work.task.trigger(1, run_id=run_id)
            await asyncio.sleep(0.5)
            async with self.store.read() as connection:
                row = await history.shown(connection, run.run_id)
            payload = None if row is None else row["payload"]

    async def _watch(self) -> None:
        """Keep the worst of how far behind history is, by what servers say and by what is there."""
        outcome = self.outcome
        while True:
            await asyncio.sleep(2)
            with suppress(StoreUnavailable):
                async with self.store.read() as connection:
                    lag_ms = await connection.scalar(select(func.max(servers.c.lag_ms)))
                    behind = self.work.ended - await self._ended(connection)
                outcome.worst_lag = max(outcome.worst_lag, (lag_ms or 0) / 1000)
                outcome.most_behind = max(outcome.most_behind, behind)

    async def _harm(self) -> None:
        options = self.outcome.options
        for number in range(options.kills):
            due = options.runs * (number + 0.5) / options.kills
            while self.work.ended < due:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
            await asyncio.sleep(self._random.uniform(0, 0.5))
            await self.servers.kill()
            await self.servers.start()
            self.outcome.kills += 1
        while self._cluster is not None and options.outages:
            await asyncio.sleep(5.0)
            await asyncio.to_thread(self._cluster.stop)
            await asyncio.sleep(self._random.uniform(0, options.outages))
            await asyncio.to_thread(self._cluster.start)
            self.outcome.stops += 1

    async def _complete(self) -> None:
        """Return when every run has ended in history, or nothing comes any more."""
        seen, when = -1, time.monotonic()
        while time.monotonic() - when < PATIENCE:
            async with self.store.read() as connection:
                found = await self._ended(connection)
            if found == self.outcome.options.runs:
                return
            if found != seen:
                seen, when = found, time.monotonic()
            await asyncio.sleep(0.2)

    async def _ended(self, connection: AsyncConnection) -> int:
        """Return how many runs have ended in history; probes may have ended before it began."""
        ended = select(func.count()).where(
            runs.c.ended_ms.is_not(None), runs.c.run_id.not_in(self.work.probes)
        )
        return await connection.scalar(ended) or 0

    async def _problems(self) -> AsyncIterator[str]:
        """Yield whatever history says that the worker did not do, and the other way round."""
        async with self.store.read() as connection:
            tried: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
            for row in await connection.execute(select(attempts).order_by(attempts.c.attempt)):
                tried[row.run_id].append(dict(row._mapping))
            known = {}
            for row in await connection.execute(
                select(runs).where(runs.c.run_id.not_in(self.work.probes))
            ):
                known[row.run_id] = values = dict(row._mapping)
                for problem in self._differences(values, tried[row.run_id]):
                    yield f"{row.run_id}: {problem}"
            for run_id in self.work.numbers.keys() - known.keys():
                yield f"{run_id} is missing"
            own = endings.c.run_id.not_in(self.work.probes)
            for count, expected in (
                (select(func.count()).select_from(endings).where(own), self.outcome.options.runs),
                (select(func.count()).select_from(outbox), 0),
            ):
                if (found := await connection.scalar(count)) != expected:
                    yield f"{found} instead of {expected}: {count}"

    def _differences(self, row: Mapping[str, Any], tried: list[Mapping[str, Any]]) -> Iterator[str]:
        number = self.work.numbers.get(row["run_id"])
        if number is None:
            yield "nobody triggered it"
            return
        begun, status = self.work.begun[row["run_id"]], self.work.status(row["run_id"])
        expected = {
            "status": status,
            "attempt": begun,
            "task": self.work.task.id,
            "error_message": f"number {number}" if status == "failed" else None,
            "reason": "max_attempts" if status == "failed" else None,
        }
        yield from (f"{name} is {row[name]}" for name in expected if row[name] != expected[name])
        if history.tags_of(row) != ["some"]:
            yield f"tags are {row['tags']!r}"
        if row["payload"] is None or decode(row["payload"], MSGPACK) != number:
            yield "another payload"
        outcomes = [each["outcome"] for each in tried]
        if outcomes != ["retrying"] * (begun - 1) + [status]:
            yield f"attempts are {outcomes}"


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=Options.runs)
    parser.add_argument("--kills", type=int, default=Options.kills)
    parser.add_argument("--outages", type=float, default=Options.outages)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    given = vars(parser.parse_args())
    store = given.pop("store")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        node = private_node(folder / "rabbitmq")
        stack.callback(node.destroy)
        url, cluster = f"sqlite+aiosqlite:///{folder}/server.db", None
        if store == "postgresql":
            cluster = stack.enter_context(private_cluster())
            url = cluster.url
        outcome = await Play(node.url(), url, folder, Options(**given), cluster).run()
        print(f"{'store':20}{store}\n{outcome.table()}")
        return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
