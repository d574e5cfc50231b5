"""A dead run as a message: what it was, why it is dead, and how it becomes a run again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from brokertask.envelope import MSGPACK, Envelope, Memory, Message, clip, derived_id
from brokertask.errors import EnvelopeError
from brokertask.outcome import AttemptError, Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A run in a dead-letter queue, buried by a worker or by the broker itself."""

    run_id: str
    task: str
    reason: str
    """Why: see `errors.REASONS`; the broker's own are `delivery_limit` and `rejected`."""
    died_ms: int | None
    attempts: int
    errors: tuple[AttemptError, ...]
    payload: bytes
    content_type: str
    tags: tuple[str, ...] = ()
    redrives: int = 0
    """How often it was put back to work before it died again."""
    traceparent: str | None = None
    envelope: Envelope | None = None
    """How to run it again; None when it was never understood."""

    @property
    def error(self) -> AttemptError | None:
        """What its last attempt ended with."""
        return self.errors[-1] if self.errors else None

    @staticmethod
    def read(message: Message, *, task: str) -> DeadLetter:
        """Return the dead run in a message of the dead-letter queue of `task`.

        Never fails: whatever is there, an operator must be able to see and discard it.
        """
        death = _first_death(message)
        try:
            envelope = Envelope.read(message, task=task, max_bytes=len(message.body))
        except EnvelopeError as error:
            return DeadLetter(
                run_id=message.message_id or derived_id(message, task),
                task=task,
                reason=error.reason,
                died_ms=None,
                attempts=0,
                errors=(AttemptError(0, "EnvelopeError", str(error), 0, ""),),
                payload=message.body,
                content_type=message.content_type or MSGPACK,
            )
        reason, died = message.headers.get("bt-reason"), message.headers.get("bt-died")
        raw = bool(message.headers.get("bt-raw"))
        return DeadLetter(
            run_id=envelope.run_id,
            task=task,
            reason=reason if isinstance(reason, str) else str(death.get("reason", "unknown")),
            died_ms=died if isinstance(died, int) else _death_time(death),
            attempts=0 if raw else envelope.attempt,
            errors=envelope.memory.errors,
            payload=envelope.payload,
            content_type=envelope.content_type,
            tags=envelope.tags,
            redrives=envelope.redrives,
            traceparent=envelope.trace.get("traceparent"),
            envelope=envelope,
        )


def bury(envelope: Envelope, failed: Failed, *, now_ms: int) -> Message:
    """Return the message for the dead-letter exchange: the run, its reason, every error."""
    dead = replace(
        envelope,
        seq=envelope.seq + 1,
        memory=envelope.memory.with_error(failed.error),
        sent_ms=now_ms,
        due_ms=None,
        left_ms=0,
    ).message()
    return replace(dead, headers={**dead.headers, "bt-reason": failed.reason, "bt-died": now_ms})


def bury_raw(message: Message, failed: Failed, *, task: str, now_ms: int) -> Message:
    """Return the message for what could not be read as a run: its body verbatim, and why.

    Of its headers nothing is kept: they are somebody else's, of any size and meaning.
    """
    memory = Memory((failed.error,)).pack()
    return Message(
        body=message.body + memory,
        message_id=clip(message.message_id, 128)
        if message.message_id
        else derived_id(message, task),
        type=task,
        content_type=message.content_type,
        app_id=message.app_id,
        timestamp_ms=message.timestamp_ms,
        headers={
            "bt-version": 1,
            "bt-raw": True,
            "bt-memory": len(message.body),
            "bt-reason": failed.reason,
            "bt-died": now_ms,
        },
    )


def _first_death(message: Message) -> Mapping[str, Any]:
    deaths = message.headers.get("x-death")
    if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict):
        return deaths[0]
    return {}


def _death_time(death: Mapping[str, Any]) -> int | None:
    at = death.get("time")
    return round(at.timestamp() * 1000) if isinstance(at, datetime) else None
