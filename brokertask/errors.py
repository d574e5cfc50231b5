"""Every error brokertask raises. A class stands for what the caller can do about it.

    BrokertaskError
      ConfigurationError          yours to mend; raised at declaration, start, or by a step
        DuplicateTask  InvalidOption  UnsupportedType  TopologyMismatch  StepMismatch
      PublishError                the trigger failed; `unknown` says whether it may have landed
        BrokerUnavailable         no connection; nothing was sent
        AccessDenied              the broker refused this user
        Unroutable                no queue takes it: the task is not declared on this broker
          NoServer                it needs a server, and none was ever started here
        IdempotencyConflict       its key stands for a run with another payload
        QueueFull                 the queue or the broker refused it for now
        BrokerBlocked             a memory or disk alarm stops publishing
        PublishUnknown            sent, no answer in time: repeat with the same run id
        BatchError                some of `trigger_many`; `results` tells of each
      PayloadError                a payload or result that cannot cross the wire
        InvalidPayload  PayloadTooLarge  MemoryFull  PayloadUnavailable
      EnvelopeError               bytes from the broker that are no run; buried with `reason`
      RunError                    what `Run.result()` raises; carries run id and task
        RunFailed  RunExpired  RunCancelled  ResultTimeout  ResultUnavailable  ChildFailed
      StoreUnavailable            a server's database is gone, or too slow
      StoreOutdated               a server's database is of another version
      Abort, RetryAfter           raised by task authors to steer the retry

Messages say what happened, where, and how to mend it. They never hold payloads or passwords.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

Reason: TypeAlias = Literal[
    "max_attempts",
    "aborted",
    "never_retried",
    "crashed",
    "undecodable",
    "invalid",
    "too_large",
    "too_deep",
    "unsupported_version",
    "bad_result",
    "step_mismatch",
    "memory_full",
]
"""Why a run is in the dead-letter queue. The broker adds its own, such as `delivery_limit`."""

LONGEST_RETRY_AFTER: Final = 31_536_000
"""A year, in seconds: more is a mistake, such as an instant in place of a delay."""

REASONS: Final[dict[Reason, str]] = {
    "max_attempts": "every attempt failed",
    "aborted": "the task raised Abort",
    "never_retried": "the error is one that the task's Retry does not retry",
    "crashed": "its workers were lost as often as it may be attempted",
    "undecodable": "the message is not what its content type and headers say",
    "invalid": "the payload does not match the task's type",
    "too_large": "the body is over the size limit",
    "too_deep": "the body is nested too deeply",
    "unsupported_version": "it was written by a newer brokertask",
    "bad_result": "the task returned what cannot be sent",
    "step_mismatch": "the code asks for other steps than those the run has finished",
    "memory_full": "its finished steps are larger than max_memory_bytes",
}


class BrokertaskError(Exception):
    """The root: catch this to catch all of brokertask's errors."""


class ConfigurationError(BrokertaskError):
    """Something in the code or settings has to change before this can work."""


class DuplicateTask(ConfigurationError):
    """Two functions claim one task id; they would steal each other's messages."""


class InvalidOption(ConfigurationError):
    """An option is misspelt or its value is out of range."""


class UnsupportedType(ConfigurationError):
    """A payload, result or signature that cannot be carried in a message."""


class TopologyMismatch(ConfigurationError):
    """An object on the broker differs from what the code declares, in an immutable argument."""


class StepMismatch(ConfigurationError):
    """A run's finished steps do not fit the code that resumes it; the run is buried.

    Bring back the steps that it expects and redrive it, or redrive it without its steps.
    """


class PublishError(BrokertaskError):
    """The broker did not confirm a message.

    Attributes:
        run_id: The run the message was for, once one was chosen.
        unknown: False: refused, nothing will happen. True: it may still be taken; repeat with
            the same run id, so that a worker can recognise the double.
    """

    def __init__(self, message: str, *, run_id: str | None = None, unknown: bool = False) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.unknown = unknown


class BrokerUnavailable(PublishError):
    """There was no connection to the broker in the time given; nothing was sent."""


class AccessDenied(PublishError):
    """The broker refused the user, its password or its permissions."""


class Unroutable(PublishError):
    """No queue is bound for this task; nothing was stored."""


class NoServer(Unroutable):
    """This needs a `brokertask server`, and none has ever been started on this broker."""


class IdempotencyConflict(PublishError):
    """The idempotency key was used with another payload; nothing was triggered.

    Attributes:
        run_id: The run that the key stands for.
    """


class QueueFull(PublishError):
    """A queue at its length limit, or a broker short of resources, refused the message."""


class BrokerBlocked(PublishError):
    """A memory or disk alarm on the broker stops all publishing."""


class PublishUnknown(PublishError):
    """The message was sent and no answer came; it may have been stored."""

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        super().__init__(message, run_id=run_id, unknown=True)


class BatchError(PublishError):
    """Some runs of a `trigger_many` were not taken.

    Attributes:
        results: In the order of the payloads: the run, or the error that it came to.
    """

    def __init__(self, results: Sequence[object]) -> None:
        errors = [result for result in results if isinstance(result, PublishError)]
        super().__init__(
            f"{len(errors)} of {len(results)} runs were not taken; the first: {errors[0]}",
            unknown=any(error.unknown for error in errors),
        )
        self.results = tuple(results)


class PayloadError(BrokertaskError):
    """A value cannot be sent."""


class InvalidPayload(PayloadError):
    """A payload does not match its task's type, or cannot be written as msgpack."""


class PayloadTooLarge(PayloadError):
    """A payload is over the size limit."""


class PayloadUnavailable(PayloadError):
    """The payload store cannot be reached, or the content of a claim is gone or damaged."""


class MemoryFull(PayloadError):
    """A run's finished steps are together over the limit; the run is buried with those before."""


class StoreUnavailable(BrokertaskError):
    """A server's database cannot be reached, or takes too long; nothing was done, or all of it."""


class StoreOutdated(BrokertaskError):
    """A server's database is of another version than this one; nothing was done."""


class EnvelopeError(BrokertaskError):
    """A message that is no run.

    Attributes:
        reason: The reason it is buried with.
    """

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class RunError(BrokertaskError):
    """A run did not give a result."""

    def __init__(self, message: str, *, run_id: str, task: str) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.task = task


class RunFailed(RunError):
    """The run ended in the dead-letter queue.

    Attributes:
        reason: Why it was buried: `max_attempts`, `aborted`, `invalid`, `crashed`, …
        error: What its last attempt raised: `type` and `message`.
    """

    def __init__(
        self, message: str, *, run_id: str, task: str, reason: str, error: Mapping[str, str]
    ) -> None:
        super().__init__(message, run_id=run_id, task=task)
        self.reason = reason
        self.error = error


class RunExpired(RunError):
    """The run was not started before its `expires`."""


class RunCancelled(RunError):
    """The run was cancelled.

    Attributes:
        reason: What was given as the reason; may be empty.
    """

    def __init__(self, message: str, *, run_id: str, task: str, reason: str) -> None:
        super().__init__(message, run_id=run_id, task=task)
        self.reason = reason


class ResultTimeout(RunError, TimeoutError):
    """No result came in the time given; the run goes on."""


class ResultUnavailable(RunError):
    """This client cannot receive results; the message says why."""


class ChildFailed(RunError):
    """A run that a task waits for ended without a result. It is remembered: no retry helps.

    Redrive the child, and then the run that waits for it.

    Attributes:
        reason: As of `RunFailed`; or `expired`, `cancelled`, or `too_large`: its result does not
            fit into what the waiting run may remember.
        error: What its last attempt raised: `type` and `message`.
    """

    def __init__(
        self, message: str, *, run_id: str, task: str, reason: str, error: Mapping[str, str]
    ) -> None:
        super().__init__(message, run_id=run_id, task=task)
        self.reason = reason
        self.error = error


class Abort(BrokertaskError):
    """Raise in a task to end the run at once, without further attempts."""


class RetryAfter(BrokertaskError):
    """Raise in a task to choose the delay before the next attempt.

    The attempt counts; with none left the run is buried.
    """

    def __init__(self, delay: float, reason: str = "") -> None:
        super().__init__(reason or f"retry after {delay} s")
        if not (isinstance(delay, int | float) and 0 <= delay <= LONGEST_RETRY_AFTER):
            raise ValueError(f"RetryAfter: a delay is 0 to 31536000 seconds, not {delay!r}")
        self.delay = float(delay)
