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

from brokertask import BrokertaskError, Event, Run
from workers.documents.tasks import Document, app, process_document, process_section

HERE: Final = Path(__file__).resolve().parents[2]
WORK: Final = Path(".brokertask/demo")
SUFFIXES: Final = ("", ".md", ".txt", ".rst")
MOST_DOCUMENTS: Final = 60
LONGEST_NAME: Final = 24
PATIENCE: Final = 120.0
COLUMNS: Final = ("DOCUMENT", "STATUS", "ATTEMPTS", "SECTIONS", "TIME", "LAST ERROR")
STYLES: Final = {"dead": "red", "completed": "green"}
ENDED: Final = ("completed", "failed", "expired")
console: Final = Console(highlight=False)


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
    if not folder.is_dir():
        console.print(f"[red]error[/]: there is no folder {escape(str(folder))}")
        raise typer.Exit(2)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # A version, as in MPL-2.0, is no suffix.
    texts = [path for path in files if path.suffix in SUFFIXES or path.suffix[1:].isdigit()]
    if not texts:
        console.print(f"[red]error[/]: no text (.md, .txt, .rst) below {escape(str(folder))}")
        raise typer.Exit(2)
    if left := len(files) - len(texts[:MOST_DOCUMENTS]):
        console.print(f"left out  {left} files: not .md, .txt or .rst, or more than the demo shows")
    return texts[:MOST_DOCUMENTS]


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
    others: dict[str, Seen] = {}
    async for event in events:
        # Runs of others may be on the broker too, and a section may end before its document.
        record = seen.get(event.run_id) or others.setdefault(event.run_id, Seen(event.task, now))
        record.attempts = event.attempt
        if event.error is not None:
            record.error = f"{event.error.type.rpartition('.')[2]}: {event.error.message}"[:70]
        if event.event in ENDED:
            record.status = event.event
            record.seconds = time.monotonic() - now
            record.result = msgpack.unpackb(event.result) if event.result else {}
            for section in record.result.get("sections", ()):
                seen[section] = others.get(section) or Seen("process_section", now)
                others[section] = seen[section]
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
        *("--processes", str(count), "--log-level", "critical"),
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
    show_documents([run for run in seen.values() if run.task == process_document.id])
    console.print()
    for task in (process_document.id, process_section.id):
        runs = [run for run in seen.values() if run.task == task]
        attempts = sum(run.attempts for run in runs)
        dead = sum(run.status == "failed" for run in runs)
        middle = median(run.seconds for run in runs) if runs else 0
        console.print(
            f"{task:17} {len(runs):4} runs {attempts:4} attempts {dead:2} dead"
            f"   median {middle:.2f} s"
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


def show_documents(runs: list[Seen]) -> None:
    """Print a line for each document; the error comes last, and a terminal may cut it."""
    rows = [
        (
            run.name if len(run.name) <= LONGEST_NAME else f"{run.name[: LONGEST_NAME - 1]}…",
            "dead" if run.status == "failed" else run.status,
            str(run.attempts),
            str(len(run.result.get("sections", ()))),
            f"{run.seconds:.2f} s",
            f"(retried) {run.error}" if run.error and run.status == "completed" else run.error,
        )
        for run in runs
    ]
    lines = [COLUMNS, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        style = "bold" if line is COLUMNS else STYLES.get(line[1])
        text = "  ".join([*cells, line[-1]])
        console.print(text, markup=False, style=style, no_wrap=True, overflow="ellipsis")
