"""The main job, for a person to watch: documents in, a progress bar, a table and a report out.

The runs are executed by worker processes, on RabbitMQ or on an embedded broker alike; this process
triggers and listens, and kills one of them when half of the documents are fetched.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from brokertask import BrokertaskError, Event
from workers.documents.accesslog import read
from workers.documents.crash import Crash, crash
from workers.documents.processes import (
    ACCESS_LOG,
    EMBEDDED,
    HERE,
    WORK,
    Unfinished,
    alone,
    beside,
    worker_processes,
)
from workers.documents.report import Report, console
from workers.documents.tasks import Document, app, process_document
from workers.documents.watching import Watch

SUFFIXES: Final = ("", ".md", ".txt", ".rst")
MOST_DOCUMENTS: Final = 60
LARGEST: Final = 400_000
"""Bytes of a text that a run can remember with its sections, within BROKERTASK_MAX_MEMORY_BYTES."""
PATIENCE: Final = 120.0
DEFAULT_BIND: Final = "127.0.0.1:8070"


def main() -> None:
    """Run the demonstration from the command line."""
    # As Ctrl-C does, it has to stop the workers, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(demo)


def demo(
    input: Annotated[Path | None, typer.Option(help="A folder of text; default: docs/.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    keep: Annotated[
        bool, typer.Option("--console", help="Have a console, and keep it open until Ctrl-C.")
    ] = False,
) -> None:
    """Process a folder of documents, kill a worker, and show what happened to each document."""
    texts = find((input or HERE / "docs").resolve())
    try:
        with alone():
            asyncio.run(process([*texts, unreadable()], processes, keep=keep))
    except KeyboardInterrupt:
        raise typer.Exit(0 if keep else 130) from None
    except (BrokertaskError, Unfinished) as error:
        console.print(f"[red]error[/]: {escape(str(error))}")
        raise typer.Exit(4 if isinstance(error, BrokertaskError) else 1) from None


def find(folder: Path) -> list[Path]:
    """Return the text files below a folder, at most 60, in a stable order."""
    if not folder.is_dir():
        console.print(f"[red]error[/]: there is no folder {escape(str(folder))}")
        raise typer.Exit(2)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # A version, as in MPL-2.0, is no suffix.
    texts = [path for path in files if path.suffix in SUFFIXES or path.suffix[1:].isdigit()]
    texts = [path for path in texts if path.stat().st_size <= LARGEST]
    if not texts:
        console.print(f"[red]error[/]: no text (.md, .txt, .rst) below {escape(str(folder))}")
        raise typer.Exit(2)
    if left := len(files) - len(texts[:MOST_DOCUMENTS]):
        console.print(f"left out  {left} files: no .md, .txt or .rst, too large, or too many")
    return texts[:MOST_DOCUMENTS]


def unreadable() -> Path:
    """Return a document that nobody can process: it ends in the dead-letter queue."""
    path = WORK / "broken-scan.txt"
    path.write_bytes(b"A scan that went wrong: \xff\xfe\x00\x9c\x81")
    return path.resolve()


async def process(documents: list[Path], processes: int, *, keep: bool) -> None:
    """Start workers, process the documents, and show what happened to them.

    With `keep` there is a console, and the workers go on until they are interrupted.
    """
    began = time.monotonic()
    url = app.settings.broker_url()
    command = "dev" if url == EMBEDDED else "worker"
    console.print(f"workers   {processes} processes of `brokertask {command}`, one to be killed")
    async with worker_processes(processes, url, server=keep) as running:
        report = await beside(running, work(documents), patience=PATIENCE)
        report.write(WORK / "report.md")
        report.show()
        seconds = time.monotonic() - began
        console.print(f"report    {WORK / 'report.md'}   ({seconds:.1f} s in all)")
        if keep:
            bind = os.environ.get("BROKERTASK_SERVER_BIND", DEFAULT_BIND)
            console.print(f"console   http://{bind}/   until Ctrl-C")
            await beside(running, asyncio.Event().wait(), patience=None)
    show_next()


async def work(documents: list[Path]) -> Report:
    """Trigger a run for each document, and follow them to the last section."""
    async with app, app.client.events() as events:
        runs = await process_document.trigger_many([Document(path=path) for path in documents])
        watch = Watch({run.run_id: path.name for run, path in zip(runs, documents, strict=True)})
        with progress_bar() as bar:
            crashing = asyncio.create_task(make_crash(watch, bar))
            try:
                await follow(watch, events, bar)
            finally:
                crashing.cancel()
            with suppress(asyncio.CancelledError):
                await crashing
    crashed = None if crashing.cancelled() else crashing.result()
    return Report(watch, read(ACCESS_LOG), crashed)


async def make_crash(watch: Watch, bar: Progress) -> Crash:
    """Kill a worker process half-way, and say so above the bar."""
    made = await crash(ACCESS_LOG, watch)
    what = f"worker process {made.pid} (SIGKILL), half-way through {len(made.runs)} document(s)"
    bar.console.print(f"[red]killed[/]    {what}")
    return made


async def follow(watch: Watch, events: AsyncIterator[Event], bar: Progress) -> None:
    """Listen until all that is watched has ended."""
    done = bar.add_task("documents and sections", total=len(watch.runs))
    async for event in events:
        watch.hear(event)
        bar.update(done, total=len(watch.runs), completed=watch.done)
        if watch.done == len(watch.runs):
            return


def progress_bar() -> Progress:
    """Return the bar; on something that is no terminal only its last state is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def show_next() -> None:
    """Print what to try next."""
    console.print("try next  make demo INPUT=/usr/share/common-licenses")
    console.print("          make demo CONSOLE=1    and see every run in the browser")
    url = app.settings.broker_url()
    if url == EMBEDDED:
        console.print("          make demo BROKER=rabbitmq    the same on a real broker")
        return
    # The private node's URL is nowhere in the environment, and its password is no secret.
    if url.startswith("amqp://guest:guest@127.0.0.1:"):
        console.print(f"          export BROKERTASK_AMQP_URL={url}", soft_wrap=True)
    console.print("          .venv/bin/brokertask dead list --app workers.documents:app")
