"""One execution of a run in this worker, and what it has come to so far."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from brokertask.context import Context
from brokertask.durations import readable
from brokertask.envelope import Envelope
from brokertask.errors import BrokertaskError, EnvelopeError, Reason
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
    """Done when its code has ended, or is not waited for any longer."""
    context: Context | None = None
    """What the code knows of its run, unless nobody asks for it."""
    span: AttemptSpan | None = None
    cause: str | None = None
    """Why its code was cancelled; see `Context.cancelled`."""
    interrupted: bool = False
    due_ms: int | None = None
    """When the run goes on; set once it sleeps."""
    waits: tuple[str, ...] = ()
    """What the run waits for; set once it does."""
    early: bool = False
    """Its message goes on to its next hop, as it is: the same that comes again is no double."""
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
    key: Key = field(init=False)
    """What every message of the run has in common."""

    def __post_init__(self) -> None:
        self.key = (self.task.id, self.lease.envelope.run_id)

    @property
    def envelope(self) -> Envelope:
        """The message that stands for the run."""
        return self.lease.envelope

    @property
    def now(self) -> Envelope:
        """The message as it would be written now: with what the run remembers, in its trace."""
        envelope, span = self.remembering, self.span
        # What follows is numbered beyond all that was published, even if nobody confirmed it.
        seq = max(envelope.seq, self.lease.seq)
        if span is None:
            return replace(envelope, seq=seq)
        return replace(
            envelope, seq=seq, previous=span.traceparent, trace=span.trace, origin=span.origin
        )

    @property
    def defect(self) -> BrokertaskError | None:
        """Why it cannot go on, whatever its code makes of it."""
        return None if self.context is None else self.context.steps.defect

    @property
    def remembering(self) -> Envelope:
        """The message, with what the run remembers now."""
        envelope, context = self.lease.envelope, self.context
        if context is None or context.steps.memory is envelope.memory:
            return envelope
        return replace(envelope, memory=context.steps.memory)

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
            case _ if log.isEnabledFor(logging.DEBUG):
                log.debug("run %s of %s: %s", run_id, task, type(outcome).__name__.lower())
            case _:
                pass

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
        self.cause = cause
        if self.context is not None:
            self.context.cancelled = cause
            self.context.steps.close()
        if self.user is not None:
            self.user.cancel(cause)
        if self.left is not None:
            self.left.get_loop().call_later(grace, self.leave)

    def expire(self) -> None:
        """Cancel it because its time is over, unless its code has just ended."""
        if self.left is not None and not self.left.done():
            self.cancel("timeout")

    def leave(self) -> None:
        """Wait for its code no longer."""
        if self.left is not None and not self.left.done():
            self.left.set_result(None)

    def release(self) -> None:
        """Let go of what its code may still hold on to, and what holds on to this attempt.

        What refers to itself is left to the garbage collector, which would take half as much time
        again as a run that does nothing.
        """
        self.user = self.context = self.left = None
