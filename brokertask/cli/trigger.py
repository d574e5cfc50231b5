"""`brokertask trigger`: ask for a run from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer

from brokertask import events
from brokertask.app import App
from brokertask.cli import console
from brokertask.cli.broker import AnyApp, app_or_stand_in, exported, known_task, read_json
from brokertask.cli.console import Exit, printable
from brokertask.cli.worker import parse_duration
from brokertask.durations import readable
from brokertask.errors import BrokertaskError, PublishError, RunError, RunExpired, RunFailed
from brokertask.events import Event
from brokertask.request import TriggerOptions
from brokertask.run import Run

TaskId = Annotated[str, typer.Argument(metavar="TASK", help="The task's id.")]
Payload = Annotated[
    str | None, typer.Argument(metavar="[PAYLOAD]", help="JSON; - reads standard input.")
]
PayloadFile = Annotated[Path | None, typer.Option(metavar="FILE", help="The payload's JSON.")]
Delay = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Start no sooner than that, as in 10m.")
]
Expires = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Start no later than that, or not at all.")
]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="Repeatable.")]
RunId = Annotated[str | None, typer.Option(metavar="ID", help="To repeat a trigger: the run's id.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait for the run's end; print its result as JSON.")
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Print a line for each event until the run ends.")
]
Timeout = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Wait no longer than that; exit code 8.")
]


def trigger(
    task: TaskId,
    payload: Payload = None,
    file: PayloadFile = None,
    spec: AnyApp = None,
    delay: Delay = None,
    expires: Expires = None,
    tags: Tags = None,
    run_id: RunId = None,
    wait: Wait = False,
    follow: Follow = False,
    timeout: Timeout = None,
    as_json: console.Json = False,
) -> None:
    """Ask for a run, and print its id.

    With --app the payload is checked by the task's type before it leaves. With --wait, standard
    output is the result alone. Exit code 1: the run failed.
    """
    app = app_or_stand_in(spec)
    if spec is None:
        # What has no tasks has nothing to declare; a task nobody declared is then unroutable.
        app = App(app.name, settings=app.settings.model_copy(update={"declare": False}))
    try:
        options = _options(delay, expires, tags, run_id)
        limit = None if timeout is None else parse_duration(timeout)
        value = read_json(payload, file)
    except BrokertaskError as error:
        console.fail(error)
    asked = _Asked(app, task, value, options, typed=spec is not None)
    with exported(app):
        work = partial(_trigger, asked, wait=wait, follow=follow, as_json=as_json, limit=limit)
        raise typer.Exit(console.run(work))


def _options(
    delay: str | None, expires: str | None, tags: list[str] | None, run_id: str | None
) -> TriggerOptions:
    options: TriggerOptions = {"tags": tags or []}
    if delay is not None:
        options["delay"] = parse_duration(delay)
    if expires is not None:
        options["expires"] = parse_duration(expires)
    if run_id is not None:
        options["run_id"] = run_id
    return options


@dataclass(frozen=True, slots=True)
class _Asked:
    """The run asked for."""

    app: App
    task: str
    payload: object
    options: TriggerOptions
    typed: bool
    """The task's own type is known, and checks the payload."""

    async def send(self) -> Run[Any]:
        """Trigger it, and say how to repeat that if nobody knows whether it was taken."""
        try:
            if self.typed:
                return await known_task(self.app, self.task).trigger(self.payload, **self.options)
            return await self.app.client.trigger(self.task, self.payload, **self.options)
        except PublishError as error:
            if error.unknown and error.run_id is not None:
                again = printable(error.run_id)
                console.err.print(f"to repeat it without doing it twice, add --run-id {again}")
            raise

    def dump(self, result: object) -> object:
        """Return its result as plain values."""
        if not self.typed:
            return result
        return self.app.tasks[self.task].result_type.dump_python(result, warnings=False)


class _Printer:
    """What is printed of a run: the result alone on stdout if waited for; else id and events."""

    def __init__(self, run: Run[Any], *, wait: bool, as_json: bool) -> None:
        self._run = run
        self._wait = wait
        self._as_json = as_json
        self._ended = False

    def triggered(self, *, last: bool) -> None:
        """Print the run's id."""
        if not self._as_json:
            self._line(printable(self._run.run_id))
        elif last:
            self._object("triggered")

    def hear(self, event: Event) -> None:
        """Print an event."""
        error = event.error
        said = f"  {printable(f'{error.type}: {error.message}')}" if error else ""
        match event.event:
            case events.RETRYING:
                delay = readable((event.delay_ms or 0) / 1000)
                self._line(f"[red]✗[/] attempt {event.attempt} failed{said}; retry in {delay}")
                return
            case events.COMPLETED:
                self._line(f"[green]✔[/] completed in attempt {event.attempt}")
            case events.FAILED:
                reason = printable(event.reason or "")
                self._line(f"[red]✗[/] attempt {event.attempt} failed{said}; dead ({reason})")
            case events.SLEEPING:
                self._line(f"sleeps for {readable((event.delay_ms or 0) / 1000)}")
                return
            case events.WARNING:
                self._line(printable(event.warning or ""))
                return
            case events.PROGRESS:
                self._progress(event)
                return
            case _:
                self._line("[red]✗[/] expired before it was started")
        self._ended = True

    def _progress(self, event: Event) -> None:
        total = "" if event.total is None else f" of {event.total:g}"
        if event.done is not None:
            self._line(f"{event.done:g}{total} done")

    def completed(self, result: object) -> None:
        """Print the result, if it was waited for."""
        if self._as_json:
            self._object("completed", result=result)
        elif self._wait:
            console.show_json(result)
        elif not self._ended:
            self._line("[green]✔[/] completed")

    def failed(self, error: RunError) -> None:
        """Print how it failed, unless its event told that already."""
        if self._as_json:
            about = {"reason": error.reason, "error": error.error} if _dead(error) else {}
            self._object("failed" if _dead(error) else "expired", **about)
        elif not self._ended:
            console.show_error(error)

    def _line(self, markup: str) -> None:
        (console.err if self._wait or self._as_json else console.out).print(markup)

    def _object(self, status: str, **fields: object) -> None:
        run = self._run
        console.show_json({"run_id": run.run_id, "task": run.task, "status": status, **fields})


def _dead(error: RunError) -> TypeGuard[RunFailed]:
    return isinstance(error, RunFailed)


async def _trigger(
    asked: _Asked, *, wait: bool, follow: bool, as_json: bool, limit: float | None
) -> Exit:
    async with asked.app:
        run = await asked.send()
        printer = _Printer(run, wait=wait, as_json=as_json)
        printer.triggered(last=not (wait or follow))
        if not (wait or follow):
            return Exit.OK
        if follow:
            run.watch(printer.hear)
        try:
            printer.completed(asked.dump(await run.result(timeout=limit)))
        except (RunFailed, RunExpired) as error:
            printer.failed(error)
            return Exit.FAILED
        return Exit.OK
