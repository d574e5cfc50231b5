"""What every command shares: the app, errors as one sentence, tables and JSON, exit codes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer
import uvloop
from pydantic_core import to_jsonable_python
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from brokertask import __version__, errors
from brokertask.app import App
from brokertask.cli import remote
from brokertask.cli.loading import AppNotFound, load
from brokertask.statuses import status_of

T = TypeVar("T")
GAP: Final = "  "
STATUS: Final = "STATUS"

out: Final = Console(highlight=False, soft_wrap=True, emoji=False)
err: Final = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for scripts; its fields are stable.")
]
AppSpec = Annotated[
    str, typer.Argument(metavar="MODULE:APP", help="Where the App is, as in app.tasks:app.")
]


class Exit(IntEnum):
    """Exit codes; they mean the same in every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    IMPORT = 3
    BROKER = 4
    STORE = 5
    CONFLICT = 6
    DENIED = 7
    TIMEOUT = 8
    INTERRUPTED = 130


CODES: Final[Mapping[type[BaseException], tuple[str, Exit]]] = {
    errors.DuplicateTask: ("BT-101", Exit.IMPORT),
    errors.InvalidOption: ("BT-102", Exit.USAGE),
    errors.UnsupportedType: ("BT-103", Exit.IMPORT),
    errors.TopologyMismatch: ("BT-104", Exit.CONFLICT),
    errors.ConfigurationError: ("BT-100", Exit.USAGE),
    errors.BrokerUnavailable: ("BT-201", Exit.BROKER),
    errors.AccessDenied: ("BT-202", Exit.DENIED),
    errors.Unroutable: ("BT-203", Exit.CONFLICT),
    errors.IdempotencyConflict: ("BT-208", Exit.CONFLICT),
    errors.QueueFull: ("BT-204", Exit.CONFLICT),
    errors.BrokerBlocked: ("BT-205", Exit.BROKER),
    errors.PublishUnknown: ("BT-206", Exit.TIMEOUT),
    errors.PublishError: ("BT-200", Exit.BROKER),
    errors.StoreUnavailable: ("BT-501", Exit.STORE),
    errors.StoreOutdated: ("BT-504", Exit.STORE),
    remote.ServerUnavailable: ("BT-502", Exit.BROKER),
    remote.Denied: ("BT-503", Exit.DENIED),
    remote.Impossible: ("BT-503", Exit.CONFLICT),
    remote.Refused: ("BT-503", Exit.FAILED),
    errors.PayloadUnavailable: ("BT-302", Exit.BROKER),
    errors.PayloadError: ("BT-301", Exit.USAGE),
    errors.ResultTimeout: ("BT-402", Exit.TIMEOUT),
    errors.RunError: ("BT-401", Exit.FAILED),
}
"""Error code and exit code by class, the most special first; see docs/reference/errors.md."""


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run a command's coroutine function; an expected error becomes a sentence and an exit code."""
    try:
        return uvloop.run(work())  # type: ignore[arg-type]
    except errors.BrokertaskError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def fail(error: errors.BrokertaskError) -> NoReturn:
    """Print what happened and how to mend it, without a traceback, and exit."""
    raise typer.Exit(show_error(error)) from None


def show_error(error: errors.BrokertaskError) -> Exit:
    """Print what happened and how to mend it, and return the exit code for it."""
    code, status = code_of(error)
    if isinstance(error, AppNotFound) and error.frames:
        err.print(escape(error.frames.rstrip()))
    err.print(f"[bold red]error\\[{code}][/]: {printable(str(error))}")
    return status


def code_of(error: BaseException) -> tuple[str, Exit]:
    """Return the error code and the exit code of an error."""
    if isinstance(error, AppNotFound):
        return "BT-105", Exit.IMPORT
    for kind, codes in CODES.items():
        if isinstance(error, kind):
            return codes
    return "BT-000", Exit.FAILED


def load_app(spec: str) -> App:
    """Return the App that `module:attribute` names; the current folder is importable.

    Exits with a sentence when there is none, with the place in the user's own module when it
    fails to import.
    """
    try:
        return load(spec)
    except errors.BrokertaskError as error:
        fail(error)


def show_json(value: object) -> None:
    """Print a value as JSON, to stdout: in ASCII, so that no text in it can move a terminal."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def plain(value: object) -> Any:
    """Return any value in JSON's types: bytes in hex, NaN and infinity as text."""
    return _finite(to_jsonable_python(value, bytes_mode="hex", fallback=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    empty: str = "none",
    elastic: str | None = None,
) -> None:
    """Print rows for people, a line each, however wide; on a terminal, column `elastic` is cut.

    Their text is data: it is never read as markup. A status has its colour.
    """
    if not rows:
        out.print(empty)
        return
    lines = [list(columns), *([visible(str(cell)) for cell in row] for row in rows)]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    if elastic is not None and out.is_terminal:
        index = columns.index(elastic)
        over = sum(widths) + len(GAP) * (len(widths) - 1) - out.width
        widths[index] = max(len(elastic), widths[index] - max(0, over))
    for number, line in enumerate(lines):
        cells = [_fitted(cell, width) for cell, width in zip(line, widths, strict=True)]
        text = Text(GAP.join(cells).rstrip(), style="" if number else "bold")
        if number and STATUS in columns:
            index = columns.index(STATUS)
            since = len(GAP.join([*cells[:index], ""]))
            text.stylize(status_of(line[index]).terminal, since, since + len(line[index]))
        out.print(text)


def _fitted(cell: str, width: int) -> str:
    if cell_len(cell) <= width:
        return set_cell_size(cell, width)
    return f"{set_cell_size(cell, width - 1)}…"


def show_facts(command: str, facts: Mapping[str, str]) -> None:
    """Print what a long-running command has begun, to stderr: a title, and a line for each fact."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{printable(name)}[/]", printable(value))
    err.print(f"[bold]brokertask {__version__} {command}[/]")
    err.print(table)


def printable(text: str) -> str:
    """Return text as markup that is safe for a terminal; see `visible`."""
    return escape(visible(text))


def visible(text: str) -> str:
    """Return text with control characters and direction marks shown as escapes."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode()
        for char in text
    )
