"""One attempt under way: its steps, and what its span and the metrics say when it is over."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import Token
from time import perf_counter
from types import TracebackType
from typing import Final

from opentelemetry import context as contexts
from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from brokertask.envelope import Envelope
from brokertask.outcome import (
    Cancelled,
    Early,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
    Waiting,
)
from brokertask.telemetry import attributes as keys
from brokertask.telemetry import propagation
from brokertask.telemetry.attributes import Attributes
from brokertask.telemetry.beginning import Beginning
from brokertask.telemetry.failure import fingerprint, mark_failed, mark_raised
from brokertask.telemetry.metrics import Metrics
from brokertask.telemetry.steps import UNRECORDED, StepSpan, record_step

MAX_REMEMBERED: Final = 100
"""Events of steps that were remembered; an SDK keeps 128 events of a span, and drops the first."""


class AttemptSpan:
    """One attempt under way; its span is current inside its `with` block, and ends with it.

    Attributes:
        trace: The trace headers of the messages that continue the run: those it came with, unless
            a new trace began with this attempt.
        origin: The traceparent of the trigger that the run began with, where `trace` holds that of
            another span; for the messages that continue the run.
    """

    __slots__ = (
        "_ended",
        "_envelope",
        "_inside",
        "_metrics",
        "_queue",
        "_recorded",
        "_remembered",
        "_span",
        "_started",
        "_token",
        "_tracer",
        "origin",
        "trace",
    )

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer | None,
        *,
        began: Beginning,
        envelope: Envelope,
        queue: str,
    ) -> None:
        span = began.span
        self._metrics = metrics
        self._tracer = tracer
        self._span = span
        self._envelope = envelope
        self._queue = queue
        self._started = perf_counter()
        self._remembered = 0
        self._ended = False
        self.trace: Mapping[str, str] = began.trace
        self.origin: str | None = began.origin
        self._inside = began.inside
        self._recorded = span.is_recording()
        self._token: Token[Context] | None = None

    def __enter__(self) -> AttemptSpan:
        self._token = contexts.attach(self._inside)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._ended:
            mark_raised(self._span, error)
        if self._token is not None:
            contexts.detach(self._token)
        self._span.end()

    @property
    def traceparent(self) -> str | None:
        """Of this attempt's span, for the link from the next one; None if nothing is recorded."""
        made = self._span.get_span_context()
        return propagation.traceparent(made) if self._recorded else None

    @property
    def trace_id(self) -> str | None:
        """The trace in hex, for logs; None if there is none."""
        made = self._span.get_span_context()
        return f"{made.trace_id:032x}" if made.is_valid else None

    def step(self, name: str) -> AbstractContextManager[StepSpan]:
        """Record a step that is executed, from its first call to the end of its last retry.

        Its span is current inside, and what is raised there marks it as failed, unless it is a
        cancellation. Cost without an SDK: below 1 µs.
        """
        if self._tracer is None or not self._span.is_recording():
            return UNRECORDED
        values: Attributes = {keys.RUN_ID: self._envelope.run_id, keys.TASK: self._envelope.task}
        return record_step(self._tracer, self._span, name, values)

    def remembered(self, name: str) -> None:
        """Record a step that was finished before and is not executed again."""
        self._remembered += 1
        if self._remembered <= MAX_REMEMBERED and self._span.is_recording():
            self._span.add_event(keys.STEP_REMEMBERED, {"name": name})

    def end(self, outcome: Outcome, *, at_ms: int) -> None:
        """Record what the attempt came to, once; the span itself ends with its `with` block.

        Args:
            outcome: What it came to.
            at_ms: When, in ms since the epoch.
        """
        if self._ended:
            return
        self._ended = True
        seconds = perf_counter() - self._started
        word, status = _words(outcome)
        error = outcome.error if isinstance(outcome, Retrying | Failed) else None
        task = self._envelope.task
        if not isinstance(outcome, Early | Expired):
            kind = error.type if error is not None else None
            self._metrics.attempted(task, self._queue, word, kind, seconds)
        if status is not None:
            since = self._envelope.triggered_ms
            lasted = None if since is None else max(0, at_ms - since) / 1000
            self._metrics.finished(task, status, lasted)
        if isinstance(outcome, Retrying):
            self._metrics.retried(task, outcome.error.type, outcome.delay)
        elif isinstance(outcome, Failed):
            self._metrics.died(task, self._queue, outcome.reason)
        if self._span.is_recording():
            self._describe(outcome, word, status)

    def _describe(self, outcome: Outcome, word: str, status: str | None) -> None:
        span = self._span
        span.set_attribute(keys.OUTCOME, word)
        if status is not None:
            span.set_attribute(keys.RUN_STATUS, status)
        if self._remembered:
            span.set_attribute(keys.REMEMBERED_STEPS, self._remembered)
        match outcome:
            case Retrying(delay=delay, error=error):
                mark_failed(span, error.type, error.message)
                milliseconds = round(delay * 1000)
                span.set_attribute(keys.RETRY_DELAY, milliseconds)
                span.add_event(
                    keys.RETRY_SCHEDULED, {"delay_ms": milliseconds, "reason": error.type}
                )
            case Sleeping(delay=delay):
                span.add_event(
                    keys.RUN_SUSPENDED, {"kind": "sleep", "delay_ms": round(delay * 1000)}
                )
            case Waiting(on=on):
                span.add_event(keys.RUN_SUSPENDED, {"kind": "wait", "on": on})
            case Failed(reason=reason, error=error):
                mark_failed(span, error.type, error.message)
                span.add_event(
                    keys.DEAD_LETTERED,
                    {
                        "reason": reason,
                        "attempts": self._envelope.attempt,
                        keys.FINGERPRINT: fingerprint(error),
                    },
                )
            case _:
                pass


def _words(outcome: Outcome) -> tuple[str, str | None]:
    """Return the attempt's outcome and, if the run is over, the run's status."""
    match outcome:
        case Succeeded():
            return "success", keys.COMPLETED
        case Expired():
            return "expired", keys.EXPIRED
        case Cancelled():
            return "cancelled", keys.CANCELLED
        case Retrying():
            return "retry", None
        case Failed():
            return "failed", keys.DEAD
        case Early() | Sleeping() | Waiting() | Repeated():
            return "suspended", None
        case Interrupted():
            return "interrupted", None
