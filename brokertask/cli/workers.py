"""`brokertask workers`: who works, as a server has heard, and an order to one to take no more."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from brokertask.cli import console
from brokertask.cli.remote import part
from brokertask.cli.runs import asked
from brokertask.durations import readable

app = typer.Typer(
    help="The workers that a server has heard of: list and drain them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
COLUMNS = ("WORKER", "STATE", "BUSY", "TASKS", "VERSION", "STARTED", "SEEN")


@app.command("list")
def list_workers(as_json: console.Json = False) -> None:
    """List the workers of the last week, the one that started last first."""
    found = asked(lambda remote: remote.get("/workers"))
    if as_json:
        console.show_json(found)
        return
    rows = [_row(worker) for worker in found]
    console.show_table(COLUMNS, rows, empty="no worker was heard of", elastic="TASKS")


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="As `workers list` shows it.")],
    because: Annotated[str, typer.Option(metavar="TEXT", help="For the audit log.")] = "",
    as_json: console.Json = False,
) -> None:
    """Have a worker take no more work, until it is started anew; what it has in hands goes on."""
    path = f"/workers/{part(worker)}/drain"
    said = asked(lambda remote: remote.post(path, {"reason": because}))
    if as_json:
        console.show_json(said)
    else:
        console.out.print(console.printable(f"{said['worker']} is told to take no more work"))


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        worker["worker"],
        worker["state"],
        f"{worker['busy']}/{worker['slots']}",
        ", ".join(task["task"] for task in worker["tasks"]),
        worker["version"],
        f"{_since(worker['started_ms'])} ago",
        f"{_since(worker['seen_ms'])} ago",
    )


def _since(instant_ms: int) -> str:
    return readable(max(0, time.time_ns() // 1_000_000 - instant_ms) / 1000)
