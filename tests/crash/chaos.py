"""Kill workers and brokers under load, and count: `python -m tests.crash.chaos`, or `make chaos`.

The publisher and every task keep journals of their own, on the disk before they go on. In the end
each run that was accepted has to have completed or be in a dead-letter queue, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from brokertask.identity import uuid7
from infra.rabbitmq.node import Node
from tests.crash import subject
from tests.crash.day import spend
from tests.crash.journal import DURABLE_VARIABLE, Entry
from tests.crash.stage import (
    SUBJECT,
    Stage,
    WorkerProcess,
    eventually,
    kill,
    start_worker,
)

PUBLISHERS: Final = 20
MOST_WAITING: Final = 600
"""The publisher keeps no more runs than this in front of the workers, and waits for the faults:
the load lasts until the last of them."""
MIX: Final = {
    ("quick", 1, False): 70,
    ("quick", 1, True): 8,
    ("slow", 0.02, False): 6,
    ("flaky", 1, False): 10,
    ("flaky", 2, False): 2,
    ("failing", None, False): 4,
}
"""Task, payload and whether it is delayed, and how many of a hundred runs are such."""
DOOMED: Final = ("failing", "exiting")
"""Tasks whose runs never complete."""
POISON_EVERY: Final = 7_000
"""One run in so many ends its process, each time it is tried."""
ENDING: Final = 120.0
"""Seconds after the last fault within which every run has to end."""
SETTLING: Final = 11.0
"""Seconds without work before it counts as done: a message that a dying broker was moving is moved
again after ten."""
RECOVERY: Final = 90.0
"""Seconds after a fault within which work has to go on."""
PROBING: Final = 0.1
"""Seconds between the runs that are triggered meanwhile: all the others may be done before a
newcomer is ready, which would then have nothing to show."""
STAGNATION: Final = 600.0
COMPLETING: Final = 0.9
"""More of the runs than this complete; the others are meant to die."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is done, and how much harm."""

    runs: int = 20_000
    workers: int = 2
    worker_kills: int = 10
    broker_kills: int = 2
    seed: int = 1


@dataclass(frozen=True)
class Fault:
    """What was done, and how long it took until work went on."""

    kind: str
    at: float
    recovered: float


@dataclass
class Outcome:
    """What came of it."""

    options: Options
    triggered: int = 0
    repeated: int = 0
    """Triggers that were published once more, as the first answer was an error."""
    probes: int = 0
    """Runs beyond `Options.runs`, to see work go on after a fault."""
    completed: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    doubles: int = 0
    crashes: int = 0
    """Workers that died, by our hand or by a poisonous run."""
    most: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0

    @property
    def most_doubles(self) -> int:
        """How many runs the faults can have doubled: all that was in somebody's hands then."""
        held = sum(_limit(task) for task in self.most)
        brokers = self.options.broker_kills * self.options.workers
        return (self.crashes + brokers) * held

    def violations(self) -> Iterator[str]:
        """Say what must not be."""
        if self.missing:
            yield f"missing: {sorted(self.missing)[:10]}"
        if self.unexpected:
            yield f"unexpected: {sorted(self.unexpected)[:10]}"
        if self.left:
            yield f"messages left behind: {self.left}"
        if self.doubles > self.most_doubles:
            yield f"{self.doubles} doubles, at most {self.most_doubles} can be explained"
        for task, most in self.most.items():
            if most > _limit(task):
                yield f"{most} runs of {task} at once, its limit is {_limit(task)}"

    def table(self) -> str:
        """Return it for people."""
        options = self.options
        rows = [
            (
                "triggered",
                f"{self.triggered} ({self.probes} probes, {self.repeated} publishes repeated)",
            ),
            ("completed", self.completed),
            *((f"dead: {reason}", count) for reason, count in sorted(self.dead.items())),
            ("missing", f"{len(self.missing)} (must be 0)"),
            ("unexpected", f"{len(self.unexpected)} (must be 0)"),
            ("completed twice", f"{self.doubles} (bound {self.most_doubles})"),
            *(
                (f"at once: {task}", f"{most} (limit {_limit(task)})")
                for task, most in sorted(self.most.items())
            ),
            ("left in queues", self.left or "0 (must be 0, dead letters aside)"),
            ("workers that died", self.crashes),
            *(
                (f"{f.kind} at {f.at:.0f} s", f"works again after {f.recovered:.1f} s")
                for f in self.faults
            ),
            ("took", f"{self.seconds:.0f} s with {options.workers} processes, seed {options.seed}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Chaos:
    """One such day."""

    def __init__(
        self, stage: Stage, options: Options, *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._stage = stage
        self._options = options
        self._say = say
        self._choice = random.Random(options.seed)
        self._outcome = Outcome(options)
        self._worker: WorkerProcess | None = None
        self._workers_started = 0
        self._finished = 0
        self._promising = 0
        """How many of the accepted runs are going to complete."""
        self._released = 0
        """How many runs may be triggered before the next fault."""
        self._begun = time.monotonic()
        self._intent = os.open(stage.folder / "triggers", os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    async def play(self) -> Outcome:
        """Do all of it, and return what came of it."""
        await self._start_worker()
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._harm())
                kinds = iter(self._kinds())
                for _ in range(PUBLISHERS):
                    group.create_task(self._publish(kinds))
            await self._until_all_ended()
            await self._drain()
        finally:
            watching.cancel()
            os.close(self._intent)
            if self._worker is not None and self._worker.alive:
                await self._worker.kill()
        await self._count()
        return self._outcome

    # -- work

    def _kinds(self) -> list[tuple[str, object, float]]:
        """Return task, payload and delay of every run, in the order they are triggered."""
        kinds: list[tuple[str, object, float]] = [
            ("exiting", 17, 0) for _ in range(max(1, self._options.runs // POISON_EVERY))
        ]
        for task, payload, delayed in self._choice.choices(
            list(MIX), list(MIX.values()), k=self._options.runs - len(kinds)
        ):
            kinds.append((task, payload, self._choice.uniform(0.05, 3) if delayed else 0))
        self._choice.shuffle(kinds)
        return kinds

    async def _publish(self, kinds: Iterator[tuple[str, object, float]]) -> None:
        for task, payload, delay in kinds:
            await eventually(self._may_publish, "room for a run", timeout=STAGNATION)
            await self._trigger(task, payload, delay)

    async def _trigger(self, task: str, payload: object, delay: float) -> None:
        run_id = uuid7(time.time_ns() // 1_000_000)
        self._note(f"intended {task} {delay:.2f}", run_id)
        _, tries = await self._stage.trigger_surely(task, payload, run_id=run_id, delay=delay)
        self._note("accepted", run_id)
        self._outcome.repeated += tries - 1
        self._promising += task not in DOOMED

    def _may_publish(self) -> bool:
        waiting = self._promising - self._finished
        triggered = len(self._stage.accepted) - self._outcome.probes
        return waiting < MOST_WAITING and triggered < self._released

    def _note(self, word: str, run_id: str) -> None:
        os.write(self._intent, f"{word} {run_id}\n".encode())
        os.fsync(self._intent)

    async def _start_worker(self) -> None:
        """Start `brokertask worker`, as whoever supervises the supervisor would."""
        self._workers_started += 1
        stage = self._stage
        self._worker = await start_worker(
            stage.url,
            stage.journal.path,
            stage.folder / f"worker-{self._workers_started}.log",
            app=SUBJECT,
            processes=self._options.workers,
            environment={DURABLE_VARIABLE: "1"},
        )
        stage.workers = [self._worker]
        await self._worker.said(" consumes ", times=self._options.workers, timeout=30)

    # -- harm

    async def _harm(self) -> None:
        """Do each fault once so much of the work is done, and wait until work goes on."""
        options = self._options
        supervisors = options.worker_kills // 5
        faults = [
            *[self._kill_broker] * options.broker_kills,
            *[self._kill_supervisor] * supervisors,
            *[self._kill_child] * (options.worker_kills - supervisors),
        ]
        self._choice.shuffle(faults)
        moments = sorted(self._choice.uniform(0.05, 0.9) * options.runs for _ in faults)
        for moment, fault in zip(moments, faults, strict=True):
            self._released = round(moment) + MOST_WAITING
            await self._until_finished(round(moment * COMPLETING))
            begun, position = time.monotonic(), len(self._stage.journal.entries)
            known = {entry.pid for entry in self._stage.journal.entries}
            kind, shows = await fault(known)
            recovered = await self._until_shown(shows, position, f"work after {kind}") - begun
            self._outcome.faults.append(Fault(kind, begun - self._begun, recovered))
            self._say(f"{kind}: works again after {recovered:.1f} s")
        self._released = options.runs

    async def _until_finished(self, count: int) -> None:
        await eventually(
            lambda: self._finished >= count, f"end of {count} runs", timeout=STAGNATION
        )

    async def _until_shown(self, shows: Callable[[Entry], bool], position: int, what: str) -> float:
        """Return when the journal, from `position` on, first shows something."""
        shown = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._probe(shown))
            entry = await eventually(
                lambda: next(filter(shows, self._stage.journal.entries[position:]), None),
                what,
                timeout=RECOVERY,
            )
            shown.set()
        return float(entry.at)

    async def _probe(self, shown: asyncio.Event) -> None:
        """Trigger a run now and then until work is shown; never left between publish and note."""
        while not shown.is_set():
            self._outcome.probes += 1
            await self._trigger("quick", 1, 0)
            await asyncio.sleep(PROBING)

    async def _kill_child(self, known: set[int]) -> tuple[str, Callable[[Entry], bool]]:
        worker = self._worker
        assert worker is not None
        children = await eventually(lambda: worker.children, "child to kill")
        kill(self._choice.choice(children))
        self._outcome.crashes += 1
        return "a worker killed", lambda entry: entry.pid not in known

    async def _kill_supervisor(self, known: set[int]) -> tuple[str, Callable[[Entry], bool]]:
        assert self._worker is not None
        os.kill(self._worker.process.pid, signal.SIGKILL)
        await self._worker.process.wait()
        await self._start_worker()
        return "the supervisor killed", lambda entry: entry.pid not in known

    async def _kill_broker(self, known: set[int]) -> tuple[str, Callable[[Entry], bool]]:
        node = self._stage.node
        await asyncio.to_thread(node.kill)
        await asyncio.to_thread(node.start)
        back = time.monotonic()
        return "the broker killed", lambda entry: entry.fact == "finished" and entry.at > back

    # -- the end

    async def _watch(self) -> None:
        said = 0.0
        while True:
            self._finished = len(self._stage.journal.finished())
            if time.monotonic() - said > 5:
                said = time.monotonic()
                accepted = len(self._stage.accepted)
                self._say(f"{accepted} accepted, {self._finished} completed")
            await asyncio.sleep(0.1)

    async def _until_all_ended(self) -> None:
        async def ended() -> bool:
            self._outcome.missing = await self._stage.missing()
            return not self._outcome.missing

        try:
            await eventually(ended, "end", timeout=ENDING)
        except AssertionError:
            self._say(f"{len(self._outcome.missing)} run(s) did not end within {ENDING:g} s")

    async def _drain(self) -> None:
        assert self._worker is not None
        try:
            await self._stage.until_idle(lasting=SETTLING, timeout=ENDING)
        except AssertionError as error:
            self._say(str(error))
        code = await self._worker.stop(timeout=90)
        self._say(f"the worker stopped with exit code {code}")
        self._stage.workers.clear()
        self._outcome.left = await self._stage.held()

    async def _count(self) -> None:
        stage, outcome = self._stage, self._outcome
        finished = stage.journal.finished()
        outcome.triggered = len(stage.accepted)
        outcome.completed = len(finished)
        outcome.doubles = sum(count > 1 for count in finished.values())
        outcome.unexpected = {entry.run_id for entry in stage.journal.entries} - set(stage.accepted)
        outcome.most = stage.journal.most_at_once()
        outcome.crashes += sum(
            entry.task == "exiting" and entry.fact == "started" for entry in stage.journal.entries
        )
        for task in subject.app.tasks:
            dead = await stage.dead(task)
            outcome.dead.update(f"{letter.reason} ({task})" for letter in dead)
            outcome.unexpected |= {letter.run_id for letter in dead} - set(stage.accepted)
        outcome.seconds = time.monotonic() - self._begun


def _limit(task: str) -> int:
    return subject.app.tasks[task].options.concurrency


async def play(
    node: Node,
    url: str,
    folder: Path,
    options: Options,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Play one such day on a virtual host of its own, and return what came of it."""
    async with Stage(node, url, folder) as stage:
        return await Chaos(stage, options, say=say).play()


if __name__ == "__main__":
    spend(
        Options,
        lambda node, folder, options, say: play(node, node.url(), folder, options, say=say),
        description=__doc__,
    )
