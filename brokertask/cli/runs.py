"""`brokertask runs`: the history of runs, as a server has it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from brokertask.cli import console
from brokertask.cli.broker import read_json
from brokertask.cli.console import Exit, printable
from brokertask.cli.letters import instant
from brokertask.cli.remote import Remote, part
from brokertask.cli.worker import parse_duration
from brokertask.durations import readable
from brokertask.errors import BrokertaskError

app = typer.Typer(
    help="Runs as a server remembers them: list, show, follow, replay.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
T = TypeVar("T")

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="The run, by its whole id.")]
Statuses = Annotated[
    list[str] | None, typer.Option("--status", metavar="STATUS", help="Repeatable.")
]
Task = Annotated[str | None, typer.Option(metavar="TASK", help="Of this task.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="Repeatable.")]
Since = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Triggered within that time, as in 2h.")
]
ErrorText = Annotated[
    str | None, typer.Option("--error", metavar="TEXT", help="Whose latest error has this.")
]
Parent = Annotated[str | None, typer.Option(metavar="RUN_ID", help="Triggered by this run.")]


@app.command("list")
def list_runs(
    statuses: Statuses = None,
    task: Task = None,
    tags: Tags = None,
    since: Since = None,
    error: ErrorText = None,
    parent: Parent = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many.")] = 50,
    as_json: console.Json = False,
) -> None:
    """List runs, the latest triggered first."""
    query = asked(lambda _: wanted(statuses, task, tags, since, error, parent))
    runs = asked(lambda remote: list(remote.pages("/runs", limit=limit, **query)))
    if as_json:
        console.show_json(runs)
        return
    columns = ("RUN", "TASK", "STATUS", "ATTEMPT", "AGE", "TOOK", "ERROR")
    console.show_table(columns, [_row(run) for run in runs], empty="no such run", elastic="ERROR")


@app.command()
def show(run_id: RunId, as_json: console.Json = False) -> None:
    """Show a run with its attempts and waits; exit code 6: there is none."""
    path = f"/runs/{part(run_id)}"
    run = asked(lambda remote: remote.get(path))
    attempts = asked(lambda remote: remote.get(f"{path}/attempts"))
    waits = asked(lambda remote: remote.get(f"{path}/waits"))
    if as_json:
        console.show_json({**run, "attempts": attempts, "waits": waits})
        return
    for name, value in _facts(run).items():
        console.out.print(f"[bold]{name:<9}[/] {printable(value)}")
    for attempt in attempts:
        told = f"{attempt['error_type']}: {attempt['error_message']}"
        ended = told if attempt["error_type"] else attempt["outcome"]
        console.out.print(f"attempt {attempt['attempt']}  {printable(ended)}")
    for wait in waits:
        console.out.print(f"wait {printable(', '.join(wait['what']))}  {printable(wait['state'])}")


@app.command()
def watch(run_id: RunId, as_json: console.Json = False) -> None:
    """Follow a run until it has ended; exit code 1: it has not completed."""
    path = f"/runs/{part(run_id)}/events"

    def follow(remote: Remote) -> str:
        last = ""
        for name, event in remote.stream(path):
            last = name
            if as_json:
                sys.stdout.write(json.dumps(event) + "\n")
                sys.stdout.flush()
            else:
                console.out.print(printable(_told(event)))
        return last

    raise typer.Exit(Exit.OK if asked(follow) == "completed" else Exit.FAILED)


@app.command()
def logs(
    run_id: RunId,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many lines.")] = 1000,
    as_json: console.Json = False,
) -> None:
    """Print what a run has written to its log, the first line first."""
    path = f"/runs/{part(run_id)}/logs"
    lines = asked(lambda remote: list(remote.pages(path, limit=limit)))
    if as_json:
        console.show_json(lines)
        return
    for line in lines:
        told = f"{instant(line['at_ms'])}  {line['level']:<8} {line['text']}"
        console.out.print(printable(told))


def why(run_id: RunId, as_json: console.Json = False) -> None:
    """Explain what a run waits for: a time, a token, a slot, a worker, somebody's order."""
    found = asked(lambda remote: remote.get(f"/runs/{part(run_id)}/why"))
    if as_json:
        console.show_json(found)
        return
    console.out.print(printable(f"{found['task']}  {found['run_id']}  {found['status']}"))
    for reason in found["reasons"]:
        console.out.print(printable(f"  {reason['what']}"))


@app.command()
def result(
    run_id: RunId,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="Wait for its end up to a minute.")
    ] = "0s",
) -> None:
    """Print the result of a run as JSON; it takes the right to see payloads."""
    path = f"/runs/{part(run_id)}/result"
    ending = asked(lambda remote: remote.get(path, wait=min(60.0, parse_duration(wait))))
    if ending["status"] != "completed":
        console.err.print(f"the run has ended as {printable(ending['status'])}")
        raise typer.Exit(Exit.FAILED)
    console.show_json(ending["result"])


@app.command()
def replay(
    run_id: RunId,
    payload: Annotated[
        str | None, typer.Option(metavar="JSON", help="Another payload; - is standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Another payload.")] = None,
    because: Annotated[str, typer.Option(metavar="TEXT", help="For the audit log.")] = "",
    as_json: console.Json = False,
) -> None:
    """Trigger a new run of the same task with the same payload, or another one."""

    def again(remote: Remote) -> Any:
        body: dict[str, object] = {"reason": because}
        if payload is not None or file is not None:
            body |= {"replace": True, "payload": read_json(payload, file)}
        return remote.post(f"/runs/{part(run_id)}/replay", body)

    began = asked(again)
    if as_json:
        console.show_json(began)
    else:
        console.out.print(printable(began["run_id"]))


@app.command()
def redrive(
    run_id: RunId,
    forget: Annotated[
        bool, typer.Option("--forget", help="Without the steps that it has finished.")
    ] = False,
    because: Annotated[str, typer.Option(metavar="TEXT", help="For the audit log.")] = "",
    as_json: console.Json = False,
) -> None:
    """Put a dead run back to work; `brokertask dead redrive` does it to many, without a server."""
    body = {"forget": forget, "reason": because}
    done = asked(lambda remote: remote.post(f"/runs/{part(run_id)}/redrive", body))
    if as_json:
        console.show_json(done)
    else:
        console.out.print(f"{printable(done['run_id'])} is at work again")


@app.command()
def export(
    statuses: Statuses = None,
    task: Task = None,
    tags: Tags = None,
    since: Since = None,
    error: ErrorText = None,
    parent: Parent = None,
) -> None:
    """Print all runs that the filters take, one JSON object a line."""

    def each(remote: Remote) -> None:
        query = wanted(statuses, task, tags, since, error, parent)
        for run in remote.pages("/runs", **query):
            sys.stdout.write(json.dumps(run) + "\n")

    asked(each)


def asked(work: Callable[[Remote], T]) -> T:
    """Return what a server answers; a problem becomes a sentence and an exit code."""
    try:
        return work(Remote.of_the_environment())
    except BrokertaskError as error:
        console.fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def wanted(
    statuses: list[str] | None,
    task: str | None,
    tags: list[str] | None,
    since: str | None,
    error: str | None,
    parent: str | None,
) -> dict[str, Any]:
    """Return which runs the filters of a command take, as a server is asked for them.

    Raises:
        InvalidOption: `since` is no duration.
    """
    since_ms = None
    if since is not None:
        since_ms = time.time_ns() // 1_000_000 - round(parse_duration(since) * 1000)
    given: dict[str, Any] = {
        "status": statuses,
        "task": task,
        "tag": tags,
        "error": error,
        "parent": parent,
    }
    return {**given, "since_ms": since_ms}


def _row(run: Mapping[str, Any]) -> tuple[str, ...]:
    error = f"{run['error_type']}: {run['error_message']}" if run["error_type"] else ""
    return (
        run["run_id"],
        run["task"],
        run["status"],
        str(run["attempt"]),
        _since(run["triggered_ms"]),
        _took(run),
        error,
    )


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    error = f"{run['error_type']}: {run['error_message']}" if run["error_type"] else None
    facts = {
        "run": run["run_id"],
        "task": run["task"],
        "status": run["status"] + (f" ({run['reason']})" if run["reason"] else ""),
        "triggered": f"{_since(run['triggered_ms'])} ago",
        "took": _took(run) or None,
        "attempt": str(run["attempt"]),
        "error": error,
        "waits for": ", ".join(run["waits"]) or None,
        "tags": ", ".join(run["tags"]) or None,
        "parent": run["parent"],
        "trace": run["trace_id"],
    }
    return {name: value for name, value in facts.items() if value is not None}


def _told(event: Mapping[str, Any]) -> str:
    error = event["error"]
    details = [
        f"attempt {event['attempt']}",
        f"{error['type']}: {error['message']}" if error else "",
        ", ".join(event["waits"] or ()),
        f"for {readable(event['delay_ms'] / 1000)}" if event["delay_ms"] else "",
        f"{event['done']:g} done" if event["done"] is not None else "",
    ]
    return "  ".join([event["event"], *(each for each in details if each)])


def _since(instant_ms: int) -> str:
    return readable(max(0, time.time_ns() // 1_000_000 - instant_ms) / 1000)


def _took(run: Mapping[str, Any]) -> str:
    if run["ended_ms"] is None:
        return ""
    return readable(max(0, run["ended_ms"] - run["triggered_ms"]) / 1000)
