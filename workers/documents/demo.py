"""The main job, for a person to watch: documents in, a progress bar, a table and a report out.

On the embedded broker everything happens in this process; on RabbitMQ the runs are executed by
worker processes of their own, and this process only triggers and listens.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import msgpack
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from brokertask import BrokertaskError, Event, Run
from workers.documents.tasks import Document, app, process_document, process_section

HERE: Final = Path(__file__).resolve().parents[2]
WORK: Final = Path(".brokertask/demo")
SUFFIXES: Final = ("", ".md", ".txt", ".rst")
MOST_DOCUMENTS: Final = 60
PATIENCE: Final = 120.0
COLUMNS: Final = ("DOCUMENT", "STATUS", "ATTEMPTS", "SECTIONS", "TIME", "LAST ERROR")
STYLES: Final = {"dead": "red", "completed": "green"}
ENDED: Final = ("completed", "failed", "expired")
console: Final = Console(highlight=False, soft_wrap=True)


@dataclass(slots=True)
class Seen:
    """What was heard of one run."""

    task: str
    started: float
    name: str = ""
    status: str = "running"
    attempts: int = 1
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def main() -> None:
    """Run the demonstration from the command line."""
    typer.run(demo)


def demo(
    input: Annotated[Path | None, typer.Option(help="A folder of text; default: docs/.")] = None,
    processes: Annotated[int, typer.Option(help="Worker processes, on RabbitMQ.")] = 2,
) -> None:
    """Process a folder of documents and show what happened to each."""
    documents = [*find(input or HERE / "docs"), unreadable()]
    began = time.monotonic()
    embedded = app.settings.broker_url().startswith("memory:")
    try:
        seen = asyncio.run(process(documents, 0 if embedded else processes))
    except BrokertaskError as error:
        console.print(f"[red]error[/]: {escape(str(error))}")
        raise typer.Exit(4) from None
    show(seen, write_report(seen), time.monotonic() - began, embedded=embedded)


def find(folder: Path) -> list[Path]:
    """Return the text files below a folder, at most 60, in a stable order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    texts = [path for path in files if path.suffix in SUFFIXES][:MOST_DOCUMENTS]
    if not texts:
        console.print(f"[red]error[/]: no text (.md, .txt, .rst) below {escape(str(folder))}")
        raise typer.Exit(2)
    return texts


def unreadable() -> Path:
    """Return a document that nobody can process: it ends in the dead-letter queue."""
    path = WORK / "broken-scan.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"A scan that went wrong: \xff\xfe\x00\x9c\x81")
    return path.resolve()


async def process(documents: list[Path], processes: int) -> Mapping[str, Seen]:
    """Trigger a run for each document and listen until the last section is done."""
    workers: AbstractAsyncContextManager[Any]
    workers = worker_processes(processes) if processes else app.worker()
    async with app, app.client.events() as events, workers:
        runs = await process_document.trigger_many([Document(path=path) for path in documents])
        with progress_bar() as bar:
            async with asyncio.timeout(PATIENCE):
                return await follow(runs, documents, events, bar)


async def follow(
    runs: list[Run[Any]], documents: list[Path], events: AsyncIterator[Event], bar: Progress
) -> dict[str, Seen]:
    """Return what was heard of each run once all of them have ended."""
    now = time.monotonic()
    seen = {
        run.run_id: Seen("process_document", now, path.name)
        for run, path in zip(runs, documents, strict=True)
    }
    done = bar.add_task("documents and sections", total=len(seen))
    async for event in events:
        record = seen.setdefault(event.run_id, Seen(event.task, now))
        record.attempts = event.attempt
        if event.error is not None:
            record.error = f"{event.error.type.rpartition('.')[2]}: {event.error.message}"[:70]
        if event.event in ENDED:
            record.status = event.event
            record.seconds = time.monotonic() - now
            record.result = msgpack.unpackb(event.result) if event.result else {}
            for section in record.result.get("sections", ()):
                seen.setdefault(section, Seen("process_section", now))
            bar.update(done, total=len(seen))
            bar.update(done, completed=sum(run.status in ENDED for run in seen.values()))
            if all(run.status in ENDED for run in seen.values()):
                break
    return seen


@asynccontextmanager
async def worker_processes(count: int) -> AsyncIterator[None]:
    """Run `brokertask worker` beside this process, until the block is left."""
    console.print(f"worker    {count} processes: brokertask worker workers.documents:app")
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "brokertask.cli", "worker", "workers.documents:app"),
        *("--processes", str(count), "--log-level", "error"),
        cwd=HERE,
        env=os.environ,
        start_new_session=True,
    )
    try:
        yield
    finally:
        if worker.returncode is None:
            worker.terminate()
        await worker.wait()


def progress_bar() -> Progress:
    """Return the bar; on something that is no terminal only its last state is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def write_report(seen: Mapping[str, Seen]) -> Path:
    """Write what the documents say into one file and return its path."""
    lines = ["# Documents", ""]
    sections = {
        run_id: run.result for run_id, run in seen.items() if run.task == process_section.id
    }
    for run in seen.values():
        if run.task != process_document.id or not run.result:
            continue
        words = Counter(
            word
            for section in run.result["sections"]
            for word in sections.get(section, {}).get("keywords", ())
        )
        about = ", ".join(word for word, _ in words.most_common(6))
        lines += [f"## {run.name}", "", run.result["summary"] or "(too short)", ""]
        lines += [f"{run.result['words']} words, about: {about or '-'}", ""]
    path = WORK / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def show(seen: Mapping[str, Seen], report: Path, seconds: float, *, embedded: bool) -> None:
    """Print the runs, the totals, and what to try next."""
    rows = [
        (
            escape(run.name),
            "dead" if run.status == "failed" else run.status,
            str(run.attempts),
            str(len(run.result.get("sections", ()))),
            f"{run.seconds:.2f} s",
            escape(run.error),
        )
        for run in seen.values()
        if run.task == process_document.id
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(COLUMNS):
        # The last column gives way on a narrow terminal, the others never do.
        width = max(len(column), *(len(row[index]) for row in rows))
        table.add_column(column, no_wrap=True, min_width=width if column != COLUMNS[-1] else 10)
    for row in rows:
        table.add_row(*row, style=STYLES.get(row[1]))
    console.print(table)
    console.print()
    for task in (process_document.id, process_section.id):
        runs = [run for run in seen.values() if run.task == task]
        attempts = sum(run.attempts for run in runs)
        dead = sum(run.status == "failed" for run in runs)
        middle = median(run.seconds for run in runs) if runs else 0
        console.print(
            f"{task:17} {len(runs):4} runs {attempts:4} attempts {dead:2} dead"
            f"   median {middle:.2f} s after the trigger"
        )
    console.print(f"\nreport    {report}   ({seconds:.1f} s in all)")
    console.print("try next  make demo INPUT=/usr/share/common-licenses")
    if embedded:
        console.print("          make demo BROKER=rabbitmq    the same on a real broker")
    else:
        # The private node's URL is nowhere in the environment, and its password is no secret.
        url = app.settings.broker_url()
        if url.startswith("amqp://guest:guest@127.0.0.1:"):
            console.print(f"          export BROKERTASK_AMQP_URL={url}")
        console.print("          .venv/bin/brokertask dead list --app workers.documents:app")
