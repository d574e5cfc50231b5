"""What brokertask has to show beside the others: ratios between samples of the same round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from tests.bench.case import PEERS
from tests.bench.results import Results, Spread

Combine: TypeAlias = Callable[[float, float], float]

US_PER_MS: Final = 1000.0
FULL: Final = 0.9
"""Of the cores, in use: then the machine is the limit, not the number of processes."""
OWN: Final = "brokertask"
QUORUM: Final = {"brokertask": "brokertask-quorum", "taskiq": "taskiq-quorum", "c": "c-quorum"}
"""What stands in for a system where everybody who can uses a quorum queue."""


def _over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else 0.0


def _under(ours: float, theirs: float) -> float:
    return theirs / ours if ours else 0.0


def _added(ours: float, theirs: float) -> float:
    return (ours - theirs) * US_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One ratio that is asked for.

    It is between `figure` of `ours` in `case` and that of `theirs` in `other` (the same case by
    default). `theirs` may name several: then the best of each round counts.
    """

    about: str
    case: str
    figure: str
    theirs: tuple[str, ...]
    goal: float
    ours: str = OWN
    other: str = ""
    combine: Combine = _over
    at_most: bool = False
    unit: str = "x"
    machine_may_limit: bool = False
    """It is excused if worker and broker together use the whole machine; others do not count."""

    @property
    def by_cpu(self) -> bool:
        """Whether it compares processor time, which a busy machine hardly changes."""
        return self.figure in ("worker", "producer", "broker")

    def found(self, results: Results, *, quorum: bool = False) -> Spread | None:
        """Return the ratio, or None if it has not been measured."""
        names = QUORUM if quorum else {}
        mine = names.get(self.ours, self.ours)
        if quorum and mine == self.ours:
            return None
        other = self.other or self.case
        best = max if self.figure == "rate" else min
        theirs: dict[int, float] = {}
        for name in (names.get(each, each) for each in self.theirs):
            for number, figure in results.figures(other, name, self.figure).items():
                theirs[number] = best(theirs.get(number, figure), figure)
        return results.paired(results.figures(self.case, mine, self.figure), theirs, self.combine)

    def verdict(self, results: Results) -> str:
        """Return "met" or "not met", or why neither can be said."""
        found = self.found(results)
        if found is None:
            return "not measured"
        met = found.middle <= self.goal if self.at_most else found.middle >= self.goal
        busy = results.spread(self.case, self.ours, "share")
        if not met and self.machine_may_limit and busy and busy.middle >= FULL:
            return f"the machine is full: {busy.middle:.0%} of its cores are busy"
        return "met" if met else "not met"


def _drain(theirs: str, goal: float) -> Goal:
    return Goal(
        about=f"drain at concurrency 100, to {theirs}",
        case="drain-100",
        figure="rate",
        theirs=(theirs,),
        goal=goal,
    )


def _cpu(about: str, case: str, figure: str, theirs: tuple[str, ...], goal: float) -> Goal:
    return Goal(about=about, case=case, figure=figure, theirs=theirs, goal=goal, combine=_under)


GOALS: Final = (
    _drain("faststream", 8),
    _drain("taskiq", 10),
    _drain("dramatiq", 10),
    _drain("celery-threads", 12),
    _drain("c", 1),
    _cpu("worker CPU of the best peer to ours", "drain-100", "worker", PEERS, 15),
    Goal(
        about="worker CPU, to the C client's",
        case="drain-100",
        figure="worker",
        theirs=("c",),
        goal=2.5,
        at_most=True,
    ),
    Goal(
        about="drain, each run traced and exported, to the best peer untraced",
        case="drain-100",
        figure="rate",
        ours="brokertask-traced",
        theirs=PEERS,
        goal=4,
    ),
    Goal(
        about="worker CPU, traced and exported, to untraced",
        case="drain-100",
        figure="worker",
        ours="brokertask-traced",
        theirs=(OWN,),
        goal=1.7,
        at_most=True,
    ),
    Goal(
        about="worker CPU that an SDK adds to an unsampled run",
        case="drain-100",
        figure="worker",
        ours="brokertask-unsampled",
        theirs=(OWN,),
        goal=5,
        combine=_added,
        at_most=True,
        unit=" µs",
    ),
    Goal(
        about="drain at concurrency 1, to dramatiq",
        case="drain-1",
        figure="rate",
        theirs=("dramatiq",),
        goal=2,
    ),
    Goal(about="end to end, to taskiq", case="flow", figure="rate", theirs=("taskiq",), goal=7),
    Goal(about="end to end, to the C pair", case="flow", figure="rate", theirs=("c",), goal=0.65),
    Goal(
        about="enqueue, 100 in flight, to taskiq",
        case="enqueue-many",
        figure="rate",
        theirs=("taskiq",),
        goal=3.5,
    ),
    _cpu("producer CPU of taskiq to ours", "enqueue-many", "producer", ("taskiq",), 15),
    Goal(
        about="`trigger_many`, to the C client with 1,000 in flight",
        case="enqueue-batch",
        figure="rate",
        theirs=("c",),
        goal=0.7,
    ),
    Goal(
        about="latency at low load, p50, to dramatiq",
        case="latency",
        figure="p50",
        theirs=("dramatiq",),
        goal=0.45,
        at_most=True,
    ),
    Goal(
        about="latency at low load, p99, to dramatiq",
        case="latency",
        figure="p99",
        theirs=("dramatiq",),
        goal=1,
        at_most=True,
    ),
    _cpu("broker CPU of taskiq to ours", "drain-100", "broker", ("taskiq",), 3),
    Goal(
        about="two processes, to one",
        case="processes-2",
        other="processes-1",
        figure="rate",
        theirs=(OWN,),
        goal=1.7,
        machine_may_limit=True,
    ),
    Goal(
        about="drain with 200,000 behind, to none behind",
        case="backlog-200000",
        other="backlog-0",
        figure="rate",
        theirs=(OWN,),
        goal=0.75,
    ),
    Goal(
        about="drain of 500 tasks in one worker, to one task",
        case="tasks-500",
        other="tasks-1",
        figure="rate",
        theirs=(OWN,),
        goal=0.4,
    ),
    Goal(
        about="memory that a worker gains over 1,000,000 runs",
        case="memory",
        figure="grown",
        theirs=(OWN,),
        goal=10,
        combine=lambda ours, _: ours,
        at_most=True,
        unit=" MiB",
    ),
)
