"""What commands that talk to a broker share: an app or its stand-in, a connection, consent."""

from __future__ import annotations

import asyncio
import difflib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from brokertask.app import App
from brokertask.cli import console, logs
from brokertask.errors import BrokertaskError, ConfigurationError, InvalidOption, InvalidPayload
from brokertask.lint import Limits
from brokertask.retry import Retry
from brokertask.task import Task
from brokertask.telemetry import configure
from brokertask.transport.base import Transport

APP_VARIABLE = "BROKERTASK_APP"

AnApp = Annotated[
    str,
    typer.Option("--app", metavar="MODULE:APP", envvar=APP_VARIABLE, help="Where the App is."),
]
AnyApp = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:APP", envvar=APP_VARIABLE, help="Where the App is."),
]


def app_or_stand_in(spec: str | None) -> App:
    """Return the App that `spec` names, or one without tasks."""
    logs.configure(logs.Level.WARNING, logs.Format.TEXT)
    try:
        app = App("brokertask") if spec is None else console.load_app(spec)
        if app.settings.broker_url().startswith("memory:"):
            raise ConfigurationError(
                "a broker at memory: lives inside one process, and this is another: use "
                "`brokertask dev`, or set BROKERTASK_AMQP_URL to a RabbitMQ"
            )
    except BrokertaskError as error:
        console.fail(error)
    return app


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[Transport]:
    """Open a transport to the app's broker, and close it."""
    transport = app.connect()
    try:
        await transport.open(timeout=app.settings.connect_timeout)
        yield transport
    finally:
        await transport.close()


@contextmanager
def exported(app: App) -> Iterator[None]:
    """Send the spans of what is done inside, if the environment names a collector."""
    try:
        stop = configure(app.name)
    except BrokertaskError as error:
        console.fail(error)
    try:
        yield
    finally:
        stop()


def known_task(app: App, name: str) -> Task[Any, Any]:
    """Return a task of an app.

    Raises:
        InvalidOption: It has none of that name.
    """
    if name not in app.tasks:
        close = difflib.get_close_matches(name, app.tasks, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(app.tasks)}"
        raise InvalidOption(f"app {app.name!r} has no task {name!r}; {hint}")
    return app.tasks[name]


def limits_of(app: App) -> list[Limits]:
    """Return what the rules need to know of an app's tasks."""
    return [
        Limits(
            task=task.id,
            longest_delay=_longest_delay(task.options.retry),
            bounded=task.options.queue.max_length is not None,
        )
        for task in app.tasks.values()
    ]


def _longest_delay(retry: Retry) -> float:
    return retry.backoff(retry.max_attempts - 1) if retry.max_attempts > 1 else 0.0


def read_json(text: str | None, file: Path | None) -> object:
    """Return the value in a text, in a file, or for "-" on standard input; None for neither.

    Raises:
        InvalidOption: Both are given, or the file cannot be read.
        InvalidPayload: It is not JSON.
    """
    if text is not None and file is not None:
        raise InvalidOption("a payload is given as text or as a file, not both")
    if text is None and file is None:
        return None
    try:
        if file is not None:
            text = file.read_text("utf-8")
        elif text == "-":
            text = sys.stdin.read()
        return json.loads(text or "", parse_constant=_refuse_constant)
    except OSError as error:
        raise InvalidOption(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"the payload is not JSON: {error}") from None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def check_consent(*, given: bool) -> None:
    """Fail when there is nobody to ask.

    Raises:
        InvalidOption: Consent was not given, and this is no terminal.
    """
    if not given and not sys.stdin.isatty():
        raise InvalidOption("this is no terminal, so nobody can be asked: add --yes, or --dry-run")


async def ask(question: str) -> bool:
    """Ask on the terminal; the connection's heartbeats go on meanwhile."""
    console.err.print(f"{console.printable(question)} \\[y/N] ", end="")
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        if not answered.done():
            answered.set_result(sys.stdin.readline())

    loop.add_reader(sys.stdin, read)
    try:
        return (await answered).strip().lower() in ("y", "yes")
    finally:
        loop.remove_reader(sys.stdin)
