"""`brokertask waits`: decide what runs wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from brokertask.cli import console
from brokertask.cli.broker import read_json
from brokertask.cli.remote import Remote, part
from brokertask.cli.worker import parse_duration
from brokertask.durations import readable
from brokertask.errors import BrokertaskError

app = typer.Typer(
    help="Tokens that runs wait for: list, complete, reject or extend them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TokenId = Annotated[str, typer.Argument(metavar="TOKEN_ID", help="As `waits list` shows it.")]
Limit = Annotated[int, typer.Option(metavar="N", help="At most so many.")]


@app.command("list")
def list_tokens(
    everything: Annotated[
        bool, typer.Option("--all", help="Those that were decided, too.")
    ] = False,
    limit: Limit = 100,
    as_json: console.Json = False,
) -> None:
    """List the tokens that runs wait for."""
    state = "all" if everything else "open"
    found = _asked(lambda remote: list(remote.pages("/waits/tokens", limit=limit, state=state)))
    if as_json:
        console.show_json(found)
        return
    now_ms = time.time_ns() // 1_000_000
    columns = ("TOKEN", "NAME", "RUN", "STATE", "SINCE", "TIME LEFT")
    rows = [
        (
            token["id"],
            token["name"] or "",
            token["run_id"] or "none yet",
            token["state"],
            f"{readable(max(0, now_ms - token['created_ms']) / 1000)} ago",
            _left(token, now_ms),
        )
        for token in found
    ]
    console.show_table(columns, rows, empty="no run waits for a token", elastic="NAME")


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="The run, by its whole id.")],
    as_json: console.Json = False,
) -> None:
    """Show what a run waits and has waited for."""
    found = _asked(lambda remote: remote.get(f"/runs/{part(run_id)}/waits"))
    if as_json:
        console.show_json(found)
        return
    columns = ("WAIT", "STATE", "FOR")
    rows = [(wait["key"], wait["state"], ", ".join(wait["what"])) for wait in found]
    console.show_table(columns, rows, empty="this run has waited for nothing", elastic="FOR")


@app.command()
def complete(
    token: TokenId,
    value: Annotated[
        str | None, typer.Option(metavar="JSON", help="What the run gets; - is standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, from a file.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Complete a token: the run that waits for it goes on with the value."""
    path = f"/waits/tokens/{part(token)}/complete"
    _told(_asked(lambda remote: remote.post(path, {"value": read_json(value, file)})), as_json)


@app.command()
def reject(
    token: TokenId,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; the run gets it.")] = "",
    as_json: console.Json = False,
) -> None:
    """Reject a token: the run that waits for it goes on with the reason."""
    path = f"/waits/tokens/{part(token)}/reject"
    _told(_asked(lambda remote: remote.post(path, {"reason": reason})), as_json)


@app.command()
def extend(
    token: TokenId,
    duration: Annotated[
        str, typer.Argument(metavar="DURATION", help="From now, as in 2h or 7d; or `forever`.")
    ],
    as_json: console.Json = False,
) -> None:
    """Give a token more time, or less."""
    path = f"/waits/tokens/{part(token)}/extend"

    def ask(remote: Remote) -> Any:
        due_ms = None
        if duration != "forever":
            due_ms = time.time_ns() // 1_000_000 + round(parse_duration(duration) * 1000)
        return remote.post(path, {"due_ms": due_ms})

    _told(_asked(ask), as_json)


def _asked(ask: Callable[[Remote], Any]) -> Any:
    try:
        return ask(Remote.of_the_environment())
    except BrokertaskError as error:
        console.fail(error)


def _told(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.show_json(answer)
    else:
        typer.echo("done" if answer["answer"] == "done" else "it was decided like this before")


def _left(token: dict[str, Any], now_ms: int) -> str:
    if token["state"] != "waiting" or token["due_ms"] is None:
        return ""
    left = token["due_ms"] - now_ms
    return readable(left / 1000) if left > 0 else "none"
