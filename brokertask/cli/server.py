"""`brokertask server`: what needs a memory across runs, with an HTTP API."""

from __future__ import annotations

from typing import Annotated

import typer

from brokertask.cli import console, logs
from brokertask.cli.broker import app_or_stand_in
from brokertask.cli.worker import LogFormat, LogLevel, on_stop_signals
from brokertask.errors import ConfigurationError


def server(
    bind: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="By default BROKERTASK_SERVER_BIND."),
    ] = None,
    log_level: LogLevel = logs.Level.INFO,
    log_format: LogFormat = logs.Format.TEXT,
) -> None:
    """Serve history, waits, schedules, keys and the HTTP API, until stopped.

    Needs brokertask[server]. Several may run at once on one store and one broker.
    """
    stand_in = app_or_stand_in(None)
    logs.configure(log_level, log_format)
    try:
        from brokertask.server.service import Server
        from brokertask.server.settings import server_settings
    except ModuleNotFoundError as error:
        console.fail(
            ConfigurationError(f"{error.name} is not installed: pip install 'brokertask[server]'")
        )

    async def serve() -> None:
        settings = server_settings()
        if bind is not None:
            settings = settings.model_copy(update={"bind": bind})
        running = Server(stand_in.settings, settings, stand_in.connect())
        on_stop_signals(running.stop)
        await running.run()

    console.run(serve)
