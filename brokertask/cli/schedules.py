"""`brokertask schedules`: see what is triggered when, and stop or hurry it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from brokertask.cli import console
from brokertask.cli.letters import instant
from brokertask.cli.remote import Remote, part
from brokertask.durations import readable
from brokertask.errors import BrokertaskError

app = typer.Typer(
    help="What is triggered when: list, show, pause, resume, run now.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `schedules list` shows it.")]
Count = Annotated[int, typer.Option("-n", metavar="N", min=1, max=5, help="So many.")]
COLUMNS = ("SCHEDULE", "TASK", "WHEN", "NEXT", "LATEST", "FROM")


@app.command("list")
def list_schedules(as_json: console.Json = False) -> None:
    """List schedules: those in the code of workers, and those made at run time."""
    found = _asked(lambda remote: list(remote.pages("/schedules")))
    if as_json:
        console.show_json(found)
    else:
        rows = [_row(schedule) for schedule in found]
        console.show_table(COLUMNS, rows, empty="no schedules", elastic="WHEN")


@app.command()
def show(name: Name, as_json: console.Json = False) -> None:
    """Show a schedule, and what became of its latest ticks."""
    found = _found(name)
    if as_json:
        console.show_json(found)
        return
    console.show_table(COLUMNS, [_row(found)])
    rows = [
        (instant(tick["tick_ms"]), _outcome(tick), tick["run_id"] or "") for tick in found["ticks"]
    ]
    console.show_table(("TICK", "OUTCOME", "RUN"), rows, empty="no tick yet")


@app.command("next")
def show_next(name: Name, count: Count = 5, as_json: console.Json = False) -> None:
    """Show when a schedule is due next, in UTC, as if it were not paused."""
    due = _found(name)["next_ms"][:count]
    if as_json:
        console.show_json(due)
    else:
        for each in due:
            typer.echo(instant(each))


@app.command()
def pause(name: Name, as_json: console.Json = False) -> None:
    """Let no tick run from now on."""
    _act(name, "pause", {"done": "paused", "unchanged": "it was paused before"}, as_json)


@app.command()
def resume(name: Name, as_json: console.Json = False) -> None:
    """Go on with the next tick; those of the pause are not run."""
    _act(name, "resume", {"done": "resumed", "unchanged": "it was not paused"}, as_json)


@app.command()
def run_now(name: Name, as_json: console.Json = False) -> None:
    """Trigger a run beside the ticks, and print its id."""
    began = _asked(lambda remote: remote.post(f"/schedules/{part(name)}/run"))
    if as_json:
        console.show_json(began)
    else:
        typer.echo(began["run_id"])


def _asked(ask: Callable[[Remote], Any]) -> Any:
    try:
        return ask(Remote.of_the_environment())
    except BrokertaskError as error:
        console.fail(error)


def _found(name: str) -> Any:
    return _asked(lambda remote: remote.get(f"/schedules/{part(name)}"))


def _act(name: str, action: str, said: Mapping[str, str], as_json: bool) -> None:
    answer = _asked(lambda remote: remote.post(f"/schedules/{part(name)}/{action}"))
    if as_json:
        console.show_json(answer)
    else:
        typer.echo(said[answer["answer"]])


def _row(schedule: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        schedule["name"],
        schedule["task"],
        _when(schedule["spec"]),
        "paused" if schedule["paused"] else instant(schedule["due_ms"]) or "",
        instant(schedule["run_ms"]) or "never",
        "code" if schedule["declared"] else "API",
    )


def _when(spec: Mapping[str, Any]) -> str:
    if spec["every"] is not None:
        return f"every {readable(spec['every'])}"
    return f"{spec['cron']} {spec['tz']}"


def _outcome(tick: Mapping[str, Any]) -> str:
    if tick["until_ms"] is None or tick["until_ms"] == tick["tick_ms"]:
        return str(tick["outcome"])
    return f"{tick['outcome']}, and all until {instant(tick['until_ms'])}"
