"""`brokertask dead`: look into dead-letter queues; put runs back to work, or delete them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Final

import typer

from brokertask.cli import console, letters
from brokertask.cli.broker import (
    AnyApp,
    app_or_stand_in,
    check_consent,
    exported,
    known_task,
    read_json,
)
from brokertask.cli.console import Exit
from brokertask.cli.selections import Order, Query, carry_out, looked_at
from brokertask.cli.worker import parse_duration
from brokertask.deadletter import Filter
from brokertask.deadletters import Selection
from brokertask.durations import UNITS
from brokertask.errors import BrokertaskError, InvalidOption
from brokertask.topology import check_task_id

app = typer.Typer(
    help="Look into dead-letter queues; put runs back to work, or delete them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)(?:/([smhd]))?")

RunIds = Annotated[list[str] | None, typer.Argument(metavar="[RUN_ID]...", help="These runs only.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", help="Of this task; repeatable. Default: the app's."),
]
Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", metavar="REASON", help="Dead for this reason; repeatable."),
]
ErrorText = Annotated[
    str | None,
    typer.Option("--error", metavar="TEXT", help="Whose last error's type or message has this."),
]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", metavar="TAG", help="With this tag; repeatable.")
]
OlderThan = Annotated[
    str | None, typer.Option(metavar="DURATION", help="That died longer ago, as in 2h or 7d.")
]
NewerThan = Annotated[
    str | None, typer.Option(metavar="DURATION", help="That died more recently than this.")
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="At most so many, from the front of each queue.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]
Expected = Annotated[
    int | None, typer.Option("--expect-count", metavar="N", help="Do nothing unless there are N.")
]


@app.command("list")
def list_dead(
    tasks: Tasks = None,
    spec: AnyApp = None,
    reasons: Reasons = None,
    error: ErrorText = None,
    tags: Tags = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Limit = None,
    group: Annotated[
        bool, typer.Option("--group", help="Count them by task, reason and kind of error.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """List dead runs, the first to die first."""
    query = _query(spec, tasks, (), reasons, error, tags, older_than, newer_than, limit)
    console.run(lambda: _list(query, group=group, as_json=as_json))


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="The run, by its whole id.")],
    tasks: Tasks = None,
    spec: AnyApp = None,
    payload: Annotated[
        bool, typer.Option("--payload", help="Show the payload, too: it may be secret.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """Show all attempts of a dead run, with errors and tracebacks."""
    query = _query(spec, tasks, (run_id,))
    raise typer.Exit(console.run(lambda: _show(query, payload=payload, as_json=as_json)))


@app.command()
def redrive(
    run_ids: RunIds = None,
    tasks: Tasks = None,
    spec: AnyApp = None,
    reasons: Reasons = None,
    error: ErrorText = None,
    tags: Tags = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Limit = None,
    rate: Annotated[
        str | None, typer.Option(metavar="N/s", help="At most so many, as in 50/s or 600/m.")
    ] = None,
    payload: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Another payload, for one run; - is standard input."),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Without the steps that the runs have finished.")
    ] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    expected: Expected = None,
    as_json: console.Json = False,
) -> None:
    """Put dead runs back to work: first attempt, behind their finished steps, a new trace.

    With another payload a run begins anew. Ctrl-C leaves the rest in place.
    """
    query = _query(spec, tasks, run_ids, reasons, error, tags, older_than, newer_than, limit)
    try:
        per_second = None if rate is None else parse_rate(rate)
        body = _new_payload(query, payload)
    except BrokertaskError as problem:
        console.fail(problem)
    act = partial(Selection.redrive, rate=per_second, payload=body, forget=forget)
    question = "Redrive {}?" if rate is None else f"Redrive {{}} at {rate}?"
    _do(query, Order(act, question, yes, dry_run, expected, as_json))


@app.command()
def discard(
    run_ids: RunIds = None,
    tasks: Tasks = None,
    spec: AnyApp = None,
    reasons: Reasons = None,
    error: ErrorText = None,
    tags: Tags = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Limit = None,
    because: Annotated[
        str, typer.Option(metavar="TEXT", help="Why: printed with each, for your records.")
    ] = "",
    yes: Yes = False,
    dry_run: DryRun = False,
    expected: Expected = None,
    as_json: console.Json = False,
) -> None:
    """Delete dead runs for good, and print which they were."""
    query = _query(spec, tasks, run_ids, reasons, error, tags, older_than, newer_than, limit)
    act = partial(Selection.discard, reason=because)
    _do(query, Order(act, "Discard {} for good?", yes, dry_run, expected, as_json))


def parse_rate(text: str) -> float:
    """Return "50/s", "600/m" or "50" as so many a second.

    Raises:
        InvalidOption: It is none of these, or 0.
    """
    match = _RATE.fullmatch(text.replace(" ", ""))
    rate = float(match[1]) / UNITS[match[2] or "s"] if match else 0.0
    if not rate:
        raise InvalidOption(f"--rate {text!r} is not understood; write 50/s or 600/m")
    return rate


def _query(
    spec: str | None,
    tasks: list[str] | None,
    run_ids: Iterable[str] | None = None,
    reasons: list[str] | None = None,
    error: str | None = None,
    tags: list[str] | None = None,
    older_than: str | None = None,
    newer_than: str | None = None,
    limit: int | None = None,
) -> Query:
    app = app_or_stand_in(spec)
    try:
        if not tasks and spec is None:
            raise InvalidOption("which tasks? Name them with --task, or their App with --app")
        return Query(
            app=app,
            tasks=tuple(check_task_id(task) for task in tasks or app.tasks),
            filters=Filter(
                run_ids=tuple(run_ids or ()),
                reasons=tuple(reasons or ()),
                error=error,
                tags=tuple(tags or ()),
                older_than=None if older_than is None else parse_duration(older_than),
                newer_than=None if newer_than is None else parse_duration(newer_than),
                limit=limit,
            ),
            named=bool(tasks),
        )
    except BrokertaskError as problem:
        console.fail(problem)


def _new_payload(query: Query, text: str | None) -> bytes | None:
    """Return the payload given instead, in msgpack, checked by the task's type if that is here."""
    if text is None:
        return None
    value = read_json(text, None)
    if len(query.tasks) != 1:
        raise InvalidOption("a new payload is for a single run: say of which --task")
    task = query.tasks[0]
    if task in query.app.tasks:
        value = known_task(query.app, task).dump(value)
    return query.app.client.encode(value)


def _do(query: Query, order: Order) -> None:
    """Carry out an order and exit."""
    try:
        check_consent(given=order.yes or order.dry_run)
    except InvalidOption as problem:
        console.fail(problem)
    with exported(query.app):
        raise typer.Exit(console.run(lambda: carry_out(query, order)))


async def _list(query: Query, *, group: bool, as_json: bool) -> None:
    now = time.time_ns() // 1_000_000
    async with query.selection(bodies=False) as selection:
        found = selection.letters
        counts = looked_at(selection)
    groups = letters.grouped(found) if group else []
    if as_json:
        dead = [letters.as_json(letter, now) for letter in found]
        told = {"groups": [letters.group_json(one) for one in groups]} if group else {"dead": dead}
        console.show_json({**told, "queues": counts})
    elif group:
        rows = [letters.group_row(one, now) for one in groups]
        console.show_table(letters.GROUP_COLUMNS, rows, empty="no dead runs", elastic="ERROR")
    else:
        rows = [letters.row(letter, now) for letter in found]
        console.show_table(letters.COLUMNS, rows, empty="no dead runs", elastic="ERROR")


async def _show(query: Query, *, payload: bool, as_json: bool) -> Exit:
    now, claims = time.time_ns() // 1_000_000, query.app.client.claims
    async with query.selection(bodies=True) as selection:
        found = selection.letters
        seen = sum(look.seen for look in selection.looks)
    if not found:
        wanted = console.printable(next(iter(query.filters.run_ids)))
        console.err.print(f"no dead run {wanted} among the {seen} of {', '.join(query.tasks)}")
        return Exit.FAILED
    payloads = [await letters.payload_of(one, claims) if payload else None for one in found]
    if as_json:
        both = zip(found, payloads, strict=True)
        console.show_json([letters.in_full(one, now, claims, payload=each) for one, each in both])
        return Exit.OK
    for letter, each in zip(found, payloads, strict=True):
        for line in letters.lines(letter, now, claims):
            console.out.print(line)
        if each is None:
            console.out.print(f"  payload {letters.size(letter)}; --payload shows it")
        else:
            console.out.print("  payload")
            for line in letters.payload_lines(each):
                console.out.print(f"    {line}")
    return Exit.OK
