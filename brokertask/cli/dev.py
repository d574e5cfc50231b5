"""`brokertask dev`: the embedded broker, a server, workers that reload, a line for each event."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from brokertask.app import App
from brokertask.cli import console, logs
from brokertask.cli.child import Orders
from brokertask.cli.worker import UNMENDABLE, Processes, on_stop_signals, tasks_at_work
from brokertask.durations import readable
from brokertask.envelope import Message
from brokertask.errors import ConfigurationError, EnvelopeError
from brokertask.events import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    FAILED,
    LOG,
    RETRYING,
    SLEEPING,
    STARTED,
    STEP,
    Event,
)
from brokertask.settings import DEV_SOCKET, Settings, mask
from brokertask.supervisor import Report, Supervisor
from brokertask.topology import Binding, Queue
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.socket import serve

MARKS: Final = {
    COMPLETED: "[green]✔[/]",
    RETRYING: "[yellow]↻[/]",
    FAILED: "[red]✗[/]",
    EXPIRED: "[red]✗[/]",
    CANCELLED: "[yellow]✗[/]",
}
SHORT_ID: Final = 8
"""Of a run's id, from its end: it begins with the time, which neighbours share."""
MAX_ERROR: Final = 200
STORE: Final = DEV_SOCKET.with_name("dev.db")
"""What the server writes; of no use without the broker that forgets, to a later server least."""


def dev(
    app: console.AppSpec,
    reload: Annotated[
        bool, typer.Option(help="Start new processes when a *.py of the app changes.")
    ] = True,
    processes: Processes = 1,
    server: Annotated[
        bool, typer.Option(help="Run a server too, if brokertask[server] is installed.")
    ] = True,
) -> None:
    """Run an app with a broker and a server of its own: not for production.

    Both are inside this process and forget everything at exit; commands and services that run in
    this folder use them by themselves. With BROKERTASK_AMQP_URL set, that broker is used, and
    whatever servers it has. The HTTP API listens on BROKERTASK_SERVER_BIND. Ctrl-C lets runs
    finish, a second Ctrl-C stops at once.
    """
    logs.configure(logs.Level.WARNING, logs.Format.TEXT)
    raise typer.Exit(console.run(lambda: _Dev(app, processes, reload=reload, server=server).run()))


class _Dev:
    """One `brokertask dev`, from its start to its end."""

    def __init__(self, spec: str, processes: int, *, reload: bool, server: bool) -> None:
        self._spec = spec
        self._processes = processes
        self._reload = reload
        self._serves = server
        self._server, self._console = "none", ""
        self._about: Mapping[str, Any] = {}
        self._known = asyncio.Event()
        self._app = _own_app()
        self._url = self._app.settings.broker_url()
        self._embedded = self._url == f"unix:{DEV_SOCKET}"
        self._supervisor = Supervisor(
            Orders(app=spec, quiet=True).command(),
            processes=processes,
            fatal=UNMENDABLE,
            environment=_environment(self._url),
            reported=self._reported,
        )

    async def run(self) -> int:
        """Run until stopped, and return the exit code."""
        if self._reload:
            _changes_of_python()
        on_stop_signals(self._interrupt)
        async with AsyncExitStack() as resources:
            if self._embedded:
                broker = MemoryBroker()
                resources.callback(broker.close)
                await resources.enter_async_context(await serve(broker, DEV_SOCKET))
                _ignore_in_git(DEV_SOCKET.parent)
                if self._serves:
                    await self._serve(resources, broker)
            await self._listen(resources)
            accompanying = asyncio.create_task(self._accompany(), name="brokertask dev")
            try:
                return await self._supervisor.run()
            finally:
                accompanying.cancel()
                await asyncio.gather(accompanying, return_exceptions=True)

    def _interrupt(self) -> None:
        busy = self._supervisor.busy
        if busy and not self._supervisor.stopping:
            say("[cyan]●[/]", f"{busy} run(s) may finish; Ctrl-C again stops at once")
        self._supervisor.interrupt()

    def _reported(self, report: Report) -> None:
        if report.about and not self._about:
            self._about = report.about
            self._known.set()

    async def _serve(self, resources: AsyncExitStack, broker: MemoryBroker) -> None:
        """Have a server beside the broker: before there are workers, so that it hears of all."""
        try:
            from brokertask.server.service import Server, serving
            from brokertask.server.settings import server_settings
        except ModuleNotFoundError as error:
            self._server = f"none: {error.name} is missing; pip install 'brokertask[server]'"
            return
        settings = server_settings()
        if "store_url" not in settings.model_fields_set:
            _forget()
            resources.callback(_forget)
            settings = settings.model_copy(update={"store_url": f"sqlite+aiosqlite:///{STORE}"})
        server = Server(self._app.settings, settings, MemoryTransport(broker))
        try:
            await resources.enter_async_context(serving(server))
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}, or use --no-server") from error
        host, _, _ = settings.bind.rpartition(":")
        self._console = f"http://{host}:{server.site.port}/"
        self._server = f"{self._console}api/v1"

    async def _listen(self, resources: AsyncExitStack) -> None:
        """Print every event of every run, whoever runs it."""
        app, names = self._app, self._app.settings.names
        transport = app.connect()
        resources.push_async_callback(transport.close)
        await transport.open(timeout=app.settings.connect_timeout)
        if app.settings.declare:
            await transport.declare(app.topology())
        name = names.reply(f"dev-{os.getpid()}")
        queue = Queue(name, {"x-expires": 60_000, "x-queue-type": "classic"})
        listener = await transport.listen(queue, (Binding(names.events, name, "#"),), show_event)
        resources.push_async_callback(listener.close)

    async def _accompany(self) -> None:
        """Say what runs once that is known, and start it anew when its code changes."""
        await self._known.wait()
        self._show()
        await self._supervisor.proven.wait()
        say("[green]●[/]", "ready; Ctrl-C stops")
        if self._reload:
            folder = Path(self._about["folder"])
            async for _ in _changes_of_python()(folder):
                await self._replace()

    def _show(self) -> None:
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        folder = os.path.relpath(self._about["folder"])
        watched = "the current folder" if folder == "." else folder
        reload = f"reload on *.py in {watched}" if self._reload else "no reload"
        console.show_facts(
            "dev, NOT FOR PRODUCTION",
            {
                "Broker": "embedded, in memory: it forgets everything at exit"
                if self._embedded
                else f"{mask(self._url)} (BROKERTASK_AMQP_URL), not the embedded one",
                **({"Console": self._console} if self._console else {}),
                "Server": self._server,
                "Worker": f"{self._processes} process(es), {reload}",
                "Tasks": tasks_at_work(self._about["tasks"]),
                "Traces": mask(endpoint) if endpoint else "off (OTEL_EXPORTER_OTLP_ENDPOINT)",
                "Try": self._about["try"],
            },
        )
        used = self._about["broker"], self._about["namespace"]
        if used != (mask(self._url), self._app.settings.namespace):
            what = f"the app's own settings choose {used[0]}, namespace {used[1]}"
            say("[yellow]![/]", f"{what}: this broker is not used, and no events are shown")

    async def _replace(self) -> None:
        began = time.monotonic()
        say("[cyan]↻[/]", "the code changed")
        problem = await self._supervisor.replace()
        if self._supervisor.stopping:
            return
        if problem:
            say("[red]✗[/]", f"not reloaded ({problem}): keeping the last good worker")
        else:
            say("[green]●[/]", f"reloaded in {readable(time.monotonic() - began)}")


def _own_app() -> App:
    """Return an app without tasks, for its connection to the broker that everybody here uses."""
    app = App("brokertask dev")
    if app.settings.amqp_url is None:
        return App(app.name, settings=Settings(amqp_url=f"unix:{DEV_SOCKET}"))
    if app.settings.amqp_url.startswith("memory:"):
        raise ConfigurationError(
            "BROKERTASK_AMQP_URL is memory:, a broker inside one process; unset it, and "
            "`brokertask dev` offers its embedded broker to every process in this folder"
        )
    return app


def _environment(url: str) -> dict[str, str]:
    quick = {"OTEL_BSP_SCHEDULE_DELAY": "200"}
    # Two saves within a second may leave an old .pyc that looks as new as the source.
    fresh = {"PYTHONDONTWRITEBYTECODE": "1", "BROKERTASK_AMQP_URL": url}
    return quick | os.environ | fresh


def _changes_of_python() -> Callable[[Path], Any]:
    """Return what tells of changes to *.py below a folder."""
    try:
        from watchfiles import PythonFilter, awatch
    except ImportError:
        raise ConfigurationError(
            "reload needs watchfiles: pip install 'brokertask[reload]', or use --no-reload"
        ) from None
    return lambda folder: awatch(folder, watch_filter=PythonFilter())


def _forget() -> None:
    """Delete the store, which one that was killed may have left, too."""
    for path in STORE.parent.glob(f"{STORE.name}*"):
        path.unlink()


def _ignore_in_git(folder: Path) -> None:
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")


def show_event(message: Message) -> None:
    """Print what happened to a run."""
    try:
        event = Event.read(message)
    except EnvelopeError:
        return
    if event.event in (STARTED, STEP, LOG):
        return
    parts = [event.task, event.run_id[-SHORT_ID:]]
    if event.attempt > 1 or event.event != COMPLETED:
        parts.append(f"attempt {event.attempt}")
    if event.error is not None:
        parts.append(f"{event.error.type}: {event.error.message}"[:MAX_ERROR])
    if event.waits is not None:
        parts.append(f"waits for {', '.join(event.waits)}"[:MAX_ERROR])
    if event.delay_ms is not None:
        what = "sleeps" if event.event == SLEEPING else "again in"
        parts.append(f"{what} {readable(event.delay_ms / 1000)}")
    if event.event == FAILED:
        parts.append(f"dead-lettered ({event.reason})")
    if event.event == EXPIRED:
        parts.append("expired before it was started")
    if event.event == CANCELLED:
        parts.append(f"cancelled: {event.reason}" if event.reason else "cancelled")
    say(MARKS.get(event.event, "·"), "  ".join(parts))


def say(mark: str, text: str) -> None:
    """Print one line with the time."""
    console.out.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {mark} {console.printable(text)}")
