"""`brokertask worker`: supervised processes that run an app's tasks."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

import typer

from brokertask.cli import console, logs
from brokertask.cli.child import Orders
from brokertask.cli.console import Exit
from brokertask.durations import readable, seconds
from brokertask.errors import InvalidOption
from brokertask.health import HealthServer
from brokertask.supervisor import Report, Supervisor

log = logging.getLogger("brokertask.supervisor")

UNMENDABLE: Final = (Exit.IMPORT, Exit.USAGE, Exit.CONFLICT, Exit.DENIED)
"""Exit codes of a child that starting it again would not change."""

Processes = Annotated[
    int, typer.Option("--processes", min=1, max=256, help="How many processes do the work.")
]


Tasks = Annotated[str | None, typer.Option(metavar="A,B", help="Only these tasks; by default all.")]
Concurrency = Annotated[
    str | None,
    typer.Option(
        metavar="N | TASK=N,…",
        help="Runs at a time in each process, for every task or by task; "
        "by default what the tasks declare.",
    ),
]
Grace = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION",
        help="How long runs may finish when told to stop, as in 90s or 5m; "
        "by default BROKERTASK_GRACE.",
    ),
]
Health = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Answer /livez and /readyz over HTTP there."),
]
LogLevel = Annotated[logs.Level, typer.Option("--log-level", help="Log what is so important.")]
LogFormat = Annotated[
    logs.Format, typer.Option("--log-format", help="Lines for people, or JSON for machines.")
]


def worker(
    app: console.AppSpec,
    processes: Processes = 1,
    tasks: Tasks = None,
    concurrency: Concurrency = None,
    grace: Grace = None,
    health: Health = None,
    log_level: LogLevel = logs.Level.INFO,
    log_format: LogFormat = logs.Format.TEXT,
) -> None:
    """Run an app's tasks until stopped.

    Ctrl-C or SIGTERM lets runs finish within the grace period and hands back the rest, uncounted;
    a second signal stops at once. A process that dies is replaced.
    """
    try:
        orders = Orders(
            app=app,
            tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
            concurrency=None if concurrency is None else parse_concurrency(concurrency),
            grace=None if grace is None else parse_duration(grace),
            log_level=log_level,
            log_format=log_format,
        )
        address = None if health is None else parse_address(health)
    except InvalidOption as error:
        console.fail(error)
    logs.configure(log_level, log_format)
    raise typer.Exit(console.run(lambda: _Command(orders, processes, address).run()))


class _Command:
    """One `brokertask worker`: the supervisor, its health endpoint and its table."""

    def __init__(self, orders: Orders, processes: int, address: tuple[str, int] | None) -> None:
        self._orders = orders
        self._processes = processes
        self._address = address
        self._health = ""
        self._shown = False

    async def run(self) -> int:
        """Supervise until stopped, and return the exit code."""
        supervisor = Supervisor(
            self._orders.command(),
            processes=self._processes,
            fatal=UNMENDABLE,
            reported=self._reported,
        )
        on_stop_signals(supervisor.interrupt)
        async with AsyncExitStack() as resources:
            if self._address is not None:
                host, port = self._address
                health = HealthServer(supervisor.describe)
                port = await health.start(host, port)
                resources.push_async_callback(health.close)
                self._health = f"http://{host}:{port}/readyz"
            return await supervisor.run()

    def _reported(self, report: Report) -> None:
        if self._shown or not report.about:
            return
        self._shown = True
        rows = {
            "App": f"{report.about['app']}  ({self._orders.app})",
            "Broker": report.about["broker"],
            "Tasks": tasks_at_work(report.about["tasks"]),
            "Processes": f"{self._processes}, stopping within {readable(report.about['grace'])}",
        }
        if self._health:
            rows["Health"] = self._health
        if self._orders.log_format == logs.Format.TEXT:
            console.show_facts("worker", rows)
        else:
            log.info("%s", "; ".join(f"{name}: {value}" for name, value in rows.items()))


def on_stop_signals(interrupt: Callable[[], None]) -> None:
    """Call `interrupt` at each SIGTERM and Ctrl-C."""
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, interrupt)


def tasks_at_work(concurrency: dict[str, Any]) -> str:
    """Return which tasks run, and how many runs of each at a time."""
    shown = [f"{task} ({count})" for task, count in concurrency.items()]
    rest = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + rest


def parse_concurrency(text: str) -> int | dict[str, int]:
    """Return "8", or "a=2,b=4" by task.

    Raises:
        InvalidOption: It is neither.
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = [part.partition("=") for part in text.split(",")]
        return {task.strip(): int(count) for task, _, count in pairs}
    except ValueError:
        raise InvalidOption(
            f"--concurrency {text!r} is not understood; write 8, or task=2,other=4"
        ) from None


def parse_duration(text: str) -> float:
    """Return "90" or "1m30s" in seconds; raise `InvalidOption` if it is neither."""
    try:
        return seconds(float(text))
    except ValueError:
        return seconds(text)


def parse_address(text: str) -> tuple[str, int]:
    """Return "127.0.0.1:8071" or "[::1]:8071" as host and port.

    Raises:
        InvalidOption: It is not of this form.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise InvalidOption(f"--health {text!r} is not understood; write HOST:PORT")
    return host, int(port)
