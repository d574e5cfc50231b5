"""Kill workers and brokers under runs of five steps: `python -m tests.crash.stepping`.

A step tells the journal when it did its work, when the broker has confirmed its checkpoint, and
when it is safe: when `ctx.step` has returned. What was safe before a kill must not be done again
after it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from infra.rabbitmq.node import Node
from tests.crash import subject
from tests.crash.day import spend
from tests.crash.journal import DURABLE_VARIABLE, ENDED, LEFT, STARTED, Entry
from tests.crash.stage import Stage, WorkerProcess, eventually, kill, start_worker

TASK: Final = "stepping"
RECOVERY: Final = 90.0
ENDING: Final = 180.0
SETTLING: Final = 11.0
SLOWEST: Final = 0.2
"""Seconds that a step takes at most."""
UNREAD: Final = "killed before the broker read its ack"
READING: Final = 0.05
"""Seconds after an ack in which it may be unread, and is lost with the connection."""
WRITING: Final = 1.0
"""Seconds after an ack in which it may not be on the broker's disk, and is lost with the broker."""
BROKER_DIED: Final = "in hands when a broker died"
EXPLAINED: Final = (
    BROKER_DIED,
    *(f"killed after it told `{fact}`" for fact in ("did", "confirmed", "finished")),
    UNREAD,
)
"""Why two messages of one run may exist: also a process that died between a confirm and its ack."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is done, and how much harm."""

    runs: int = 2_000
    workers: int = 4
    worker_kills: int = 100
    broker_kills: int = 3
    seed: int = 1


@dataclass
class Outcome:
    """What came of it."""

    options: Options
    completed: int = 0
    dead: int = 0
    missing: set[str] = field(default_factory=set)
    steps: int = 0
    repeated: int = 0
    """Steps that were done once more than needed, in runs that were not doubled."""
    twice: int = 0
    """The same in runs that were: there each step may be done twice."""
    doubled: dict[str, str] = field(default_factory=dict)
    """Runs of which two messages were seen, and why."""
    unsafe: list[str] = field(default_factory=list)
    """Steps that were safe, and done again all the same, without a second message."""
    left: dict[str, int] = field(default_factory=dict)
    kills: int = 0
    seconds: float = 0

    @property
    def in_hands(self) -> int:
        """How many runs the faults can have interrupted, each in one step."""
        options = self.options
        concurrency = subject.app.tasks[TASK].options.concurrency
        return (self.kills + options.broker_kills * options.workers) * concurrency

    def violations(self) -> Iterator[str]:
        """Say what must not be."""
        if self.missing or self.dead:
            yield f"{len(self.missing)} runs did not complete, {self.dead} are dead"
        if (most := max(self.repeated, len(self.doubled))) > self.in_hands:
            yield f"{most} steps repeated or runs doubled, where {self.in_hands} were in hands"
        if self.unsafe:
            yield f"safe steps were repeated: {self.unsafe[:10]}"
        if odd := {run: why for run, why in self.doubled.items() if why not in EXPLAINED}:
            yield f"doubled without a reason: {odd}"
        if self.left:
            yield f"messages left behind: {self.left}"

    def table(self) -> str:
        """Return it for people."""
        options, whys = self.options, Counter(self.doubled.values())
        rows = [
            ("runs completed", f"{self.completed} of {options.runs}, with every result used"),
            ("dead", f"{self.dead} (must be 0)"),
            ("faults", f"{self.kills} workers and {options.broker_kills} brokers killed"),
            ("steps done", self.steps),
            ("steps repeated", f"{self.repeated} (bound {self.in_hands})"),
            ("  in doubled runs", self.twice),
            ("repeated though safe", f"{len(self.unsafe)} (must be 0)"),
            ("runs doubled", f"{len(self.doubled)} (bound {self.in_hands})"),
            *((f"  {why}", count) for why, count in sorted(whys.items())),
            ("left in queues", self.left or "0 (must be 0)"),
            ("took", f"{self.seconds:.0f} s with {options.workers} processes, seed {options.seed}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Stepping:
    """One such day."""

    def __init__(self, stage: Stage, options: Options, say: Callable[[str], None]) -> None:
        self._stage = stage
        self._options = options
        self._say = say
        self._choice = random.Random(options.seed)
        self._killed: dict[int, float] = {}
        """When each process was killed, by pid, on the journal's clock."""
        self._broker_kills: list[float] = []

    async def play(self) -> Outcome:
        """Do all of it, and return what came of it."""
        begun = time.monotonic()
        outcome = Outcome(self._options)
        worker = await self._start_worker()
        await self._harm(worker)
        await self._until_all_ended(outcome)
        await self._stage.until_idle(lasting=SETTLING, timeout=ENDING)
        assert await worker.stop(timeout=90) == 0
        self._stage.workers.clear()
        outcome.left = await self._stage.held()
        outcome.dead = len(await self._stage.dead(TASK))
        self._count(outcome)
        outcome.seconds = time.monotonic() - begun
        return outcome

    async def _start_worker(self) -> WorkerProcess:
        stage, count = self._stage, self._options.workers
        worker = await start_worker(
            stage.url,
            stage.journal.path,
            stage.folder / "worker.log",
            processes=count,
            environment={DURABLE_VARIABLE: "1"},
        )
        stage.workers = [worker]
        await worker.said(" consumes ", times=count, timeout=30)
        return worker

    async def _harm(self, worker: WorkerProcess) -> None:
        """Do each fault in the middle of another part of the runs."""
        options = self._options
        faults: list[Callable[[], Awaitable[None]]]
        faults = [self._kill_broker for _ in range(options.broker_kills)]
        faults += [partial(self._kill_child, worker) for _ in range(options.worker_kills)]
        self._choice.shuffle(faults)
        for number, fault in enumerate(faults, start=1):
            while len(self._stage.accepted) < options.runs * number // len(faults):
                await self._stage.trigger_surely(TASK, self._choice.uniform(0, SLOWEST))
            await fault()

    async def _kill_child(self, worker: WorkerProcess) -> None:
        """Kill one of those that have runs in hands, anywhere within a step or between two."""

        def working() -> list[int]:
            busy = {entry.pid for entry in self._stage.journal.running()}
            return [pid for pid in worker.children if pid in busy and pid not in self._killed]

        ready = worker.log.count(" consumes ")
        victims = await eventually(working, "worker with a run")
        await asyncio.sleep(self._choice.uniform(0, SLOWEST))
        victim = self._choice.choice(victims)
        kill(victim)
        self._killed[victim] = time.monotonic()
        await worker.said(" consumes ", times=ready + 1, timeout=RECOVERY)

    async def _kill_broker(self) -> None:
        node = self._stage.node
        await asyncio.to_thread(node.kill)
        self._broker_kills.append(time.monotonic())
        await asyncio.to_thread(node.start)
        self._say(f"a broker killed; {self._finished()} runs completed")

    def _finished(self) -> int:
        return len(self._stage.journal.finished())

    async def _until_all_ended(self, outcome: Outcome) -> None:
        async def ended() -> bool:
            outcome.missing = await self._stage.missing()
            return not outcome.missing

        try:
            await eventually(ended, "end", timeout=ENDING)
        except AssertionError:
            self._say(f"{len(outcome.missing)} run(s) did not end within {ENDING:g} s")

    # -- what the journal tells

    def _count(self, outcome: Outcome) -> None:
        journal = self._stage.journal
        outcome.completed, outcome.kills = len(journal.finished()), len(self._killed)
        entries: dict[str, list[Entry]] = defaultdict(list)
        for entry in journal.entries:
            entries[entry.run_id].append(entry)
        for run_id, told in entries.items():
            facts = Counter(entry.fact for entry in told)
            did = [facts[f"did:{step}"] for step in subject.STEPS]
            again = sum(count - 1 for count in did if count)
            outcome.steps += sum(did)
            if (why := self._why_doubled(told)) is not None:
                outcome.doubled[run_id] = why
                outcome.twice += again
            else:
                outcome.repeated += again
                repeats = [step.fact for _, step in self._safe_and_again(told)]
                outcome.unsafe += [f"{run_id} {fact}" for fact in repeats]

    def _safe_and_again(self, told: list[Entry]) -> Iterator[tuple[Entry, Entry]]:
        """Yield when a step was safe, and when it was done again."""
        safe: dict[str, Entry] = {}
        for entry in told:
            kind, _, step = entry.fact.partition(":")
            if kind == "safe":
                safe[step] = entry
            elif kind == "did" and step in safe:
                yield safe[step], entry

    def _why_doubled(self, told: list[Entry]) -> str | None:
        """Say what left two messages of a run; None if there was one at a time."""
        if (moment := self._doubled_at(told)) is not None:
            return self._why(told, moment)
        # Two that one worker had are seen by no more than this: the older one repeats what the
        # newer one knows, and the two become one when their sequence numbers are the same.
        whys = [self._unsettled(safe) for safe, _ in self._safe_and_again(told)]
        return whys[0] if whys and all(whys) else None

    def _unsettled(self, safe: Entry) -> str | None:
        """Say which fault can have lost the ack of the message before a step that was safe."""
        if 0 <= self._killed.get(safe.pid, float("inf")) - safe.at < READING:
            return UNREAD
        if any(0 <= at - safe.at < WRITING for at in self._broker_kills):
            return BROKER_DIED
        return None

    def _doubled_at(self, told: list[Entry]) -> float | None:
        """Return when two messages of a run were seen.

        An attempt began before the last one, or the run itself, had ended; or with a number that
        an earlier one had passed already; or it was told to leave the run to another.
        """
        latest: Entry | None = None
        finished = False
        for entry in told:
            if entry.fact == STARTED:
                if finished or (latest is not None and self._doubles(entry, latest, told)):
                    return entry.at
                latest = entry
            elif entry.fact == LEFT:
                return entry.at
            finished = finished or entry.fact == "finished"
        return None

    def _doubles(self, start: Entry, latest: Entry, told: list[Entry]) -> bool:
        return start.attempt < latest.attempt or start.at < self._ends(latest, told)

    def _ends(self, start: Entry, told: list[Entry]) -> float:
        for entry in told:
            same = (entry.pid, entry.attempt) == (start.pid, start.attempt)
            if same and entry.fact in ENDED and entry.at >= start.at:
                return entry.at
        return self._killed.get(start.pid, float("inf"))

    def _why(self, told: list[Entry], moment: float) -> str:
        """Say which fault left two messages of one run: the latest before they were seen."""
        pids = {entry.pid for entry in told}
        faults = {at: 0 for at in self._broker_kills if at < moment}
        faults |= {at: pid for pid, at in self._killed.items() if pid in pids and at < moment}
        if not faults:
            return "unexplained"
        at = max(faults)
        if faults[at] == 0:
            return BROKER_DIED
        last = [entry for entry in told if entry.pid == faults[at] and entry.at <= at][-1]
        fact = last.fact.partition(":")[0]
        if fact == "safe" and at - last.at < READING:
            return UNREAD
        return f"killed after it told `{fact}`"


async def play(
    node: Node, url: str, folder: Path, options: Options, *, say: Callable[[str], None] = print
) -> Outcome:
    """Play one such day on a virtual host of its own, and return what came of it."""
    async with Stage(node, url, folder) as stage:
        return await Stepping(stage, options, say).play()


if __name__ == "__main__":
    spend(
        Options,
        lambda node, folder, options, say: play(node, node.url(), folder, options, say=say),
        description=__doc__,
    )
