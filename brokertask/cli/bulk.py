"""`brokertask bulk`: jobs of a server over many runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from brokertask.cli import console, runs
from brokertask.cli.broker import check_consent, read_json
from brokertask.cli.console import Exit, printable
from brokertask.cli.dead import parse_rate
from brokertask.cli.remote import Remote, part
from brokertask.cli.runs import asked
from brokertask.durations import readable

app = typer.Typer(
    help="Redrive, discard, cancel or replay many runs, by a server: start, follow, stop.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
COLUMNS = ("JOB", "ACTION", "STATE", "RUNS", "DONE", "SKIPPED", "FAILED", "LEFT", "BY", "AGE")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `bulk list` shows it.")]
Because = Annotated[str, typer.Option(metavar="TEXT", help="Why; for the audit log.")]


class Action(StrEnum):
    """What is done to runs."""

    REDRIVE = "redrive"
    DISCARD = "discard"
    CANCEL = "cancel"
    REPLAY = "replay"


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many.")] = 50,
    as_json: console.Json = False,
) -> None:
    """List jobs, the latest first."""
    found = asked(lambda remote: list(remote.pages("/bulk/jobs", limit=limit)))
    if as_json:
        console.show_json(found)
    else:
        console.show_table(COLUMNS, [_row(job) for job in found], empty="no jobs")


@app.command()
def show(job: JobId, as_json: console.Json = False) -> None:
    """Show how far a job is, and the runs that were skipped or have failed."""
    path = f"/bulk/jobs/{part(job)}"
    found = asked(lambda remote: remote.get(path))
    items = asked(
        lambda remote: [
            item
            for state in ("skipped", "failed")
            for item in remote.pages(f"{path}/items", limit=None if as_json else 50, state=state)
        ]
    )
    if as_json:
        console.show_json({**found, "items": items})
        return
    console.show_table(COLUMNS, [_row(found)])
    rows = [(item["run_id"], item["task"], item["state"], item["detail"] or "") for item in items]
    if rows:
        console.show_table(("RUN", "TASK", "STATE", "WHY"), rows, elastic="WHY")


@app.command()
def start(
    action: Annotated[Action, typer.Argument(metavar="ACTION", help="redrive, discard, …")],
    run_ids: Annotated[
        list[str] | None, typer.Option("--run", metavar="RUN_ID", help="Repeatable.")
    ] = None,
    statuses: runs.Statuses = None,
    task: runs.Task = None,
    tags: runs.Tags = None,
    since: runs.Since = None,
    error: runs.ErrorText = None,
    parent: runs.Parent = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Dead by this kind of error.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="N/s", help="So many a second at most, as in 50/s.")
    ] = None,
    because: Because = "",
    children: Annotated[
        bool, typer.Option("--children", help="Cancel what they have triggered, too.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Redrive without the steps that have finished.")
    ] = False,
    payload: Annotated[
        str | None, typer.Option(metavar="JSON", help="Replay with another; - is standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Another payload.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how many they are, and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: console.Json = False,
) -> None:
    """Begin a job over the runs that the filters take now, and print its id."""
    given = asked(lambda _: runs.wanted(statuses, task, tags, since, error, parent))
    wanted = {
        name: value
        for name, value in {**given, "run_id": run_ids, "fingerprint": fingerprint}.items()
        if value is not None
    }
    preview = asked(lambda remote: remote.get(f"/bulk/preview/{action}", **wanted))
    if dry_run or not preview["count"]:
        _show_preview(preview, as_json=as_json)
        return
    per_second = asked(lambda _: None if rate is None else parse_rate(rate))
    _confirm(action, preview, given=yes)

    def begin(remote: Remote) -> Any:
        body: dict[str, object] = {
            "select": wanted,
            "expected": preview["count"],
            "rate": per_second,
            "reason": because,
            "children": children,
            "forget": forget,
        }
        if payload is not None or file is not None:
            body |= {"replace": True, "payload": read_json(payload, file)}
        return remote.post(f"/bulk/start/{action}", body)

    job = asked(begin)
    if as_json:
        console.show_json(job)
    else:
        console.out.print(printable(job["id"]))


@app.command()
def abort(job: JobId, because: Because = "", as_json: console.Json = False) -> None:
    """Stop a job: what has begun is brought to its end, what waits is left as it is."""
    path = f"/bulk/jobs/{part(job)}/abort"
    said = asked(lambda remote: remote.post(path, {"reason": because}))
    if as_json:
        console.show_json(said)
    else:
        console.show_table(COLUMNS, [_row(said)])


def _show_preview(preview: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.show_json(preview)
        return
    rows = list(preview["by_task"].items())
    console.show_table(("TASK", "RUNS"), rows, empty="no such run, or it cannot be done to it")


def _confirm(action: Action, preview: Mapping[str, Any], *, given: bool) -> None:
    asked(lambda _: check_consent(given=given))
    more = " (the newest, there may be more)" if preview["capped"] else ""
    question = f"{action} {preview['count']} runs{more} of {', '.join(preview['by_task'])}?"
    if not given and not typer.confirm(question, err=True):
        raise typer.Exit(Exit.FAILED)


def _row(job: Mapping[str, Any]) -> tuple[object, ...]:
    counts = job["counts"]
    return (
        job["id"],
        job["action"],
        job["state"],
        job["total"],
        counts["done"],
        counts["skipped"],
        counts["failed"],
        counts["waiting"] + counts["sent"],
        job["created_by"],
        readable(max(0, time.time_ns() // 1_000_000 - job["created_ms"]) / 1000),
    )
