"""Events: facts about runs, published to `<namespace>.events` with the key `<event>.<task>`.

| event       | when                                | fields beside the common ones    |
| ----------- | ----------------------------------- | -------------------------------- |
| `completed` | the task returned                   | `result`, or `claim`             |
| `retrying`  | an attempt failed, another follows  | `error`, `delay_ms`              |
| `failed`    | the run went to the dead letters    | `error`, `reason`                |
| `expired`   | the run came too late to start      |                                  |
| `cancelled` | the run was cancelled               | `reason`                         |
| `sleeping`  | the task sleeps, its slot is free   | `delay_ms`                       |
| `waiting`   | the task waits, its slot is free    | `waits`                          |
| `progress`  | the task tells how far it is        | `done`, `total`                  |
| `warning`   | the run's memory is nearly full     | `warning`                        |
| `started`   | an attempt begins                   | `asked`                          |
| `step`      | a step has finished                 | `step`, `number`, `result`       |
| `log`       | the run has written to its log      | `lines`                          |

The last three are told only while a server keeps history, and may be lost.

Common fields: `event`, `run_id`, `task`, `attempt`, `at_ms`, `worker`; `metadata` and `redrives`,
if the run has any. The body is a msgpack map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Final

from brokertask.claim import Claim
from brokertask.envelope import Envelope, Message
from brokertask.errors import EnvelopeError
from brokertask.memory import Memory, Metadata
from brokertask.outcome import (
    AttemptError,
    Cancelled,
    Expired,
    Failed,
    Outcome,
    Retrying,
    Sleeping,
    Succeeded,
    Waiting,
)
from brokertask.values import MSGPACK, decode, pack

COMPLETED: Final = "completed"
RETRYING: Final = "retrying"
FAILED: Final = "failed"
EXPIRED: Final = "expired"
CANCELLED: Final = "cancelled"
SLEEPING: Final = "sleeping"
WAITING: Final = "waiting"
PROGRESS: Final = "progress"
WARNING: Final = "warning"
STARTED: Final = "started"
STEP: Final = "step"
LOG: Final = "log"
MAX_TOLD_PAYLOAD: Final = 65_536
MAX_TOLD_RESULT: Final = 16_384
"""Bytes; what is larger is not told on the way: a payload is in its trigger, too."""
ENDS: Final = frozenset({COMPLETED, FAILED, EXPIRED, CANCELLED})
"""After these nothing comes, unless the run is redriven."""
_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "event": str,
    "run_id": str,
    "task": str,
    "attempt": int,
    "at_ms": int,
    "worker": str,
    "result": bytes,
    "reason": str,
    "delay_ms": int,
    "warning": str,
    "waits": list,
    "done": (int, float),
    "total": (int, float),
    "metadata": dict,
    "redrives": int,
    "seq": int,
    "asked": dict,
    "step": str,
    "number": int,
    "lines": list,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event, in both directions."""

    event: str
    run_id: str
    task: str
    attempt: int
    at_ms: int
    worker: str
    result: bytes | None = None
    """The task's result in msgpack, of `completed`."""
    claim: Claim | None = None
    """Stands for a result that is in the payload store."""
    error: AttemptError | None = None
    reason: str | None = None
    delay_ms: int | None = None
    warning: str | None = None
    waits: Sequence[str] | None = None
    """What a waiting run waits for: `call:charge`, `token:approval`."""
    done: float | None = None
    total: float | None = None
    redrives: int | None = None
    """How often the run was put back to work, if it was: of two ends the later one counts."""
    seq: int | None = None
    """Which message of the run it tells of, if not of the first: of two events the later counts."""
    asked: Mapping[str, Any] | None = None
    """The message that an attempt begins with, but for its memory; see `asked_for`."""
    step: str | None = None
    number: int | None = None
    """Which of the run's steps it is, in the order in which they have finished, from 1 on."""
    lines: Sequence[Sequence[Any]] | None = None
    """Each the instant in ms, the level and the text."""
    metadata: Metadata | None = None
    """What the run noted about itself: `ctx.metadata`."""

    def message(self) -> Message:
        """Return it as the message to publish."""
        values = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        if self.error is not None:
            values["error"] = asdict(self.error)
        if self.claim is not None:
            values["claim"] = asdict(self.claim)
        return Message(
            body=pack(values),
            correlation_id=self.run_id,
            type=self.event,
            content_type=MSGPACK,
            timestamp_ms=self.at_ms,
        )

    @staticmethod
    def read(message: Message) -> Event:
        """Return the event in `message`; fields that a newer version added are ignored.

        Raises:
            EnvelopeError: There is none in it.
        """
        raw = decode(message.body, message.content_type or MSGPACK)
        try:
            values: dict[str, Any] = {name: raw[name] for name in _TYPES if name in raw}
            for name, value in values.items():
                if not isinstance(value, _TYPES[name]):
                    raise TypeError(f"{name} is a {type(value).__name__}")
            error, claim = raw.get("error"), raw.get("claim")
            return Event(
                **values,
                error=None if error is None else AttemptError.read(error),
                claim=None if claim is None else Claim.read(claim),
            )
        except (TypeError, AttributeError) as problem:
            raise EnvelopeError(f"not an event: {problem}", reason="undecodable") from None


_FIELDS: Final = tuple(one.name for one in fields(Event))


def event_of(outcome: Outcome, envelope: Envelope, *, at_ms: int, worker: str) -> Event | None:
    """Return the event that tells of `outcome`, or None where nothing happened to the run."""
    event = partial(_event, envelope, at_ms, worker)
    match outcome:
        case Succeeded(result=result, claim=claim):
            return event(COMPLETED, result=None if claim else result, claim=claim)
        case Retrying(delay=delay, error=error):
            return event(RETRYING, error=error, delay_ms=round(delay * 1000))
        case Failed(reason=reason, error=error):
            return event(FAILED, error=error, reason=reason)
        case Expired():
            return event(EXPIRED)
        case Cancelled(reason=reason):
            return event(CANCELLED, reason=reason or None)
        case Sleeping(delay=delay):
            return event(SLEEPING, delay_ms=round(delay * 1000))
        case Waiting(on=on):
            return event(WAITING, waits=list(on))
        case _:
            return None


def progress_event(
    envelope: Envelope, done: float | None, total: float | None, *, at_ms: int, worker: str
) -> Event:
    """Return the event that tells how far a run is."""
    return _event(envelope, at_ms, worker, PROGRESS, done=done, total=total)


def warning_event(envelope: Envelope, message: str, *, at_ms: int, worker: str) -> Event:
    """Return the event that warns of what will end the run if it goes on."""
    return _event(envelope, at_ms, worker, WARNING, warning=message)


def started_event(envelope: Envelope, *, at_ms: int, worker: str) -> Event:
    """Return the event that tells that an attempt begins, and with what."""
    message = replace(envelope, memory=Memory(), reply_to=None).message()
    asked: dict[str, Any] = {
        "headers": dict(message.headers),
        "content_type": message.content_type,
        "app_id": message.app_id,
    }
    if len(message.body) <= MAX_TOLD_PAYLOAD:
        asked["body"] = message.body
    return _event(envelope, at_ms, worker, STARTED, asked=asked)


def asked_for(event: Event) -> Envelope | None:
    """Return what the run of a `started` event was asked for; None if that is not told.

    Without the payload, if that was too large.

    Raises:
        EnvelopeError: It is no run.
    """
    if event.asked is None:
        return None
    body, headers = event.asked.get("body", b""), event.asked.get("headers")
    content_type, app_id = event.asked.get("content_type"), event.asked.get("app_id")
    if not (isinstance(body, bytes) and isinstance(headers, dict)):
        raise EnvelopeError("not a run that was asked for", reason="undecodable")
    message = Message(
        body=body,
        message_id=event.run_id,
        content_type=content_type if isinstance(content_type, str) else None,
        app_id=app_id if isinstance(app_id, str) else None,
        headers=headers,
    )
    return Envelope.read(message, task=event.task, max_bytes=MAX_TOLD_PAYLOAD)


def step_event(envelope: Envelope, number: int, *, at_ms: int, worker: str) -> Event:
    """Return the event that tells of a finished step, the `number`th in the run's memory."""
    step = envelope.memory.steps[number - 1]
    result = step.result if isinstance(step.result, bytes) else None
    if result is not None and len(result) > MAX_TOLD_RESULT:
        result = None
    claim = step.result if isinstance(step.result, Claim) else None
    told = {"step": step.key, "number": number, "result": result, "claim": claim}
    return _event(envelope, at_ms, worker, STEP, **told)


def log_event(
    run_id: str,
    task: str,
    *,
    attempt: int,
    worker: str,
    lines: Sequence[tuple[int, str, str]],
) -> Event:
    """Return the event that tells what a run has written to its log, at the instant of the last."""
    return Event(
        event=LOG,
        run_id=run_id,
        task=task,
        attempt=attempt,
        at_ms=lines[-1][0],
        worker=worker,
        lines=[list(line) for line in lines],
    )


def _event(envelope: Envelope, at_ms: int, worker: str, name: str, **values: Any) -> Event:
    return Event(
        event=name,
        run_id=envelope.run_id,
        task=envelope.task,
        attempt=envelope.attempt,
        at_ms=at_ms,
        worker=worker,
        redrives=envelope.redrives or None,
        seq=envelope.seq or None,
        metadata=envelope.memory.metadata or None,
        **values,
    )
