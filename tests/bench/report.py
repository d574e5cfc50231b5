"""What is told of the results: tables for a terminal and for the documentation, and the plot."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from infra.rabbitmq.node import Node
from tests.bench.case import CASES, Case, Measure, groups
from tests.bench.goals import GOALS, Goal
from tests.bench.plot import Bar, Panel, svg
from tests.bench.process import ROOT
from tests.bench.results import Results, Spread
from tests.bench.system import BY_NAME, SYSTEMS

REQUIREMENTS: Final = ROOT / "tests/bench/peers/requirements.txt"
PLOTTED: Final = "drain-100"
FEWEST: Final = 3
"""Rounds that a median needs."""
US: Final = 1000.0
"""From seconds per 1,000 tasks to µs per task."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a table."""

    figure: str
    title: str
    digits: int
    spread: bool = False

    def cell(self, found: Spread | None) -> str:
        if found is None:
            return ""
        shown = f"{found.middle:,.{self.digits}f}"
        if self.spread and found.least != found.most:
            shown += f" ({found.least:,.{self.digits}f} to {found.most:,.{self.digits}f})"
        return shown


RATE: Final = Column("rate", "tasks/s", 0, spread=True)
WORKER: Final = Column("worker", "worker CPU s per 1,000", 4)
PRODUCER: Final = Column("producer", "producer CPU s per 1,000", 4)
BROKER: Final = Column("broker", "broker CPU s per 1,000", 4)
P50: Final = Column("p50", "p50 ms", 2, spread=True)
P99: Final = Column("p99", "p99 ms", 2, spread=True)
RESIDENT: Final = Column("resident", "worker MiB", 0)
COLUMNS: Final[dict[Measure, tuple[Column, ...]]] = {
    "drain": (RATE, WORKER, BROKER),
    "enqueue": (RATE, PRODUCER, BROKER),
    "flow": (RATE, PRODUCER, WORKER, BROKER),
    "latency": (P50, P99, WORKER, BROKER),
    "idle": (
        Column("start", "start to first task, s", 2),
        Column("start_cpu", "CPU s until then", 2),
        RESIDENT,
        Column("proportional", "of its own, MiB", 0),
        Column("processes", "processes", 0),
    ),
}
EXTRA: Final[dict[str, tuple[Column, ...]]] = {
    "ladder": (
        Column("p50", "late by, p50 ms", 0),
        Column("p99", "late by, p99 ms", 0),
    ),
    "payload": (RESIDENT,),
    "memory": (RESIDENT, Column("grown", "of which gained, MiB", 1)),
    "processes": (Column("share", "part of all cores that it and its broker use", 2),),
}
"""What is of interest in some groups only."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Where and when it was measured, and with what."""

    date: str
    machine: str
    versions: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, node: Node) -> Facts:
        """Return those of now and here."""
        cpuinfo = Path("/proc/cpuinfo").read_text()
        model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
        memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
        gib = int(memory[1]) / 2**20 if memory else 0
        broker = node.api("GET", "/api/overview")
        return cls(
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            machine=f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, "
            f"{gib:.0f} GiB; the broker is on it, too",
            versions=[
                ("Python", platform.python_version()),
                ("RabbitMQ", f"{broker['rabbitmq_version']} on {broker['erlang_version']}"),
                *((name, metadata.version(name)) for name in ("brokertask", "uvloop")),
                *_pinned("celery", "dramatiq", "taskiq", "taskiq-aio-pika", "faststream"),
                *_pinned("aio-pika"),
                ("librabbitmq", _client_version()),
            ],
        )

    def table(self) -> str:
        """Return them as a table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions)
        rows = [("date", self.date), ("machine", self.machine), ("versions", versions)]
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {it} |" for name, it in rows)])


def _pinned(*names: str) -> Iterator[tuple[str, str]]:
    pins = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(.+)$", REQUIREMENTS.read_text(), re.MULTILINE))
    yield from ((name, pins[name]) for name in names)


def _client_version() -> str:
    command = ["pkg-config", "--modversion", "librabbitmq"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of this system"


# -- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its columns aligned so that it can be read as text as well."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(str.ljust, cells, widths)) + " |"

    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([line(head), rule, *map(line, rows)])


def group_table(results: Results, group: str) -> str:
    """Return the table of one group of cases, or nothing if it has not been measured."""
    cases = [case for case in CASES if case.group == group]
    columns = [*COLUMNS[cases[0].measure], *EXTRA.get(group, ())]
    several = len(cases) > 1
    rows = []
    for case in cases:
        for name in case.systems:
            found = [results.spread(case.name, name, column.figure) for column in columns]
            if any(found):
                cells = [column.cell(each) for column, each in zip(columns, found, strict=True)]
                rows.append([*([case.title] if several else []), BY_NAME[name].title, *cells])
    head = [*(["case"] if several else []), "system", *(column.title for column in columns)]
    return table(head, rows) if rows else ""


def goals_table(results: Results) -> str:
    """Return what has to be shown, and whether it is."""
    rows = [
        [
            goal.about,
            f"{'at most' if goal.at_most else 'at least'} {_number(goal.goal, goal.unit)}",
            _ratio(goal, goal.found(results)),
            _ratio(goal, goal.found(results, quorum=True)),
            goal.verdict(results),
        ]
        for goal in GOALS
        if goal.found(results) is not None
    ]
    return table(["case", "goal", "measured", "on quorum queues", ""], rows) if rows else ""


def _ratio(goal: Goal, found: Spread | None) -> str:
    if found is None:
        return ""
    middle = _number(found.middle, goal.unit)
    if found.least == found.most:
        return middle
    return f"{middle} ({_digits(found.least)} to {_digits(found.most)})"


def _number(value: float, unit: str) -> str:
    return f"{_digits(value)}{unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


# -- the page


def plot(results: Results) -> str:
    """Return the plot of the main case as SVG."""
    shown = [
        system for system in SYSTEMS if results.spread(PLOTTED, system.name, "rate") is not None
    ]
    rates, costs = [], []
    for system in shown:
        middle = {
            figure: spread.middle
            for figure in ("rate", "worker", "broker")
            if (spread := results.spread(PLOTTED, system.name, figure))
        }
        rates.append(Bar(system.title, (middle["rate"],), system.ours))
        parts = (middle["worker"] * US, middle["broker"] * US)
        costs.append(Bar(system.title, parts, system.ours))
    return svg(
        [
            Panel("Tasks per second", "one worker process, concurrency 100; more is better", rates),
            Panel(
                "CPU per task, µs",
                "of the worker, and lighter of the broker; less is better",
                costs,
            ),
        ]
    )


def page(results: Results, facts: Facts) -> str:
    """Return `docs/performance.md`."""
    parts = [
        _HEAD.format(facts=facts.table()),
        "![Tasks per second, and CPU per task](performance.svg)",
        "## What it has to show",
        _GOALS,
        goals_table(results),
        "## Figures",
        _FIGURES,
        *_sections(results),
        "## What is not equal",
        "\n".join(f"- {system.title}: {system.note}." for system in SYSTEMS if system.note),
        _NOT_EQUAL,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(results: Results) -> Iterator[str]:
    for group in groups():
        shown = group_table(results, group)
        if shown:
            cases = [case for case in CASES if case.group == group]
            yield f"### {_title(cases)}"
            yield shown
            yield _noise(results, cases)


def _title(cases: Sequence[Case]) -> str:
    first = cases[0].title
    return first if len(cases) == 1 else first.split(",")[0] + f", by {_BY[cases[0].group]}"


_BY: Final = {
    "enqueue": "the way it is done",
    "payload": "the size of payloads",
    "backlog": "what waits behind",
    "tasks": "the number of tasks",
    "processes": "processes",
}


def _noise(results: Results, cases: Sequence[Case]) -> str:
    rounds = max(results.rounds(case.name) for case in cases)
    others = [
        spread.middle
        for case in cases
        for system in case.systems
        if (spread := results.spread(case.name, system, "foreign")) is not None
    ]
    told = f"{rounds} round{'s' if rounds > 1 else ''}"
    told += ", too few to rely on" if rounds < FEWEST else ""
    if not others:
        return f"{told}."
    return f"{told}; others used up to {max(others):.1f} cores meanwhile."


_HEAD: Final = """\
# Performance

brokertask beside its peers and beside a C client, which is the limit. All of this page is
written by `make bench`, on the date below.

{facts}

```sh
make bench                     # everything, and this page anew; an hour
make bench QUICK=1             # the main cases, printed, in two minutes
make bench CASES=flow,latency  # these anew, the rest of the page as it was
make bench MORE=1 ROUNDS=2     # two rounds more of everything
make bench GATE=1              # fails if a goal of processor time is not met
```

One run, one private broker. Rounds alternate: in each, every system has its turn, on a virtual
host of its own. The task does nothing; its payload is a number and a text of 60 characters.
Messages are persistent, publishes confirmed, a task is acked after it has succeeded, and the
prefetch is the concurrency. What cannot be so is said [below](#what-is-not-equal). A task marks
its start in memory that is shared with the harness, and a run counts only if nothing was left
unacked."""

_GOALS: Final = """\
Each is the median of the ratios of the rounds, with the least and the most. Processor time is
steady; what the clock says changes with whoever else uses the machine. On the left brokertask
uses a classic queue, as most peers do; on the right, brokertask and whoever can use quorum
queues, which are its default."""

_FIGURES: Final = """\
Medians, with the least and the most. CPU is that of whole process trees, supervisors included,
in seconds for 1,000 tasks, which is ms for one. A thousand divided by it is what one full core
could do."""

_NOT_EQUAL: Final = """\
brokertask publishes an event for each run, confirmed, whether or not anybody listens; no peer
does. Its classic queue is made by the harness and is no option of the product: without a
delivery limit and at-least-once dead-lettering its [guarantees](concepts/guarantees.md) would
not hold.

A task that does nothing shows what the machinery costs; one that does something dilutes every
ratio."""
