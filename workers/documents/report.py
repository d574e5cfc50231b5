"""What the demonstration shows at its end: a table, what it cost, and what the documents say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from workers.documents.accesslog import Access
from workers.documents.crash import Crash
from workers.documents.watching import Seen, Watch

COLUMNS: Final = ("DOCUMENT", "STATUS", "ATTEMPTS", "FETCHES", "SECTIONS", "TIME", "NOTE")
LONGEST_NAME: Final = 22
STYLES: Final = {"dead": "red", "completed": "green"}
console: Final = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Report:
    """What was heard of the runs, what the services they use were asked for, and the crash."""

    watch: Watch
    accesses: Sequence[Access]
    crash: Crash | None

    def show(self) -> None:
        """Print a line for each document, and the totals."""
        fetches = self._runs_told("fetched")
        show_table([self._row(run_id, fetches[run_id]) for run_id in self.watch.documents])
        console.print()
        show_total("process_document", self.watch.documents.values())
        show_total("process_section", self.watch.sections.values())
        asked, busy, down = (sum(self._runs_told(f).values()) for f in ("asked", "busy", "down"))
        console.print(
            f"{'summaries':17} {asked:4} asked {busy:4} busy (step retried)"
            f" {down:4} down (run retried)"
        )
        console.print()
        once = sum(fetches[run_id] == 1 for run_id in self.watch.documents)
        console.print(
            f"fetched   once each: {once} of {len(self.watch.documents)}{self._resumed()}"
        )

    def write(self, path: Path) -> None:
        """Write what the documents say into one file."""
        lines = ["# Documents", ""]
        for run in self.watch.documents.values():
            if not run.result:
                continue
            sections = [self.watch.sections[section] for section in run.result["sections"]]
            words = Counter(
                word for section in sections for word in section.result.get("keywords", ())
            )
            about = ", ".join(word for word, _ in words.most_common(6))
            lines += [f"## {run.name}", "", run.result["summary"] or "(too short)", ""]
            lines += [f"{run.result['words']} words, about: {about or '-'}", ""]
        path.write_text("\n".join(lines), encoding="utf-8")

    def _row(self, run_id: str, fetches: int) -> tuple[str, ...]:
        run = self.watch.documents[run_id]
        killed = self.crash is not None and run_id in self.crash.runs
        notes = ["killed half-way"] if killed else []
        if run.error:
            notes.append(f"{run.reason}: {run.error}" if run.reason else run.error)
        return (
            run.name if len(run.name) <= LONGEST_NAME else f"{run.name[: LONGEST_NAME - 1]}…",
            "dead" if run.status == "failed" else run.status,
            str(run.attempts),
            str(fetches),
            str(len(run.result.get("sections", ()))),
            f"{run.seconds:.2f} s",
            "; ".join(notes),
        )

    def _runs_told(self, fact: str) -> Counter[str]:
        """Return how often the log tells something of each document's run."""
        ours = self.watch.documents
        return Counter(
            access.run_id
            for access in self.accesses
            if access.fact == fact and access.run_id in ours
        )

    def _resumed(self) -> str:
        if self.crash is None:
            return "; no worker could be caught half-way"
        last = {access.run_id: access.pid for access in self.accesses}
        resumed = sum(last[run_id] != self.crash.pid for run_id in self.crash.runs)
        return f"; one worker killed half-way, {resumed} run(s) resumed"


def show_total(task: str, seen: Iterable[Seen]) -> None:
    """Print how many runs of a task there were, and how they ended."""
    runs = list(seen)
    attempts = sum(run.attempts for run in runs)
    dead = sum(run.status == "failed" for run in runs)
    console.print(f"{task:17} {len(runs):4} runs {attempts:5} attempts {dead:2} dead")


def show_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print a line for each document; the note comes last, and a terminal may cut it."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        style = "bold" if line is COLUMNS else STYLES.get(line[1])
        text = "  ".join([*cells, line[-1]])
        console.print(text, markup=False, style=style, no_wrap=True, overflow="ellipsis")
