"""The timeline of a run: what it did and what it waited for, as spans. Pure.

Workers tell when an attempt begins and when it ends, and when a step has finished: a step is drawn
from the end of the one before it. What was told is perhaps not all, so each end has a fallback.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from brokertask.events import ENDS
from brokertask.server.api.beginnings import BeginningView
from brokertask.server.api.runs import AttemptView, RunView
from brokertask.server.api.waits import WaitView

Kind: TypeAlias = Literal["queued", "attempt", "step", "wait", "pause"]
Key: TypeAlias = tuple[int, int]
"""Redrives and attempt: which attempt it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a run's time. An end that is None has not come."""

    kind: Kind
    label: str
    since_ms: int
    until_ms: int | None
    status: str
    note: str = ""

    @property
    def depth(self) -> int:
        """0 for what follows one another, 1 for what is within an attempt."""
        return int(self.kind in ("step", "wait"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that is known of a run's time. Steps have `name`, `attempt`, `redrives`, `ended_ms`."""

    run: RunView
    attempts: Sequence[AttemptView] = ()
    beginnings: Sequence[BeginningView] = ()
    steps: Sequence[Mapping[str, Any]] = ()
    waits: Sequence[WaitView] = ()
    began: dict[Key, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        began: dict[Key, list[int]] = defaultdict(list)
        for each in self.beginnings:
            began[each.redrives, each.attempt].append(each.began_ms)
        object.__setattr__(self, "began", dict(began))


def spans(told: Told) -> list[Span]:
    """Return what is known of a run's time, in its order."""
    attempts = list(_attempts(told))
    found = [*_pauses(told, attempts), *attempts, *_steps(told), *_waits(told)]
    return sorted(found, key=lambda span: (span.since_ms, span.depth))


def _attempts(told: Told) -> Iterator[Span]:
    """Yield each attempt; one that nobody has ended, ends where the next one begins."""
    run = told.run
    ended = {(each.redrives, each.attempt): each for each in told.attempts}
    keys = sorted({*ended, *told.began})
    for key, following in pairwise([*keys, None]):
        assert key is not None
        end = ended.get(key)
        since = min(told.began.get(key, [_before(told, key)]))
        label = f"attempt {key[1]}" + (f", redrive {key[0]}" if key[0] else "")
        if end is not None:
            note = f"{end.error_type}: {end.error_message}" if end.error_type else ""
            until: int | None = max(since, end.ended_ms)
            status = end.outcome
        elif following is not None:
            until, status, note = told.began.get(following, [since])[0], "retrying", "it was lost"
        else:
            until, status, note = run.ended_ms, run.status, ""
        yield Span(
            kind="attempt", label=label, since_ms=since, until_ms=until, status=status, note=note
        )


def _before(told: Told, key: Key) -> int:
    """Return when an attempt could begin at the earliest, as nobody has told when it did."""
    earlier = [
        each.ended_ms + (each.delay_ms or 0)
        for each in told.attempts
        if (each.redrives, each.attempt) < key
    ]
    own = [each.ended_ms for each in told.attempts if (each.redrives, each.attempt) == key]
    return min([max(earlier, default=told.run.triggered_ms), *own])


def _pauses(told: Told, attempts: Sequence[Span]) -> Iterator[Span]:
    """Yield what is between attempts, before the first one and behind the last."""
    run = told.run
    last_ms, waits_for = run.triggered_ms, ""
    for each in attempts:
        if each.since_ms > last_ms:
            yield _pause(waits_for, last_ms, each.since_ms)
        last_ms = each.since_ms if each.until_ms is None else each.until_ms
        waits_for = each.status
    if run.status in ("queued", "delayed", "retrying") and run.status not in ENDS:
        yield _pause(run.status, last_ms, None, due_ms=run.due_ms)


def _pause(status: str, since_ms: int, until_ms: int | None, *, due_ms: int | None = None) -> Span:
    if status == "retrying":
        label = "wait for the retry"
    else:
        label, status = ("delayed", status) if status == "delayed" else ("queued", "queued")
    return Span(
        kind="queued" if status == "queued" else "pause",
        label=label,
        since_ms=since_ms,
        until_ms=until_ms if due_ms is None else max(since_ms, due_ms),
        status=status,
    )


def _steps(told: Told) -> Iterator[Span]:
    done_ms: dict[Key, int] = {}
    for each in told.steps:
        key = (each["redrives"], each["attempt"])
        ended_ms = each["ended_ms"]
        begun = [at_ms for at_ms in told.began.get(key, ()) if at_ms <= ended_ms]
        since = max([*begun, done_ms.get(key, 0)])
        done_ms[key] = max(ended_ms, done_ms.get(key, 0))
        yield Span(
            kind="step",
            label=each["name"],
            since_ms=since if 0 < since <= ended_ms else ended_ms,
            until_ms=ended_ms,
            status="completed",
        )


def _waits(told: Told) -> Iterator[Span]:
    for each in told.waits:
        yield Span(
            kind="wait",
            label=", ".join(each.what),
            since_ms=each.since_ms,
            until_ms=each.over_ms
            if told.run.ended_ms is None
            else (each.over_ms or told.run.ended_ms),
            status="waiting",
            note="" if each.state == "waiting" else each.state.replace("_", " "),
        )
