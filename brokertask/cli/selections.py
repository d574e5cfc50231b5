"""A frozen selection on the command line: which runs, what is told of it, what is done to it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from rich.progress import Progress

from brokertask.app import App
from brokertask.cli import console, letters
from brokertask.cli.broker import ask, connected
from brokertask.cli.console import Exit
from brokertask.deadletter import DeadLetter, Filter
from brokertask.deadletters import Result, Selection
from brokertask.errors import ConfigurationError

DONE: Final = ("redriven", "discarded")
Act: TypeAlias = Callable[[Selection], AsyncIterator[Result]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which queues, and which of their runs."""

    app: App
    tasks: tuple[str, ...]
    filters: Filter
    named: bool
    """The tasks were named one by one, so each has to exist."""

    @asynccontextmanager
    async def selection(self, *, bodies: bool) -> AsyncIterator[Selection]:
        """Freeze what it asks for, and say on stderr what is not in it."""
        async with (
            connected(self.app) as transport,
            Selection.open(
                transport,
                self.app.settings,
                self.tasks,
                self.filters,
                telemetry=self.app.telemetry,
                claims=self.app.client.claims,
                bodies=bodies,
            ) as selection,
        ):
            if selection.missing and self.named:
                queue = self.app.settings.names.dead_queue(selection.missing[0])
                raise ConfigurationError(
                    f"there is no queue {queue!r} on this broker: no worker has declared task "
                    f"{selection.missing[0]!r}, or BROKERTASK_NAMESPACE is another"
                )
            for note in _notes(selection):
                console.err.print(console.printable(note))
            yield selection


@dataclass(frozen=True, slots=True)
class Order:
    """What to do with a selection, and under which conditions."""

    act: Act
    question: str
    """With {} for how many runs."""
    yes: bool
    dry_run: bool
    expected: int | None
    as_json: bool


async def carry_out(query: Query, order: Order) -> Exit:
    """Freeze a selection, say how large it is, and act on it if nothing speaks against it."""
    async with query.selection(bodies=True) as selection:
        found, now = selection.letters, time.time_ns() // 1_000_000
        if order.expected is not None and len(found) != order.expected:
            console.err.print(f"{_runs(len(found))}, expected {order.expected}: nothing was done")
            return Exit.CONFLICT
        if not order.as_json:
            console.out.print(_frozen(found, now))
        if order.dry_run or not found:
            _show_untouched(order, found, now)
            return Exit.FAILED if query.filters.run_ids and not found else Exit.OK
        if not order.yes and not await ask(order.question.format(_runs(len(found)))):
            console.err.print("nothing was done")
            return Exit.OK
        try:
            await _work(selection, order)
        except asyncio.CancelledError:
            left = len(found) - len(selection.results)
            console.err.print(f"interrupted: {_runs(left)} left in place")
            raise
        finally:
            _report(selection, order)
        well = all(result.status in DONE for result in selection.results)
        return Exit.OK if well else Exit.FAILED


async def _work(selection: Selection, order: Order) -> None:
    """Act on each run; what went wrong, and what is gone for good, is told at once."""
    quiet = order.as_json or not console.err.is_terminal
    with Progress(console=console.err, transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=len(selection.letters))
        async for result in order.act(selection):
            progress.advance(bar)
            if not order.as_json and result.status != "redriven":
                letter, why = result.letter, f": {result.detail}" if result.detail else ""
                text = f"{result.status} {letter.run_id} {letter.task} {letter.reason}{why}"
                console.out.print(console.printable(text))


def _report(selection: Selection, order: Order) -> None:
    counts = Counter(result.status for result in selection.results)
    if not order.as_json:
        told = [f"{count} {status}" for status, count in counts.items()]
        console.out.print(", ".join(told) or "nothing was done")
        return
    runs = [
        {
            "run_id": result.letter.run_id,
            "task": result.letter.task,
            "status": result.status,
            "detail": result.detail,
        }
        for result in selection.results
    ]
    _show_outcome(order, len(selection.letters), counts, runs)


def _show_untouched(order: Order, found: list[DeadLetter], now_ms: int) -> None:
    if order.as_json:
        runs = [letters.as_json(letter, now_ms) for letter in found]
        _show_outcome(order, len(found), {}, runs)
    elif found:
        rows = [letters.row(letter, now_ms) for letter in found]
        console.show_table(letters.COLUMNS, rows, elastic="ERROR")
        console.out.print("dry run: nothing was done")


def _show_outcome(order: Order, selected: int, counts: object, runs: object) -> None:
    fields = {"selected": selected, "dry_run": order.dry_run, "counts": counts, "runs": runs}
    console.show_json(fields)


def _frozen(found: list[DeadLetter], now_ms: int) -> str:
    if not found:
        return "no dead run matches"
    tasks, groups = len({letter.task for letter in found}), len(letters.grouped(found))
    died = [letter.died_ms for letter in found if letter.died_ms is not None]
    oldest = letters.age(min(died, default=None), now_ms)
    return (
        f"Selection frozen: {_runs(len(found))}, {letters.counted(tasks, 'task')}, "
        f"{letters.counted(groups, 'error group')}, oldest {oldest}."
    )


def looked_at(selection: Selection) -> list[dict[str, object]]:
    """Return what was seen of each queue, as JSON."""
    return [
        {
            "task": look.task,
            "ready": look.ready,
            "seen": look.seen,
            "elsewhere": look.elsewhere,
            "readers": look.readers,
            "left": look.left,
        }
        for look in selection.looks
    ]


def _notes(selection: Selection) -> Iterator[str]:
    """Yield what a person should know about what is not in a selection."""
    for task in selection.missing:
        yield f"{task}: no dead-letter queue on this broker"
    for look in selection.looks:
        if look.elsewhere:
            yield f"{look.task}: {_runs(look.elsewhere)} held by another reader"
        elif look.readers:
            yield f"{look.task}: another reader is at work; what it holds is not shown"
        if look.left:
            yield f"{look.task}: {_runs(look.left)} more, not looked at"


def _runs(count: int) -> str:
    return letters.counted(count, "run")
