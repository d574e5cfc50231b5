"""A dead run as a message: what it was, why it is dead, and how it becomes a run again. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, TypeGuard

from brokertask.claim import Claim
from brokertask.durations import Duration, seconds
from brokertask.envelope import MAX_ID, VERSION, Envelope, Message, run_id_of
from brokertask.errors import REASONS, EnvelopeError, InvalidOption
from brokertask.memory import Memory
from brokertask.outcome import AttemptError, Failed
from brokertask.values import LAST_INSTANT_MS, MSGPACK, clip

BROKER_REASONS: Final = {
    "delivery_limit": "the broker delivered it in vain as often as x-delivery-limit allows",
    "rejected": "a consumer that is not brokertask's rejected it",
    "expired": "it waited longer than a message TTL allows",
    "maxlen": "its queue was at a length limit",
}
"""Why a broker buries by itself; `errors.REASONS` are brokertask's own."""
_MEANINGS: Final[dict[str, str]] = {str(word): text for word, text in REASONS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A run in a dead-letter queue, buried by a worker or by the broker itself."""

    run_id: str
    task: str
    reason: str
    """Why: of `errors.REASONS` or `BROKER_REASONS`, or what a newer version wrote."""
    died_ms: int | None
    attempts: int
    """How many were begun; 0 if it was never understood."""
    errors: tuple[AttemptError, ...]
    payload: bytes
    content_type: str
    tags: tuple[str, ...] = ()
    redrives: int = 0
    """How often it was put back to work before it died again."""
    traceparent: str | None = None
    envelope: Envelope | None = None
    """How to run it again; None when not even its headers make sense."""

    @property
    def error(self) -> AttemptError | None:
        """What its last attempt ended with."""
        return self.errors[-1] if self.errors else None

    @property
    def trace_id(self) -> str | None:
        """The trace of its attempts in hex, if it had one."""
        parts = (self.traceparent or "").split("-")
        return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else None

    @property
    def claim(self) -> Claim | None:
        """The claim that its payload is; None for one that is in the message, or no claim."""
        with suppress(EnvelopeError):
            return None if self.envelope is None else self.envelope.claim()
        return None

    @property
    def seq(self) -> int:
        """The place of its message in the run."""
        return 0 if self.envelope is None else self.envelope.seq

    @property
    def run(self) -> tuple[str, str] | None:
        """What the dead letters of one run have in common; None where two may only look alike."""
        if self.envelope is None or self.envelope.id_derived:
            return None
        return self.task, self.run_id

    @property
    def meaning(self) -> str:
        """The reason in words."""
        meaning = _MEANINGS.get(self.reason) or BROKER_REASONS.get(self.reason)
        return meaning or "a reason this version does not know"

    @staticmethod
    def read(message: Message, *, task: str) -> DeadLetter:
        """Return the dead run in a message of the dead-letter queue of `task`.

        Never fails: whatever is there, an operator must be able to see and discard it.
        """
        death = last_death(message)
        reason = (message.headers.get("bt-reason"), death.get("reason"))
        died_ms = _first_instant(message.headers.get("bt-died"), death.get("time"))
        try:
            size = len(message.body)
            envelope = Envelope.read(message, task=task, max_bytes=size, max_memory_bytes=size)
        except EnvelopeError as error:
            return DeadLetter(
                run_id=run_id_of(message, task),
                task=task,
                reason=_reason(*reason, error.reason),
                died_ms=died_ms,
                attempts=0,
                errors=(AttemptError(0, "EnvelopeError", str(error), 0, ""),),
                payload=message.body,
                content_type=message.content_type or MSGPACK,
            )
        return DeadLetter(
            run_id=envelope.run_id,
            task=task,
            reason=_reason(*reason),
            died_ms=died_ms,
            attempts=_attempts(envelope, message),
            errors=envelope.memory.errors,
            payload=envelope.payload,
            content_type=envelope.content_type,
            tags=envelope.tags,
            redrives=envelope.redrives,
            traceparent=envelope.trace.get("traceparent"),
            envelope=envelope,
        )

    def redriven(
        self,
        *,
        trace: Mapping[str, str],
        now_ms: int,
        payload: bytes | None = None,
        forget: bool = False,
    ) -> Envelope:
        """Return the run's new start: first attempt, behind its finished steps.

        `payload`, in msgpack, takes the place of its own; then, or to `forget`, without them.

        Raises:
            EnvelopeError: The payload cannot be decoded, so a worker could only bury it again. What
                a claim stands for is not looked at.
        """
        before = self.envelope or Envelope(
            run_id=self.run_id,
            task=self.task,
            payload=self.payload,
            content_type=self.content_type,
            # Its id may have been derived, and then its doubles share it.
            id_derived=True,
        )
        if payload is not None:
            before = replace(before, payload=payload, content_type=MSGPACK)
        if before.claim() is None:
            before.value()
        return before.redriven(trace=trace, now_ms=now_ms, forget=forget or payload is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which dead runs: those that meet everything that is given."""

    run_ids: Collection[str] = ()
    reasons: tuple[str, ...] = ()
    error: str | None = None
    """Part of the last error's "type: message", in any case of letters."""
    tags: tuple[str, ...] = ()
    """Each of these."""
    older_than: Duration | None = None
    newer_than: Duration | None = None
    """How long ago it died. One whose death has no date is neither older nor newer."""
    limit: int | None = None
    """At most so many in all, from the fronts of the queues."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidOption(f"a limit is 1 or more, not {self.limit}")
        for age in (self.older_than, self.newer_than):
            if age is not None:
                seconds(age)

    @property
    def takes_all(self) -> bool:
        """Whether nothing but a limit is given."""
        return replace(self, limit=None) == Filter()

    def takes(self, letter: DeadLetter, now_ms: int) -> bool:
        """Whether `letter` meets everything but the limit."""
        last = letter.error
        text = f"{last.type}: {last.message}" if last else ""
        return (
            (not self.run_ids or letter.run_id in self.run_ids)
            and (not self.reasons or letter.reason in self.reasons)
            and (self.error is None or self.error.casefold() in text.casefold())
            and all(tag in letter.tags for tag in self.tags)
            and self._of_age(letter.died_ms, now_ms)
        )

    def _of_age(self, died_ms: int | None, now_ms: int) -> bool:
        if self.older_than is None and self.newer_than is None:
            return True
        if died_ms is None:
            return False
        age = (now_ms - died_ms) / 1000
        return (self.older_than is None or age > seconds(self.older_than)) and (
            self.newer_than is None or age < seconds(self.newer_than)
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
        message_id=run_id_of(message, task),
        type=task,
        content_type=message.content_type,
        app_id=message.app_id,
        timestamp_ms=message.timestamp_ms,
        headers={
            "bt-version": VERSION,
            "bt-raw": True,
            "bt-memory": len(message.body),
            "bt-reason": failed.reason,
            "bt-died": now_ms,
            # Without it two equal messages, redriven together, would pass for one run.
            **({} if message.message_id else {"bt-derived": True}),
        },
    )


def death_ms(message: Message) -> int | None:
    """Return when the broker moved this message last, by the broker's clock, to the second."""
    return _first_instant(last_death(message).get("time"))


def last_death(message: Message) -> Mapping[str, Any]:
    """Return the latest entry in `x-death`, what the broker tells of its own moves; or nothing."""
    deaths = message.headers.get("x-death")
    if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict):
        return deaths[0]
    return {}


def _attempts(envelope: Envelope, message: Message) -> int:
    if message.headers.get("bt-raw"):
        return 0
    # A run whose workers were lost too often is buried in place of its next attempt.
    crashed = message.headers.get("bt-reason") == "crashed"
    return envelope.attempt - 1 if crashed else envelope.attempt


def _reason(*values: object) -> str:
    return next(
        (clip(value, MAX_ID) for value in values if value and isinstance(value, str)), "unknown"
    )


def _first_instant(*values: object) -> int | None:
    for value in values:
        # The broker's own are datetimes; the embedded broker's, like ours, are numbers.
        at = round(value.timestamp() * 1000) if _aware(value) else value
        if isinstance(at, int) and 0 <= at <= LAST_INSTANT_MS:
            return at
    return None


def _aware(value: object) -> TypeGuard[datetime]:
    return isinstance(value, datetime) and value.tzinfo is not None
