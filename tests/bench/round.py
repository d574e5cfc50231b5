"""One measurement of one system, and what came out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench import meter
from tests.bench.case import Case, Measure
from tests.bench.stage import Play, Reading, Stage
from tests.bench.system import BY_NAME, System

WARM: Final = 200
"""Tasks before a measurement, so that connections, caches and the worker's code are warm."""
REST: Final = 2.0
"""How long an idle worker is left alone before its memory is read."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement found, by the names of `report.Column`."""

    case: str
    system: str
    round: int
    figures: Mapping[str, float]


def measure(stage: Stage, case: Case, name: str, number: int) -> Sample:
    """Measure one system in one case.

    Raises:
        BenchError: It did not do its work, or it left messages unacked.
    """
    system = BY_NAME[name]
    with stage.play(case, system) as play:
        tasks = case.own_tasks if system.fast else case.tasks
        figures = _MEASURES[case.measure](play, case, system, tasks)
    return Sample(case.name, name, number, figures)


def _drain(play: Play, case: Case, system: System, tasks: int) -> dict[str, float]:
    sent, started = play.make_marks(tasks + case.behind)
    play.fill(tasks + case.behind, case.size)
    play.settle()
    with play.worker() as worker:
        # The ladder's first attempts mark what they send round; its clock begins with them.
        first, warm = (sent, 1) if case.retry_after else (started, tasks // 10)
        begin = play.when(first.reached, warm)
        end = play.when(started.reached, tasks)
        figures = _between(begin, end) | _memory(worker.pid)
        play.settle()
    if not case.behind:
        play.check_acked()
    if case.retry_after:
        late = [started[n] - sent[n] - case.retry_after for n in range(tasks)]
        figures |= _percentiles(late)
    return figures


def _enqueue(play: Play, case: Case, system: System, tasks: int) -> dict[str, float]:
    play.make_marks(tasks + WARM)
    play.producer()
    play.enqueue(case.mode, range(WARM), case.size)
    play.settle()
    begin = play.read()
    seconds = play.enqueue(case.mode, range(WARM, WARM + tasks), case.size)
    end = play.read()
    return _figures(begin, end, tasks, seconds)


def _flow(play: Play, case: Case, system: System, tasks: int) -> dict[str, float]:
    _, started = play.make_marks(tasks + WARM)
    with play.worker() as worker:
        play.producer()
        play.enqueue(case.mode, range(WARM), case.size)
        begin = play.when(started.reached, WARM)
        play.order(case.mode, range(WARM, WARM + tasks), case.size)
        play.when(started.reached, WARM + tasks // 10)
        before = meter.memory(worker.pid)
        end = play.when(started.reached, WARM + tasks)
        figures = _between(begin, end) | _memory(worker.pid)
        figures["grown"] = figures["resident"] - before.resident / 2**20
        play.settle()
    play.check_acked()
    return figures


def _latency(play: Play, case: Case, system: System, tasks: int) -> dict[str, float]:
    sent, started = play.make_marks(tasks + WARM)
    with play.worker():
        play.producer()
        play.enqueue("one", range(WARM), case.size)
        begin = play.when(started.reached, WARM)
        play.settle()
        play.enqueue("paced", range(WARM, WARM + tasks), case.size)
        end = play.when(started.reached, WARM + tasks)
        figures = _between(begin, end)
    waits = [started[number] - sent[number] for number in range(WARM, WARM + tasks)]
    return figures | _percentiles(waits)


def _idle(play: Play, case: Case, system: System, tasks: int) -> dict[str, float]:
    _, started = play.make_marks(1)
    play.fill(1, case.size)
    play.settle()
    with play.worker() as worker:
        reading = play.when(started.reached, 1)
        figures = {"start": started[0] - worker.begun, "start_cpu": reading.worker}
        time.sleep(REST)
        return figures | _memory(worker.pid)


_MEASURES: Final[Mapping[Measure, Callable[[Play, Case, System, int], dict[str, float]]]] = {
    "drain": _drain,
    "enqueue": _enqueue,
    "flow": _flow,
    "latency": _latency,
    "idle": _idle,
}


def _between(begin: Reading, end: Reading) -> dict[str, float]:
    return _figures(begin, end, end.begun - begin.begun, end.at - begin.at)


def _figures(begin: Reading, end: Reading, tasks: int, seconds: float) -> dict[str, float]:
    thousands, wall = tasks / 1000, end.at - begin.at
    spent = {
        who: getattr(end, who) - getattr(begin, who) for who in ("producer", "worker", "broker")
    }
    return {
        "rate": tasks / seconds,
        **{who: used / thousands for who, used in spent.items() if used},
        "share": sum(spent.values()) / wall / (os.cpu_count() or 1),
        "foreign": max(0.0, end.machine - begin.machine - sum(spent.values())) / wall,
    }


def _memory(pid: int) -> dict[str, float]:
    found = meter.memory(pid)
    return {
        "resident": found.resident / 2**20,
        "proportional": found.proportional / 2**20,
        "processes": float(found.processes),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": ordered[len(ordered) // 2] * 1000,
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000,
    }
