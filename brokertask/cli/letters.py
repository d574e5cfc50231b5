"""Dead runs as rows, as JSON and in full; all of their text is somebody else's data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from brokertask.claims import Claims
from brokertask.cli.console import plain, printable
from brokertask.deadletter import DeadLetter
from brokertask.durations import readable
from brokertask.errors import ConfigurationError, EnvelopeError, PayloadUnavailable
from brokertask.outcome import AttemptError
from brokertask.telemetry import fingerprint
from brokertask.values import MSGPACK, clip, decode

COLUMNS: Final = ("RUN", "TASK", "REASON", "ATTEMPTS", "ERROR", "AGE", "REDRIVES")
GROUP_COLUMNS: Final = ("RUNS", "TASK", "REASON", "ERROR", "OLDEST", "NEWEST", "GROUP")
MAX_ERROR: Final = 80
SHOWN_BYTES: Final = 64
_UNIT: Final = re.compile(r"\d+[dhms]")


@dataclass(frozen=True, slots=True)
class Group:
    """Dead runs of one task that died of the same."""

    task: str
    reason: str
    fingerprint: str
    letters: tuple[DeadLetter, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload as JSON can tell it, or why it cannot be read."""

    raw: bytes
    """Empty where it could not be fetched."""
    value: object = None
    problem: str | None = None


def grouped(letters: Iterable[DeadLetter]) -> list[Group]:
    """Return groups by task, reason and fingerprint of the error, the largest first."""
    found: dict[tuple[str, str, str], list[DeadLetter]] = {}
    for letter in letters:
        key = (letter.task, letter.reason, _fingerprint(letter))
        found.setdefault(key, []).append(letter)
    groups = [Group(*key, tuple(members)) for key, members in found.items()]
    return sorted(groups, key=lambda group: -len(group.letters))


def row(letter: DeadLetter, now_ms: int) -> tuple[str, ...]:
    """Return what a table shows of it."""
    return (
        letter.run_id,
        letter.task,
        letter.reason,
        str(letter.attempts),
        _said(letter.error),
        age(letter.died_ms, now_ms),
        str(letter.redrives),
    )


def group_row(group: Group, now_ms: int) -> tuple[str, ...]:
    """Return what a table shows of a group."""
    first, last = _span(group)
    return (
        str(len(group.letters)),
        group.task,
        group.reason,
        _said(group.letters[0].error),
        age(first, now_ms),
        age(last, now_ms),
        group.fingerprint,
    )


def group_json(group: Group) -> dict[str, object]:
    """Return a group's stable fields."""
    first, last = _span(group)
    return {
        "task": group.task,
        "reason": group.reason,
        "fingerprint": group.fingerprint,
        "runs": len(group.letters),
        "error": _error_json(group.letters[0].error),
        "oldest": instant(first),
        "newest": instant(last),
    }


def as_json(letter: DeadLetter, now_ms: int) -> dict[str, object]:
    """Return the stable fields of a dead run: no payload, no traceback."""
    return {
        "run_id": letter.run_id,
        "task": letter.task,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "error": _error_json(letter.error),
        "fingerprint": _fingerprint(letter),
        "died_at": instant(letter.died_ms),
        "age_seconds": None if letter.died_ms is None else (now_ms - letter.died_ms) / 1000,
        "tags": list(letter.tags),
        "redrives": letter.redrives,
        "trace_id": letter.trace_id,
    }


def in_full(
    letter: DeadLetter, now_ms: int, claims: Claims, *, payload: Payload | None
) -> dict[str, object]:
    """Return all there is to know of it; its payload only if given: it may be secret."""
    envelope, claim = letter.envelope, letter.claim
    fields = as_json(letter, now_ms) | {
        "meaning": letter.meaning,
        "triggered_at": instant(envelope.triggered_ms if envelope else None),
        "app_id": envelope.app_id if envelope else None,
        "parent": envelope.parent if envelope else None,
        "errors": [
            {
                "attempt": error.attempt,
                "type": error.type,
                "message": error.message,
                "at": instant(error.at_ms or None),
                "worker": error.worker,
                "traceback": error.traceback,
            }
            for error in letter.errors
        ],
        "payload_bytes": claim.size if claim else len(letter.payload),
        "content_type": letter.content_type,
    }
    if claim is not None:
        where = claims.where(claim)
        fields["claim"] = {"sha256": claim.sha256, "size": claim.size, "where": where}
    if payload is not None:
        fields["payload"], fields["payload_problem"] = payload.value, payload.problem
    return fields


def lines(letter: DeadLetter, now_ms: int, claims: Claims) -> Iterator[str]:
    """Yield what a person reads of it, without its payload, as markup."""
    envelope, claim = letter.envelope, letter.claim
    yield f"[bold]{printable(letter.task)}[/]  {printable(letter.run_id)}"
    yield f"  [red]{printable(letter.reason)}[/]: {letter.meaning}"
    died = f"died {age(letter.died_ms, now_ms)} ago ({instant(letter.died_ms)})"
    if letter.died_ms is None:
        died = "died at an unknown time"
    yield f"  {died}, after {counted(letter.attempts, 'attempt')}, {_redriven(letter.redrives)}"
    if envelope is not None and envelope.triggered_ms is not None:
        by = f" by {printable(envelope.app_id)}" if envelope.app_id else ""
        yield f"  triggered {instant(envelope.triggered_ms)}{by}"
    if letter.tags:
        yield f"  tags {printable(', '.join(letter.tags))}"
    if letter.trace_id:
        yield f"  trace {printable(letter.trace_id)}"
    if claim is not None:
        where = claims.where(claim) or "a payload store that is not configured here"
        yield f"  claim for {claim.size} bytes, sha256 {claim.sha256}"
        yield f"      in {printable(where)}"
    if envelope is not None and (steps := envelope.memory.steps):
        done = ", ".join(step.key for step in steps)
        yield f"  finished steps, kept by a redrive: {printable(done)}"
    for error in letter.errors:
        yield from _error_lines(error)


def _error_lines(error: AttemptError) -> Iterator[str]:
    where = f"  {instant(error.at_ms or None) or ''}  {printable(error.worker)}".rstrip()
    number = f"attempt {error.attempt}" if error.attempt else "not a run"
    yield f"  [red]✗[/] {number}{where}"
    yield f"      {printable(error.type)}: {printable(error.message)}"
    for line in error.traceback.splitlines():
        yield f"      [dim]{printable(line)}[/]"


def size(letter: DeadLetter) -> str:
    """Return how large its payload is, and of which kind, as markup."""
    if letter.claim is not None:
        return f"{letter.claim.size} bytes in the payload store"
    return f"{len(letter.payload)} bytes of {printable(letter.content_type)}"


def payload_lines(payload: Payload) -> Iterator[str]:
    """Yield the payload as markup: as JSON, or why it is none and how it begins."""
    if payload.problem is None:
        yield from (printable(line) for line in json.dumps(payload.value, indent=2).splitlines())
    elif payload.raw:
        start = payload.raw[:SHOWN_BYTES].hex(" ")
        yield f"{printable(payload.problem)}; {len(payload.raw)} bytes, beginning with {start}"
    else:
        yield printable(payload.problem)


async def payload_of(letter: DeadLetter, claims: Claims) -> Payload:
    """Return the payload of a dead run, fetched if it is in the payload store."""
    raw, kind = letter.payload, letter.content_type
    try:
        if letter.claim is not None:
            raw, kind = await claims.get(letter.claim), MSGPACK
        return Payload(raw, plain(decode(raw, kind)))
    except EnvelopeError as error:
        return Payload(raw, problem=str(error))
    except (PayloadUnavailable, ConfigurationError) as error:
        return Payload(b"", problem=str(error))


def age(since_ms: int | None, now_ms: int) -> str:
    """Return how long ago that was, in its two largest units."""
    if since_ms is None:
        return "?"
    whole = max(0, now_ms - since_ms) // 1000
    return "".join(_UNIT.findall(readable(whole))[:2]) if whole >= 60 else f"{whole}s"


def instant(at_ms: int | None) -> str | None:
    """Return an instant in ISO 8601, in UTC."""
    if at_ms is None:
        return None
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _span(group: Group) -> tuple[int | None, int | None]:
    died = [letter.died_ms for letter in group.letters if letter.died_ms is not None]
    return min(died, default=None), max(died, default=None)


def _fingerprint(letter: DeadLetter) -> str:
    return fingerprint(letter.error) if letter.error else ""


def _said(error: AttemptError | None) -> str:
    if error is None:
        return ""
    first, _, more = error.message.partition("\n")
    return clip(f"{error.type}: {first}{' …' if more else ''}", MAX_ERROR)


def _error_json(error: AttemptError | None) -> dict[str, str] | None:
    return {"type": error.type, "message": error.message} if error else None


def counted(count: int, noun: str) -> str:
    """Return "1 run" or "2 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _redriven(count: int) -> str:
    return f"redriven {counted(count, 'time')}" if count else "never redriven"
