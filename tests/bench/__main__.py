"""brokertask beside its peers: `make bench`, or `python -m tests.bench [--quick] [--gate]`.

docs/performance.md is what it writes, and says how it measures.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from infra.rabbitmq.node import Node
from tests.bench import report
from tests.bench.case import CASES, QUICK, Case, groups
from tests.bench.goals import GOALS
from tests.bench.process import ROOT, BenchError
from tests.bench.results import Results
from tests.bench.round import measure
from tests.bench.stage import Stage
from tests.bench.system import BY_NAME as SYSTEMS
from tests.bench.system import CLIENT, PYTHON, TOOLS

ROUNDS: Final = 5
SAMPLES: Final = TOOLS / "samples.jsonl"
DOCS: Final = ROOT / "docs"


def bench(
    stage: Stage,
    results: Results,
    cases: Sequence[Case],
    *,
    rounds: int,
    more: bool = False,
    samples: Path | None = None,
) -> None:
    """Measure, group by group; within one, the rounds of all its cases and systems alternate.

    Earlier samples of these cases and systems are replaced, or with `more` kept and added to. What
    could not be measured is told, and left out. `samples` is written after each round.
    """
    for group in dict.fromkeys(case.group for case in cases):
        chosen = [case for case in cases if case.group == group]
        if not more:
            results.forget((case.name, system) for case in chosen for system in case.systems)
        first = max(results.next_round(case.name) for case in chosen) if more else 0
        for number in range(first, first + rounds):
            for case in chosen:
                if number < (case.rounds or first + rounds):
                    _round(stage, results, case, number)
            if samples is not None:
                results.save(samples)
        print(f"\n{report.group_table(results, group)}\n", flush=True)


def _round(stage: Stage, results: Results, case: Case, number: int) -> None:
    for system in case.systems:
        try:
            sample = measure(stage, case, system, number)
        except BenchError as error:
            print(f"{case.name} {system}: not measured: {error}", file=sys.stderr, flush=True)
            continue
        results.add(sample)
        told = "  ".join(f"{name} {figure:.4g}" for name, figure in sample.figures.items())
        print(f"{number + 1}  {case.name:14} {system:21} {told}", flush=True)


def missed(results: Results) -> list[str]:
    """Return the goals of processor time that are not met."""
    return [goal.about for goal in GOALS if goal.by_cpu and goal.verdict(results) == "not met"]


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return what the command line asks for."""
    cases = [case.quick() for case in CASES if case.name in QUICK] if arguments.quick else CASES
    wanted = _known(arguments.cases, groups())
    systems = _known(arguments.systems, tuple(SYSTEMS))
    kept = (
        replace(case, systems=tuple(system for system in case.systems if system in systems))
        for case in cases
        if case.group in wanted
    )
    return [case for case in kept if case.systems]


def _known(given: str | None, names: Sequence[str]) -> Sequence[str]:
    wanted = given.split(",") if given else names
    if unknown := set(wanted) - set(names):
        raise SystemExit(f"there is no {', '.join(unknown)}; there are: {', '.join(names)}")
    return wanted


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the main cases, once; writes nothing")
    parser.add_argument("--cases", metavar="GROUP,…", help="only these, the rest as it was")
    parser.add_argument("--systems", metavar="NAME,…", help="only these")
    parser.add_argument("--rounds", type=int, help=f"by default {ROUNDS}, or 1 with --quick")
    parser.add_argument("--more", action="store_true", help="add rounds to those of earlier runs")
    parser.add_argument("--gate", action="store_true", help="fail if a goal of CPU is not met")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, write the page, and exit with 1 if `--gate` finds a goal missed."""
    arguments = parse()
    cases = chosen_cases(arguments)
    others = [SYSTEMS[name] for case in cases for name in case.systems if not SYSTEMS[name].ours]
    if others and not (PYTHON.exists() and CLIENT.exists()):
        raise SystemExit(f"{TOOLS} lacks the peers or the C client; `make bench` puts them there")
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    results = Results.load(SAMPLES) if arguments.cases or arguments.more else Results()
    with tempfile.TemporaryDirectory(prefix="brokertask-bench-") as folder:
        node = Node.create(Path(folder) / "node")
        try:
            facts = report.Facts.of(node.start())
            rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
            with Stage(node, Path(folder)) as stage:
                samples = None if arguments.quick else SAMPLES
                more = arguments.more
                bench(stage, results, cases, rounds=rounds, more=more, samples=samples)
        finally:
            node.destroy()
    print(report.goals_table(results))
    if not arguments.quick:
        (DOCS / "performance.md").write_text(report.page(results, facts), encoding="utf-8")
        (DOCS / "performance.svg").write_text(report.plot(results), encoding="utf-8")
    if arguments.gate and (wrong := missed(results)):
        raise SystemExit("not met: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
