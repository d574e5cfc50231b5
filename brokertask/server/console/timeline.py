"""The timeline of a run: what it did and what it waited for, as spans. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from brokertask.events import ENDS
from brokertask.server.api.runs import AttemptView, RunView
from brokertask.server.api.waits import WaitView

Kind: TypeAlias = Literal["attempt", "step", "wait", "pause"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a run's time. An end that is None has not come."""

    kind: Kind
    label: str
    since_ms: int
    until_ms: int | None
    status: str
    note: str = ""
    depth: int = 0


def spans(run: RunView, attempts: Sequence[AttemptView], waits: Sequence[WaitView]) -> list[Span]:
    """Return what is known of a run's time, in its order."""
    found = [*_attempts(run, attempts), *_waits(waits)]
    return sorted(found, key=lambda span: (span.since_ms, span.depth))


def _attempts(run: RunView, attempts: Sequence[AttemptView]) -> Iterator[Span]:
    free_ms = run.triggered_ms
    for each in attempts:
        yield Span(
            kind="attempt",
            label=f"attempt {each.attempt}",
            since_ms=min(free_ms, each.ended_ms),
            until_ms=each.ended_ms,
            status=each.outcome,
            note=f"{each.error_type}: {each.error_message}" if each.error_type else "",
        )
        free_ms = each.ended_ms
        if each.delay_ms:
            free_ms += each.delay_ms
            yield Span(
                kind="pause",
                label="wait retry",
                since_ms=each.ended_ms,
                until_ms=free_ms,
                status="retrying",
            )
    if run.status not in ENDS and run.status != "retrying":
        yield Span(
            kind="attempt" if run.status == "running" else "pause",
            label=f"attempt {run.attempt}" if run.status == "running" else run.status,
            since_ms=min(free_ms, run.at_ms) if run.status != "running" else run.at_ms,
            until_ms=run.due_ms,
            status=run.status,
        )


def _waits(waits: Sequence[WaitView]) -> Iterator[Span]:
    for each in waits:
        yield Span(
            kind="wait",
            label=", ".join(each.what),
            since_ms=each.since_ms,
            until_ms=each.over_ms,
            status="waiting" if each.over_ms is None else "completed",
            note=each.state,
            depth=1,
        )
