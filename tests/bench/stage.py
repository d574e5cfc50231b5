"""Where a measurement happens: a private broker, a fresh virtual host, worker and producer.

Nothing is shared between two measurements but the broker itself, and that is let come to rest.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final

from brokertask.topology import Names, Queue, TaskQueue, Topology, topology
from brokertask.transport.rabbitmq import RabbitTransport
from infra.rabbitmq.node import Node
from tests.bench import meter
from tests.bench.case import Case
from tests.bench.marks import Kind, Marks, Setup
from tests.bench.process import BenchError, Program
from tests.bench.producing import Mode, Order
from tests.bench.system import System

PATIENCE: Final = 300.0
"""Longer than a producer needs for any order."""
STALLED: Final = 30.0
"""A worker that begins no task for so long will not begin another."""
PART: Final = 50_000
"""The largest order, in tasks."""
POLL: Final = 0.004
QUIET: Final = 0.03
"""Of a tenth of a second, what the broker may use when it is at rest."""
SETTLE: Final = 6.0
PACE: Final = 0.005


@dataclass(frozen=True, slots=True)
class Reading:
    """All clocks at one moment, in seconds."""

    at: float
    begun: int
    """How many tasks had begun."""
    producer: float
    worker: float
    broker: float
    machine: float


class Stage:
    """The broker, and whatever lives as long as it."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self._folder = folder
        self._numbers = count(1)
        self._resources = ExitStack()
        self._otlp = ""

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def otlp(self) -> str:
        """Return the address of a collector, started the first time."""
        if not self._otlp:
            command, log = [sys.executable, "-m", "tests.bench.sink"], self._folder / "sink.log"
            sink = self._resources.enter_context(Program(command, log, {}))
            self._otlp = f"http://127.0.0.1:{sink.hear(PATIENCE):.0f}"
        return self._otlp

    @contextmanager
    def play(self, case: Case, system: System) -> Iterator[Play]:
        """Make what one measurement of `system` needs, and take all of it away in the end."""
        vhost = f"bench-{next(self._numbers)}"
        with tempfile.TemporaryDirectory(dir=self._folder) as folder, ExitStack() as resources:
            url = self.node.add_vhost(vhost)
            resources.callback(self.node.delete_vhost, vhost)
            setup = Setup(
                url=url,
                folder=folder,
                kind=system.kind,
                concurrency=case.concurrency,
                processes=case.processes,
                sync=case.sync,
                tasks=case.kinds,
                retry_after=case.retry_after,
            )
            play = Play(self, setup, system, resources)
            if system.ours:
                play.declare(case.kinds)
            yield play


class Play:
    """One system at work, once."""

    def __init__(self, stage: Stage, setup: Setup, system: System, resources: ExitStack) -> None:
        self._stage = stage
        self._setup = setup
        self._system = system
        self._resources = resources
        self._started: Marks | None = None
        self._producer: Program | None = None
        self._worker: Program | None = None

    # -- the cast

    def make_marks(self, tasks: int) -> tuple[Marks, Marks]:
        """Return the marks of tasks that were sent, and of those that began."""
        folder = Path(self._setup.folder)
        self._started = Marks.create(folder / "started", tasks)
        return Marks.create(folder / "sent", tasks), self._started

    def worker(self) -> Program:
        """Start the worker."""
        self._worker = self._start("worker", self._system.worker(self._setup), self._setup)
        return self._worker

    def producer(self, *, confirm: bool = True) -> Program:
        """Start the producer, and return when it is connected."""
        setup = replace(self._setup, confirm=confirm)
        self._producer = self._start("producer", self._system.producer(setup), setup)
        self._producer.hear(PATIENCE)
        return self._producer

    def enqueue(self, mode: Mode, tasks: range, size: int) -> float:
        """Have the producer enqueue tasks, and return the seconds that it took."""
        assert self._producer is not None
        orders = self.order(mode, tasks, size)
        return sum(self._producer.hear(PATIENCE) or 0.0 for _ in range(orders))

    def order(self, mode: Mode, tasks: range, size: int) -> int:
        """Tell the producer to enqueue tasks, do not wait for it, and return in how many orders.

        A large order is split: what a producer keeps of one is not what is measured.
        """
        assert self._producer is not None
        parts = [tasks[at : at + PART] for at in range(0, len(tasks), PART)]
        for part in parts:
            order = Order(mode, part.start, len(part), size, PACE)
            self._producer.tell(order.words if self._system.compiled else order.json)
        return len(parts)

    def fill(self, tasks: int, size: int) -> None:
        """Fill the queue before a measurement."""
        with self.producer(confirm=self._system.confirms_fill):
            self.enqueue("batch", range(tasks), size)
        self._producer = None

    def _start(self, role: str, command: object, setup: Setup) -> Program:
        values = {"concurrency": setup.concurrency, "otlp": ""}
        given = dict(self._system.environment) if role == "worker" else {}
        if any("{otlp}" in value for value in given.values()):
            values["otlp"] = self._stage.otlp()
        given = {name: value.format(**values) for name, value in given.items()}
        assert isinstance(command, list)
        log = Path(setup.folder) / f"{role}.log"
        return self._resources.enter_context(
            Program(command, log, {**given, **setup.environment()})
        )

    # -- the clocks

    def read(self) -> Reading:
        """Read all clocks now."""
        node = self._stage.node.pid
        assert node is not None
        return Reading(
            at=time.monotonic(),
            begun=len(self._started.seconds()) if self._started else 0,
            producer=self._producer.cpu_seconds() if self._producer else 0.0,
            worker=self._worker.cpu_seconds() if self._worker else 0.0,
            broker=meter.cpu_seconds(node),
            machine=meter.machine_seconds(),
        )

    def when(self, reached: Callable[[], int], tasks: int) -> Reading:
        """Read all clocks as soon as so many tasks are marked.

        Raises:
            BenchError: The worker ended, or begins no more tasks.
        """
        assert self._worker is not None
        before, deadline = 0, time.monotonic() + STALLED
        while (now := reached()) < tasks:
            self._worker.check()
            if now > before:
                before, deadline = now, time.monotonic() + STALLED
            elif time.monotonic() > deadline:
                raise BenchError(f"{now} of {tasks} tasks began: {self._worker.last_words()}")
            time.sleep(POLL)
        return self.read()

    def settle(self) -> None:
        """Wait until the broker is at rest; what it did before is not to be counted."""
        node = self._stage.node.pid
        assert node is not None
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            before = meter.cpu_seconds(node)
            time.sleep(0.1)
            if meter.cpu_seconds(node) - before < QUIET:
                return

    # -- the broker

    def declare(self, kinds: int) -> None:
        """Declare brokertask's topology, the queues of its tasks of the kind asked for."""
        names = Names()
        tasks = [TaskQueue(f"noop-{number}" if number else "noop") for number in range(kinds)]
        asyncio.run(self._declare(of_kind(topology(names, tasks), names, self._setup.kind)))

    async def _declare(self, wanted: Topology) -> None:
        transport = RabbitTransport(self._setup.url)
        await transport.open(timeout=PATIENCE)
        try:
            await transport.declare(wanted)
        finally:
            await transport.close()

    def check_acked(self) -> None:
        """See to it that what was measured was done: a task that began was acked, too.

        Raises:
            BenchError: A worker that was told to stop left messages behind.
        """
        if left := self.left():
            raise BenchError(f"{left} messages were left unacked when the worker was told to stop")

    def left(self) -> int:
        """Return how many messages are in the queue: with no worker, those unacked as well."""
        return asyncio.run(self._left())

    async def _left(self) -> int:
        transport = RabbitTransport(self._setup.url)
        await transport.open(timeout=PATIENCE)
        try:
            depth = await transport.depth(self._system.queue)
        finally:
            await transport.close()
        return depth.ready if depth else 0


def of_kind(wanted: Topology, names: Names, kind: Kind) -> Topology:
    """Return a topology with the queues of its tasks of another kind.

    A classic queue has neither a delivery limit nor at-least-once dead-lettering: brokertask's
    guarantees do not hold on it, which is why it is no option of the product.
    """
    if kind == "quorum":
        return wanted
    prefix = names.queue("")
    queues = [
        Queue(queue.name, {"x-queue-type": "classic"}) if queue.name.startswith(prefix) else queue
        for queue in wanted.queues
    ]
    return replace(wanted, queues=tuple(queues))
