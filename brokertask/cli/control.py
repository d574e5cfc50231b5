"""`brokertask runs cancel`, `tasks pause` and `tasks resume`: orders to all workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from brokertask.cli import console
from brokertask.cli.broker import AnyApp, app_or_stand_in
from brokertask.client import Client

app = typer.Typer(
    help="Pause tasks everywhere, and resume them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TaskId = Annotated[str, typer.Argument(metavar="TASK", help="The task, by its id.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; up to 500 characters.")]


def cancel(
    run_ids: Annotated[
        list[str], typer.Argument(metavar="RUN_ID...", help="Runs, by their whole ids.")
    ],
    reason: Reason = "",
    children: Annotated[
        bool, typer.Option("--children", help="With the runs that they have triggered.")
    ] = False,
    spec: AnyApp = None,
    as_json: console.Json = False,
) -> None:
    """Cancel runs, wherever they are: queued, delayed, asleep, waiting or running.

    Needs no server. Nothing happens to a run that has ended.
    """

    async def order(client: Client) -> None:
        for run_id in run_ids:
            await client.cancel(run_id, reason=reason, children=children)

    _give(order, spec)
    if as_json:
        console.show_json([{"run_id": run_id, "said": "cancel"} for run_id in run_ids])
    else:
        typer.echo(f"workers are told to cancel {', '.join(map(console.visible, run_ids))}")


@app.command()
def pause(
    task: TaskId, reason: Reason = "", spec: AnyApp = None, as_json: console.Json = False
) -> None:
    """Have no worker begin runs of a task until it is resumed; those that run go on."""
    _give(lambda client: client.pause(task, reason=reason), spec)
    _said(task, "pause", as_json=as_json)


@app.command()
def resume(
    task: TaskId, reason: Reason = "", spec: AnyApp = None, as_json: console.Json = False
) -> None:
    """Have workers begin runs of a task again."""
    _give(lambda client: client.resume(task, reason=reason), spec)
    _said(task, "resume", as_json=as_json)


def _give(order: Callable[[Client], Awaitable[None]], spec: str | None) -> None:
    owner = app_or_stand_in(spec)

    async def give() -> None:
        async with owner:
            await order(owner.client)

    console.run(give)


def _said(task: str, said: str, *, as_json: bool) -> None:
    if as_json:
        console.show_json({"task": task, "said": said})
    else:
        typer.echo(f"workers are told to {said} {task}")
