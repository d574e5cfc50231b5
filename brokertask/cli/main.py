"""The command line: every command, and what is common to them."""

from __future__ import annotations

from typing import Annotated

import typer

from brokertask import __version__
from brokertask.cli import (
    bulk,
    control,
    dead,
    queues,
    runs,
    schedules,
    tokens,
    topology,
    waits,
    workers,
)
from brokertask.cli.asyncapi import asyncapi
from brokertask.cli.dev import dev
from brokertask.cli.doctor import doctor
from brokertask.cli.permissions import permissions
from brokertask.cli.server import migrate, server
from brokertask.cli.trigger import trigger
from brokertask.cli.worker import worker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"brokertask {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Durable background tasks on RabbitMQ.

    The broker is BROKERTASK_AMQP_URL; without it a `brokertask dev` running in this folder, else
    RabbitMQ on 127.0.0.1:5672. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the app cannot be
    imported, 4 the broker cannot be reached, 6 conflict, 7 denied, 8 timed out, 130 interrupted.
    """


for command in (dev, worker, server, migrate, trigger, runs.why, doctor, permissions, asyncapi):
    app.command()(command)
app.add_typer(dead.app, name="dead")
app.add_typer(topology.app, name="topology")
app.add_typer(waits.app, name="waits")
app.add_typer(schedules.app, name="schedules")
app.add_typer(queues.app, name="queues")
app.add_typer(workers.app, name="workers")
app.add_typer(bulk.app, name="bulk")
runs.app.command()(control.cancel)
app.add_typer(runs.app, name="runs")
app.add_typer(control.app, name="tasks")
app.add_typer(tokens.app, name="tokens")
