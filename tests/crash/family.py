"""Kill workers and servers under parents that wait for children: `python -m tests.crash.family`.

Each parent waits for its children side by side, so that it goes on once for each that ends, and
tells the journal when it does. What it tells twice must have a reason: a worker that was killed
with the run in its hands, or between a confirm and its ack.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from brokertask import App, Context, Retry, Settings
from infra.rabbitmq.node import Node
from tests.crash.journal import Entry, Journal, Pen
from tests.crash.stage import ROOT, WorkerProcess, eventually, start_worker

APP: Final = "tests.crash.family:app"
CHILDREN: Final = 3
ENDING: Final = 300.0
PAUSE: Final = 1.0
"""Seconds between some triggers and the next: there is work as long as there are kills."""

pen = Pen()
app = App("family")


@app.task(retry=Retry(max_attempts=20, min_delay=0.05, max_delay=0.2), concurrency=20)
async def child(number: int, ctx: Context) -> int:
    with pen.told(ctx):
        await asyncio.sleep(random.uniform(0, 0.05))
        return number + 1


@app.task(retry=Retry(max_attempts=20, min_delay=0.05, max_delay=0.2), concurrency=20)
async def parent(number: int, ctx: Context) -> int:
    with pen.told(ctx):

        async def one(place: int) -> int:
            got: int = await ctx.wait_for(child.call(number * CHILDREN + place), name=f"{place}")
            pen.write(f"got:{place}", ctx)
            return got

        return sum(await asyncio.gather(*(one(place) for place in range(CHILDREN))))


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is done, and how much harm."""

    parents: int = 5_000
    workers: int = 2
    servers: int = 2
    worker_kills: int = 30
    server_kills: int = 30
    seed: int = 1
    store: str = ""
    """A SQLAlchemy URL; a new SQLite file by default."""

    @property
    def kills(self) -> int:
        """How many processes are killed."""
        return self.worker_kills + self.server_kills


@dataclass
class Outcome:
    """What came of it."""

    options: Options
    completed: int = 0
    wrong: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    children: int = 0
    children_twice: int = 0
    stretches: int = 0
    sent_twice: list[str] = field(default_factory=list)
    """Runs that two processes had, without a kill that explains it."""
    explained: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    seconds: float = 0

    def violations(self) -> Iterator[str]:
        """Say what must not be."""
        if self.missing:
            yield f"{len(self.missing)} parents did not complete: {sorted(self.missing)[:3]}"
        if self.wrong:
            yield f"wrong results: {self.wrong[:3]}"
        if self.sent_twice:
            yield f"{len(self.sent_twice)} ran twice without a reason: {self.sent_twice[:3]}"

    def table(self) -> str:
        """Return it for people."""
        lines = {
            "parents completed": f"{self.completed} of {self.options.parents}",
            "children executed": f"{self.children}, {self.children_twice} of them more than once",
            "stretches of parents": str(self.stretches),
            "kills": f"{self.kills} of workers and servers",
            "doubles explained": dict(self.explained).__repr__(),
            "doubles unexplained": str(len(self.sent_twice)),
            "time": f"{self.seconds:.0f} s",
        }
        return "\n".join(f"{name:22}{value}" for name, value in lines.items())


class Play:
    """Workers and servers that are killed and started again, and parents that wait."""

    def __init__(self, url: str, folder: Path, options: Options) -> None:
        self.url = url
        self.folder = folder
        self.options = options
        self.journal = Journal(folder / "journal")
        self.store = options.store or f"sqlite+aiosqlite:///{folder}/server.db"
        self.workers: list[WorkerProcess] = []
        self.servers: list[Process] = []
        self.killed: dict[int, float] = {}
        self.random = random.Random(options.seed)

    async def worker(self) -> WorkerProcess:
        """Start a worker, and return when it consumes."""
        log = self.folder / f"worker-{len(self.killed)}-{len(self.workers)}.log"
        worker = await start_worker(self.url, self.journal.path, log, app=APP)
        await worker.said(" consumes ", timeout=60)
        return worker

    async def server(self) -> Process:
        """Start a server, and return when it serves."""
        with (self.folder / "servers.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.flow.serving", self.store),
                stdin=DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "BROKERTASK_AMQP_URL": self.url},
            )
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"serving\n"
        return process

    async def kill_some(self) -> None:
        """Kill as many as is asked for, one after the other, each after a random while."""
        options = self.options
        victims = ["worker"] * options.worker_kills + ["server"] * options.server_kills
        self.random.shuffle(victims)
        for victim in victims:
            await asyncio.sleep(self.random.uniform(0.05, 1.0))
            if victim == "worker":
                place = self.random.randrange(len(self.workers))
                doomed = self.workers[place]
                now = time.monotonic()
                self.killed |= dict.fromkeys((doomed.process.pid, *doomed.children), now)
                await doomed.kill()
                self.workers[place] = await self.worker()
            else:
                place = self.random.randrange(len(self.servers))
                gone = self.servers[place]
                self.killed[gone.pid] = time.monotonic()
                with suppress(ProcessLookupError):
                    os.kill(gone.pid, signal.SIGKILL)
                await gone.wait()
                self.servers[place] = await self.server()

    async def stop(self) -> None:
        """End everything that was started."""
        for worker in self.workers:
            if worker.alive:
                await worker.kill()
        for server in self.servers:
            if server.returncode is None:
                server.kill()
                await server.wait()


async def play(url: str, folder: Path, options: Options) -> Outcome:
    """Do the harm, and return what came of it."""
    began = time.monotonic()
    outcome, stage = Outcome(options), Play(url, folder, options)
    try:
        stage.servers = [await stage.server() for _ in range(options.servers)]
        stage.workers = [await stage.worker() for _ in range(options.workers)]
        client = App("family", settings=Settings(amqp_url=url))
        async with client:
            killing = asyncio.create_task(stage.kill_some())
            runs, size = [], max(1, options.parents // (2 * options.kills + 1))
            for at in range(0, options.parents, size):
                numbers = range(at, min(at + size, options.parents))
                runs += await client.client.trigger_many("parent", numbers)
                await asyncio.wait({killing}, timeout=PAUSE)
            await killing
            outcome.kills = options.kills
            wanted = {run.run_id for run in runs}
            with suppress(AssertionError):
                await eventually(
                    lambda: wanted <= stage.journal.finished().keys(),
                    "end of every parent",
                    timeout=ENDING,
                )
            outcome.missing = wanted - stage.journal.finished().keys()
            if not outcome.missing:
                for number, run in enumerate(runs):
                    if await run.result(timeout=60) != sum(
                        number * CHILDREN + place + 1 for place in range(CHILDREN)
                    ):
                        outcome.wrong.append(run.run_id)
            outcome.completed = options.parents - len(outcome.missing)
    finally:
        await stage.stop()
    judge(outcome, stage, wanted)
    outcome.seconds = time.monotonic() - began
    return outcome


def judge(outcome: Outcome, stage: Play, parents: set[str]) -> None:
    """Look for what ran twice, and for why."""
    lines: dict[str, list[Entry]] = defaultdict(list)
    for entry in stage.journal.entries:
        lines[entry.run_id].append(entry)
    for run_id, entries in lines.items():
        finished = [entry for entry in entries if entry.fact == "finished"]
        dead = {entry.pid for entry in entries if entry.pid in stage.killed}
        if run_id not in parents:
            outcome.children += len(finished)
            outcome.children_twice += len(finished) > 1
        else:
            outcome.stretches += sum(entry.fact == "started" for entry in entries)
        if len(finished) <= 1 and not _overlap(entries):
            continue
        if dead:
            outcome.explained["its worker was killed"] += 1
        elif run_id not in parents and _parent_was_hit(entries, stage):
            outcome.explained["its parent's worker was killed before it had parked"] += 1
        else:
            outcome.sent_twice.append(run_id)


def _parent_was_hit(entries: list[Entry], stage: Play) -> bool:
    """Whether a kill came before it ran again: its parent may have triggered it once more."""
    first = min(entry.at for entry in entries)
    return any(
        at <= max(entry.at for entry in entries) and at >= first - 60
        for at in stage.killed.values()
    )


def _overlap(entries: list[Entry]) -> bool:
    """Whether two stretches of a run were going on at the same time."""
    going: set[int] = set()
    for entry in sorted(entries, key=lambda one: one.at):
        if entry.fact == "started":
            if going - {entry.pid}:
                return True
            going.add(entry.pid)
        elif entry.fact in ("finished", "left"):
            going.discard(entry.pid)
    return False


def main() -> None:
    """Play on a private node, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in Options.__annotations__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if kind == "int" else str,
            default=getattr(Options, name),
        )
    options = Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        node = Node.create(Path(folder) / "node").start()
        try:
            outcome = asyncio.run(play(node.add_vhost("family"), Path(folder), options))
        finally:
            node.destroy()
    print(outcome.table())
    for violation in outcome.violations():
        print("VIOLATION", violation)
        sys.exit(1)


if __name__ == "__main__":
    main()
