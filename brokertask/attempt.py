"""One execution of a run in this worker, and what it has come to so far."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from brokertask.context import Context
from brokertask.durations import readable
from brokertask.envelope import Envelope
from brokertask.errors import EnvelopeError, Reason
from brokertask.lease import Lease
from brokertask.outcome import Failed, Outcome, Retrying
from brokertask.task import Task
from brokertask.telemetry import AttemptSpan

log = logging.getLogger("brokertask.worker")

CANCEL_GRACE: Final = 5.0
"""How long a cancelled task may clean up before it is left behind."""
CALLED_OFF_GRACE: Final = 10.0
"""The same for a run that was cancelled: nobody waits for anything but its cleaning up."""
INTERRUPT_GRACE: Final = 3.0
"""The same at the end of a drain; shorter than a worker's time for handing back."""
Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Returned:
    """The task's code returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """The task's code raised; with a `reason`, nothing is to be decided any more."""

    error: BaseException
    reason: Reason | None = None


@dataclass(slots=True, eq=False)
class Attempt:
    """One execution of a run, and what it has come to so far."""

    task: Task[Any, Any]
    lease: Lease
    lost: int = 0
    """How many of the attempts right before it were deliveries that ended unsettled."""
    unread: EnvelopeError | None = None
    """Why the message is no run at all."""
    user: asyncio.Task[Returned | Raised] | None = None
    left: asyncio.Future[None] | None = None
    """Done when an interrupted attempt is not waited for any longer."""
    context: Context | None = None
    span: AttemptSpan | None = None
    interrupted: bool = False
    due_ms: int | None = None
    """When the run goes on; set once it sleeps."""
    waits: tuple[str, ...] = ()
    """What the run waits for; set once it does."""
    superseded: bool = False
    """A later message of the run is elsewhere, so this one comes to nothing."""
    changes: int = 0
    saved: int = 0
    """How often its memory has changed, and how much of that is on the broker's disk."""
    ended_ms: int | None = None
    """When it came to its end."""
    followed: bool = False
    """What follows it is on the broker's disk."""
    told: bool = False
    """Its event was published, or given up."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is settled, or left to who gets its message."""

    @property
    def envelope(self) -> Envelope:
        """The message that stands for the run."""
        return self.lease.envelope

    @property
    def now(self) -> Envelope:
        """The message as it would be written now: with what the run remembers, in its trace."""
        envelope, span, context = self.lease.envelope, self.span, self.context
        # What follows is numbered beyond all that was published, even if nobody confirmed it.
        envelope = replace(envelope, seq=max(envelope.seq, self.lease.seq))
        if context is not None:
            envelope = replace(envelope, memory=context.steps.memory)
        if span is not None:
            envelope = replace(
                envelope, previous=span.traceparent, trace=span.trace, origin=span.origin
            )
        return envelope

    @property
    def key(self) -> Key:
        """What every message of the run has in common."""
        return self.task.id, self.envelope.run_id

    def log(self, outcome: Outcome) -> None:
        """Say what went wrong, by class: what an error says may hold anything."""
        run_id, task = self.key[1], self.task.id
        match outcome:
            case Retrying(delay=delay, error=error):
                log.warning(
                    "attempt %d of %s failed: %s; again in %s; run %s",
                    *(error.attempt, task, error.type, readable(delay), run_id),
                )
            case Failed(reason=reason, error=error):
                log.error(
                    "a run of %s is dead (%s): %s; see: brokertask dead show %s --task %s",
                    *(task, reason, error.type, run_id, task),
                )
            case _:
                log.debug("run %s of %s: %s", run_id, task, type(outcome).__name__.lower())

    def crashes(self) -> Exception:
        """Return what stands for the errors of attempts that were lost."""
        return ConnectionAbortedError(
            f"{self.envelope.attempt - 1} attempt(s) and no end: the last worker died, was killed, "
            "ran out of memory, or lost the broker"
        )

    def interrupt(self, cause: str = "drain", *, grace: float = INTERRUPT_GRACE) -> None:
        """Cancel it because the worker goes away, or its message or its run did; uncounted."""
        self.interrupted = True
        self.cancel(cause, grace=grace)

    def sleep(self, due_ms: int) -> None:
        """Cancel it because it sleeps until then."""
        self.due_ms = due_ms
        self.cancel("sleep")

    def wait(self, on: tuple[str, ...], due_ms: int | None) -> None:
        """Cancel it because it waits for what a server hears of, or until then."""
        self.waits, self.due_ms = on, due_ms
        self.cancel("wait")

    def supersede(self) -> None:
        """Cancel it because another message of the run has taken its place."""
        self.superseded = True
        self.cancel("lost")

    def cancel(self, cause: str, *, grace: float = CANCEL_GRACE) -> None:
        """Cancel the task's code and tell it why; after `grace` seconds it is left behind."""
        if self.context is not None:
            self.context.cancelled = cause
            self.context.steps.close()
        if self.user is not None:
            self.user.cancel(cause)
        if self.left is not None:
            self.left.get_loop().call_later(grace, _resolve, self.left)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
