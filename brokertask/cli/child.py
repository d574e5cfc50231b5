"""The process that does the work: `python -m brokertask.cli.child ORDERS FD`.

A supervisor starts it. ORDERS is JSON; FD is its end of the socket over which it reports, and
over which it notices that the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from brokertask.app import App
from brokertask.cli import logs
from brokertask.cli.example import example_command
from brokertask.cli.loading import load
from brokertask.cli.watchdog import Watchdog
from brokertask.errors import BrokertaskError, BrokerUnavailable, ConfigurationError
from brokertask.settings import mask
from brokertask.supervisor import HEARTBEAT, Report, State
from brokertask.telemetry import configure
from brokertask.worker import Worker

log = logging.getLogger("brokertask.worker")

HAND_BACK: Final = 1.0
"""When told to stop at once: how long handing back may take."""
FLUSH: Final = 2.0
"""When told to stop at once: how long sending telemetry may take."""
LINGER: Final = 2.0
"""How long a thread that nobody can end may hold up the exit."""
BROKER_UNAVAILABLE: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a child is to do."""

    app: str
    tasks: list[str] | None = None
    concurrency: int | dict[str, int] | None = None
    grace: float | None = None
    log_level: str = "info"
    log_format: str = "text"
    quiet: bool = False
    """Only warnings of brokertask itself: somebody else tells what happens."""

    def command(self) -> list[str]:
        """Return the command that starts such a child, but for the descriptor."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return [sys.executable, "-m", "brokertask.cli.child", json.dumps(said)]


def _be_nobody() -> None:
    """Let a process that a task has forked be ended: its signals are not for the worker."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Work until told to stop, and exit with one of the codes of `console.Exit`."""
    orders, descriptor = Orders(**json.loads(sys.argv[1])), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=_be_nobody)
    logs.configure(orders.log_level, orders.log_format)
    if orders.quiet:
        logging.getLogger("brokertask").setLevel(logging.WARNING)
    try:
        app = load(orders.app)
        _refuse_memory(app)
        worker = app.worker(tasks=orders.tasks, concurrency=orders.concurrency)
        flush = configure(app.name)
    except BrokertaskError as error:
        sys.exit(_shown(error))
    with socket.socket(fileno=descriptor) as channel:
        life = _Life(app, worker, orders, flush)
        sys.exit(uvloop.run(life.run(channel)))


def _refuse_memory(app: App) -> None:
    if app.settings.broker_url().startswith("memory:"):
        raise ConfigurationError(
            "memory: is a broker inside one process, where nobody else can trigger anything; "
            "use `brokertask dev`, or set BROKERTASK_AMQP_URL to a RabbitMQ"
        )


def _shown(error: BrokertaskError) -> int:
    """Print an error as every command does, and return the exit code for it."""
    from brokertask.cli.console import show_error  # only who fails pays for its imports

    return show_error(error)


class _Life:
    """A worker's life in this process: start, work, drain."""

    def __init__(self, app: App, worker: Worker, orders: Orders, flush: Callable[[], None]) -> None:
        self._app = app
        self._worker = worker
        self._flush = flush
        self._orders = orders
        self._grace = app.settings.grace if orders.grace is None else orders.grace
        self._state: State = "starting"
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self, channel: socket.socket) -> int:
        """Return the exit code."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stop.set)
        loop.add_signal_handler(signal.SIGQUIT, self._interrupt)
        reader, self._writer = await asyncio.open_unix_connection(sock=channel)
        parent = asyncio.create_task(self._watch_parent(reader), name="brokertask parent")
        beating = asyncio.create_task(self._beat(), name="brokertask heartbeat")
        self._report(about=self._about())
        try:
            code = await self._live()
        finally:
            for task in (parent, beating):
                task.cancel()
            self._report()
            self._writer.close()
        _exit_surely(code)
        return code

    async def _live(self) -> int:
        starting = asyncio.create_task(self._worker.start(), name="brokertask start")
        try:
            await _either(starting, self._stop)
        except BrokerUnavailable as error:
            self._report(failure=str(error))
            return BROKER_UNAVAILABLE
        except BrokertaskError as error:
            return _shown(error)
        if not self._stop.is_set():
            # What is here now stays: looked through again and again for garbage, it would cost a
            # sixth of a worker's time under load.
            gc.collect()
            gc.freeze()
            self._state = "ready"
            self._report()
            await self._stop.wait()
        self._state = "draining"
        self._report()
        return await self._drain()

    async def _drain(self) -> int:
        draining = asyncio.create_task(self._drain_in_order(), name="brokertask drain")
        await _either(draining, self._hurry)
        if not self._hurry.is_set():
            return 0
        # At once, but not carelessly: a run that is handed back now costs it no attempt.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._worker.stop(grace=0), HAND_BACK)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._flush), FLUSH)
        left = self._worker.busy
        if left:
            log.warning("%d run(s) are left to the broker, which counts an attempt for each", left)
        logging.shutdown()
        os._exit(1 if left else 0)

    async def _drain_in_order(self) -> None:
        try:
            await self._worker.stop(grace=self._grace)
        finally:
            await asyncio.to_thread(self._flush)

    def _interrupt(self) -> None:
        self._stop.set()
        self._hurry.set()

    async def _watch_parent(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            await reader.read()
        if not self._stop.is_set():
            log.warning("the supervisor is gone: draining")
            self._stop.set()

    async def _beat(self) -> None:
        watchdog = Watchdog(asyncio.get_running_loop())
        while True:
            await asyncio.sleep(HEARTBEAT)
            watchdog.tick()
            if self._state in ("ready", "reconnecting"):
                self._state = "ready" if self._worker.ready else "reconnecting"
            self._report()

    def _report(self, *, about: dict[str, Any] | None = None, failure: str = "") -> None:
        report = Report(
            state=self._state, busy=self._worker.busy, about=about or {}, failure=failure
        )
        if self._writer.is_closing():
            return
        # A supervisor that is stopped in a debugger must not fill our memory.
        if self._writer.transport.get_write_buffer_size() < 65_536:
            self._writer.write(report.line())

    def _about(self) -> dict[str, Any]:
        module = sys.modules[self._orders.app.partition(":")[0].partition(".")[0]]
        place = module.__file__ or next(iter(module.__path__))
        return {
            "app": self._app.name,
            "broker": mask(self._app.settings.broker_url()),
            "namespace": self._app.settings.namespace,
            "tasks": self._worker.concurrency,
            "grace": self._grace,
            "folder": str(Path(place).parent if module.__file__ else Path(place)),
            "try": example_command(self._worker.tasks[0]) if self._orders.quiet else "",
        }


async def _either(task: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait for the end of `task`, and raise what it raised; or cancel it when `event` is set."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def _exit_surely(code: int) -> None:
    """See to it that the process ends: the interpreter waits for threads, for ever if need be.

    A sync task that the drain could not end runs in such a thread.
    """
    timer = threading.Timer(LINGER, os._exit, args=(code,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
