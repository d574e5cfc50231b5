"""Events: facts about runs, published to `<namespace>.events` with the key `<event>.<task>`.

| event       | when                                | fields beside the common ones    |
| ----------- | ----------------------------------- | -------------------------------- |
| `completed` | the task returned                   | `result`, or `claim`             |
| `retrying`  | an attempt failed, another follows  | `error`, `delay_ms`              |
| `failed`    | the run went to the dead letters    | `error`, `reason`                |
| `expired`   | the run came too late to start      |                                  |
| `sleeping`  | the task sleeps, its slot is free   | `delay_ms`                       |
| `progress`  | the task tells how far it is        | `done`, `total`                  |
| `warning`   | the run's memory is nearly full     | `warning`                        |

Common fields: `event`, `run_id`, `task`, `attempt`, `at_ms`, `worker`; `metadata`, if the run has
any. The body is a msgpack map.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final

from brokertask.claim import Claim
from brokertask.envelope import Envelope, Message
from brokertask.errors import EnvelopeError
from brokertask.memory import Metadata
from brokertask.outcome import (
    AttemptError,
    Expired,
    Failed,
    Outcome,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.values import MSGPACK, decode, pack

COMPLETED: Final = "completed"
RETRYING: Final = "retrying"
FAILED: Final = "failed"
EXPIRED: Final = "expired"
SLEEPING: Final = "sleeping"
PROGRESS: Final = "progress"
WARNING: Final = "warning"
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
    "done": (int, float),
    "total": (int, float),
    "metadata": dict,
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
    done: float | None = None
    total: float | None = None
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
        case Sleeping(delay=delay):
            return event(SLEEPING, delay_ms=round(delay * 1000))
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


def _event(envelope: Envelope, at_ms: int, worker: str, name: str, **values: Any) -> Event:
    return Event(
        event=name,
        run_id=envelope.run_id,
        task=envelope.task,
        attempt=envelope.attempt,
        at_ms=at_ms,
        worker=worker,
        metadata=envelope.memory.metadata or None,
        **values,
    )
