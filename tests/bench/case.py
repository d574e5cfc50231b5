"""What is measured: each case with its systems and its amount of work.

Cases of one group are measured side by side: their rounds alternate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from tests.bench.producing import Mode

Measure: TypeAlias = Literal["drain", "enqueue", "flow", "latency", "idle"]

OURS: Final = ("brokertask", "brokertask-quorum")
PEERS: Final = (
    "celery-prefork",
    "celery-threads",
    "dramatiq",
    "taskiq",
    "taskiq-quorum",
    "faststream",
)
LIMITS: Final = ("aio-pika", "c", "c-quorum")
EVERYBODY: Final = (*OURS, *PEERS, *LIMITS)
VARIANTS: Final = ("brokertask-unsampled", "brokertask-traced", "brokertask-aio-pika")
SYNC: Final = ("brokertask", "celery-threads", "dramatiq", "taskiq", "faststream")
QUICK: Final = ("drain-100", "enqueue-many", "flow", "latency")
"""The cases of the short run."""
QUICK_SYSTEMS: Final = (
    "brokertask",
    "brokertask-traced",
    "celery-threads",
    "dramatiq",
    "taskiq",
    "faststream",
    "c",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement of each of its systems in every round.

    `drain`: a worker empties a queue that was filled before. `enqueue`: a producer, no worker.
    `flow`: both at once. `latency`: one task every 5 ms, from the call to the task's start. `idle`:
    from the start of a worker to its first task; then its memory.
    """

    name: str
    group: str
    title: str
    measure: Measure
    systems: tuple[str, ...]
    tasks: int
    """For the peers."""
    own_tasks: int
    """For brokertask and the C client, so that a round takes about as long."""
    mode: Mode = "many"
    concurrency: int = 100
    processes: int = 1
    size: int = 60
    """Of the payload's text, in bytes."""
    behind: int = 0
    """So many tasks more are waiting in the queue."""
    kinds: int = 1
    """How many tasks the worker has; the work is spread over them."""
    sync: bool = False
    retry_after: float = 0.0
    """If set, each run fails once, and asks for this delay in seconds."""
    rounds: int | None = None
    """If set, so many are enough."""

    def quick(self) -> Case:
        """Return it with a third of the work, and the systems that tell most."""
        return replace(
            self,
            systems=tuple(system for system in self.systems if system in QUICK_SYSTEMS),
            tasks=max(100, self.tasks // 3),
            own_tasks=max(100, self.own_tasks // 3),
        )


def _drain(
    concurrency: int, tasks: int, own_tasks: int, systems: tuple[str, ...] = EVERYBODY
) -> Case:
    return Case(
        name=f"drain-{concurrency}",
        group=f"drain-{concurrency}",
        title=f"Drain, concurrency {concurrency}",
        measure="drain",
        systems=systems,
        tasks=tasks,
        own_tasks=own_tasks,
        concurrency=concurrency,
    )


def _enqueue(mode: Mode, title: str, systems: tuple[str, ...], tasks: int, own_tasks: int) -> Case:
    return Case(
        name=f"enqueue-{mode}",
        group="enqueue",
        title=title,
        measure="enqueue",
        systems=systems,
        tasks=tasks,
        own_tasks=own_tasks,
        mode=mode,
    )


def _payload(name: str, size: int, tasks: int, concurrency: int) -> Case:
    return Case(
        name=f"payload-{name}",
        group="payload",
        title=f"Drain, payloads of {name}",
        measure="drain",
        systems=("brokertask", "taskiq", "faststream", "aio-pika"),
        tasks=tasks,
        own_tasks=tasks,
        concurrency=concurrency,
        size=size,
    )


def _backlog(behind: int) -> Case:
    return Case(
        name=f"backlog-{behind}",
        group="backlog",
        title=f"Drain, {behind:,} more behind",
        measure="drain",
        systems=OURS,
        tasks=20_000,
        own_tasks=20_000,
        behind=behind,
        rounds=3,
    )


def _kinds(kinds: int) -> Case:
    return Case(
        name=f"tasks-{kinds}",
        group="tasks",
        title=f"Drain, {kinds} tasks in one worker",
        measure="drain",
        systems=("brokertask",),
        tasks=15_000,
        own_tasks=15_000,
        concurrency=max(1, 100 // kinds),
        kinds=kinds,
    )


def _processes(processes: int) -> Case:
    return Case(
        name=f"processes-{processes}",
        group="processes",
        title=f"Drain, {processes} process{'es' if processes > 1 else ''}",
        measure="drain",
        systems=OURS,
        tasks=30_000,
        own_tasks=30_000,
        processes=processes,
    )


PIPELINED: Final = (*OURS, "taskiq", "taskiq-quorum", "faststream", *LIMITS)

CASES: Final = (
    _drain(100, 3_000, 30_000, (*EVERYBODY, *VARIANTS)),
    _drain(10, 3_000, 15_000),
    _drain(1, 1_500, 4_000),
    _enqueue("one", "Enqueue, one by one", EVERYBODY, 500, 500),
    _enqueue("many", "Enqueue, 100 in flight", PIPELINED, 3_000, 10_000),
    _enqueue("batch", "Enqueue, with one call for many", (*OURS, "c", "c-quorum"), 20_000, 20_000),
    Case(
        name="flow",
        group="flow",
        title="End to end, 100 in flight",
        measure="flow",
        systems=EVERYBODY,
        tasks=2_000,
        own_tasks=15_000,
    ),
    Case(
        name="latency",
        group="latency",
        title="From the call to the task's start, one every 5 ms",
        measure="latency",
        systems=(*OURS, *PEERS, "aio-pika"),
        tasks=400,
        own_tasks=400,
        mode="paced",
        concurrency=10,
    ),
    Case(
        name="sync",
        group="sync",
        title="Drain, tasks that are plain functions, 40 threads",
        measure="drain",
        systems=SYNC,
        tasks=3_000,
        own_tasks=8_000,
        concurrency=40,
        sync=True,
    ),
    _payload("10 kB", 10_000, 2_000, 100),
    _payload("1 MB", 1_000_000, 120, 10),
    Case(
        name="ladder",
        group="ladder",
        title="10,000 runs fail at once and are delayed by 2 s",
        measure="drain",
        systems=("brokertask",),
        tasks=10_000,
        own_tasks=10_000,
        retry_after=2.0,
        rounds=3,
    ),
    *(_backlog(behind) for behind in (0, 10_000, 200_000)),
    *(_kinds(kinds) for kinds in (1, 50, 500)),
    *(_processes(processes) for processes in (1, 2)),
    Case(
        name="idle",
        group="idle",
        title="Start and idle memory",
        measure="idle",
        systems=("brokertask", *PEERS, "aio-pika"),
        tasks=1,
        own_tasks=1,
        concurrency=10,
    ),
    Case(
        name="memory",
        group="memory",
        title="Memory over 1,000,000 runs",
        measure="flow",
        systems=("brokertask",),
        tasks=1_000_000,
        own_tasks=1_000_000,
        mode="batch",
        rounds=1,
    ),
)
BY_NAME: Final = {case.name: case for case in CASES}


def groups() -> tuple[str, ...]:
    """Return the names of all groups, in order."""
    return tuple(dict.fromkeys(case.group for case in CASES))
