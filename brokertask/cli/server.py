"""`brokertask server`: what needs a memory across runs, with an HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    with _extra():
        from brokertask.server.service import Server
        from brokertask.server.settings import server_settings

    async def serve() -> None:
        settings = server_settings()
        if bind is not None:
            settings = settings.model_copy(update={"bind": bind})
        running = Server(stand_in.settings, settings, stand_in.connect())
        on_stop_signals(running.stop)
        await running.run()

    console.run(serve)


def migrate() -> None:
    """Lead the tables of the server's store to this version, while no server runs.

    The store is BROKERTASK_SERVER_STORE_URL; a server makes those of an empty one by itself.
    """
    with _extra():
        from brokertask.server.settings import server_settings
        from brokertask.server.store.engine import Database

    async def lead() -> None:
        store = Database(server_settings().store_url)
        try:
            before, after = await store.migrate()
        finally:
            await store.close()
        is_now = "is" if before == after else f"was {before or 'empty'}, and is now"
        console.out.print(f"the store's schema {is_now} {after}")

    console.run(lead)


@contextmanager
def _extra() -> Iterator[None]:
    """Say what to install if an import inside the block finds nothing."""
    try:
        yield
    except ModuleNotFoundError as error:
        console.fail(
            ConfigurationError(f"{error.name} is not installed: pip install 'brokertask[server]'")
        )
