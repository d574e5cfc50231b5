"""The span of one attempt: how it begins, what it says when it is over, and what came before it."""

from __future__ import annotations

import hashlib
import re
from time import perf_counter
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from brokertask.envelope import Envelope
from brokertask.outcome import (
    AttemptError,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.telemetry import attributes as keys
from brokertask.telemetry import propagation
from brokertask.telemetry.attributes import Attributes
from brokertask.telemetry.metrics import Metrics
from brokertask.values import clip

MAX_MESSAGE: Final = 256
"""Characters of an exception's message in a span: it is the user's text and may hold anything."""
SHORTEST_WAIT_MS: Final = 1_000
_VARIABLE: Final = re.compile(
    r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)(?!\w)          # what is quoted
    |\b0x[0-9a-f]+\b                                       # addresses
    |\b(?=[0-9a-f-]*[0-9])[0-9a-f][0-9a-f-]{7,}\b         # ids
    |\d+(?:[.,:]\d+)*                                     # numbers, times, versions""",
    re.VERBOSE | re.IGNORECASE,
)


class AttemptSpan:
    """One attempt under way.

    Attributes:
        traceparent: Of this attempt's span, for the link from the next one; None if nothing
            is recorded.
    """

    __slots__ = (
        "_attempt",
        "_ended",
        "_envelope",
        "_metrics",
        "_queue",
        "_span",
        "_started",
        "traceparent",
    )

    def __init__(
        self, metrics: Metrics, span: Span, envelope: Envelope, attempt: int, queue: str
    ) -> None:
        self._metrics = metrics
        self._span = span
        self._envelope = envelope
        self._attempt = attempt
        self._queue = queue
        self._started = perf_counter()
        self._ended = False
        self.traceparent: str | None = (
            propagation.traceparent(span.get_span_context()) if span.is_recording() else None
        )

    @property
    def trace_id(self) -> str | None:
        """The trace in hex, for logs; None if there is none."""
        made = self._span.get_span_context()
        return f"{made.trace_id:032x}" if made.is_valid else None

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
        if not isinstance(outcome, Expired | Sleeping):
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

    def broken(self, problem: BaseException) -> None:
        """Mark the span when its block is left by an exception before an outcome was known."""
        if not self._ended:
            mark_failed(self._span, type(problem).__name__, str(problem))

    def _describe(self, outcome: Outcome, word: str, status: str | None) -> None:
        span = self._span
        span.set_attribute(keys.OUTCOME, word)
        if status is not None:
            span.set_attribute(keys.RUN_STATUS, status)
        match outcome:
            case Retrying(delay=delay, error=error):
                mark_failed(span, error.type, error.message)
                milliseconds = round(delay * 1000)
                span.set_attribute(keys.RETRY_DELAY, milliseconds)
                span.add_event(
                    keys.RETRY_SCHEDULED, {"delay_ms": milliseconds, "reason": error.type}
                )
            case Failed(reason=reason, error=error):
                mark_failed(span, error.type, error.message)
                span.add_event(
                    keys.DEAD_LETTERED,
                    {
                        "reason": reason,
                        "attempts": self._attempt,
                        keys.FINGERPRINT: fingerprint(error),
                    },
                )
            case _:
                pass


def fingerprint(error: AttemptError) -> str:
    """Return 12 hex digits that are equal for failures of one kind.

    Type and message count; numbers, ids and quoted parts of the message do not.
    """
    pattern = _VARIABLE.sub("?", error.message)
    return hashlib.sha256(f"{error.type}\n{pattern}".encode()).hexdigest()[:12]


def _words(outcome: Outcome) -> tuple[str, str | None]:
    """Return the attempt's outcome and, if the run is over, the run's status."""
    match outcome:
        case Succeeded():
            return "success", keys.COMPLETED
        case Expired():
            return "expired", keys.EXPIRED
        case Retrying():
            return "retry", None
        case Failed():
            return "failed", keys.DEAD
        case Sleeping() | Repeated():
            return "suspended", None
        case Interrupted():
            return "interrupted", None


def start_process(tracer: Tracer, parent: Context, envelope: Envelope, values: Attributes) -> Span:
    """Start the `process <task>` span, linked to the attempt before it."""
    wanted = []
    if envelope.previous is not None:
        wanted.append((envelope.previous, {keys.LINK: keys.PREVIOUS_ATTEMPT}))
    if envelope.origin is not None and "traceparent" not in envelope.trace:
        # Redriven from somewhere without tracing, so no trigger span holds this link.
        wanted.append((envelope.origin, {keys.LINK: keys.ORIGIN}))
    linked, said = propagation.links(wanted)
    return tracer.start_span(
        f"process {envelope.task}", parent, SpanKind.CONSUMER, values | said, linked
    )


def record_wait(tracer: Tracer, parent: Context, envelope: Envelope, now_ms: int) -> None:
    """Record the wait that `envelope` had behind it, at the time it was, if it was worth a row."""
    again = envelope.seq > 0
    since = envelope.sent_ms if again else envelope.triggered_ms
    due = envelope.due_ms
    if since is None or due is None or due - since < SHORTEST_WAIT_MS:
        return
    if due > now_ms + SHORTEST_WAIT_MS:  # not over yet, beyond what two clocks may differ by
        return
    span = tracer.start_span(
        "wait retry" if again else "wait delay",
        parent,
        SpanKind.INTERNAL,
        {keys.RUN_ID: envelope.run_id, keys.TASK: envelope.task},
        start_time=since * 1_000_000,
    )
    span.end(due * 1_000_000)


def queued_ms(envelope: Envelope, now_ms: int) -> int:
    """Return how long the run, once ready, waited for a worker."""
    ready = envelope.due_ms or envelope.sent_ms or envelope.triggered_ms
    # The clocks of two machines may differ by more than the message took.
    return 0 if ready is None else max(0, now_ms - ready)


def mark_failed(span: Span, kind: str, message: str) -> None:
    """Mark a span as failed: never by `record_exception`, which would add the traceback."""
    if not span.is_recording():
        return
    text = clip(message, MAX_MESSAGE)
    span.set_status(StatusCode.ERROR, clip(f"{kind}: {text}", MAX_MESSAGE))
    span.set_attribute(keys.ERROR_TYPE, kind)
    span.add_event(keys.EXCEPTION, {keys.EXCEPTION_TYPE: kind, keys.EXCEPTION_MESSAGE: text})
