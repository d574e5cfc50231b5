"""`brokertask queues`: what waits on the broker, as a server sees it."""

from __future__ import annotations

import typer

from brokertask.cli import console
from brokertask.cli.runs import asked

app = typer.Typer(
    help="What waits in the queues of tasks and servers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def queues() -> None:
    """What waits in the queues of tasks and servers."""


@app.command("list")
def list_queues(as_json: console.Json = False) -> None:
    """List the queues of the tasks that a server has heard of, and its own."""
    found = asked(lambda remote: remote.get("/queues"))
    if as_json:
        console.show_json(found)
        return
    columns = ("QUEUE", "TASK", "KIND", "READY", "CONSUMERS")
    rows = [
        (one["queue"], one["task"] or "", one["kind"], one["ready"], one["consumers"])
        for one in found
    ]
    console.show_table(columns, rows)
