"""How the span of an attempt begins: in which trace, linked to what, and behind which waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry import trace as traces
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer

from brokertask.envelope import Envelope
from brokertask.telemetry import attributes as keys
from brokertask.telemetry import propagation
from brokertask.telemetry.attributes import Attributes

SHORTEST_WAIT_MS: Final = 1_000
LONGEST_WAIT_MS: Final = 300_000
"""Behind a longer one a new trace begins: collectors decide on a trace, and stores and people look
at it, within minutes."""
MAX_LOST: Final = 5
WAITS: Final = frozenset({"delay", "retry", "sleep", "call", "map", "run", "token", "event"})


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where an attempt begins.

    Attributes:
        span: The attempt's span.
        inside: The context of what happens in it.
        trace: The trace headers of the messages that continue the run.
        origin: The traceparent of the trigger that the run began with, if `trace` holds another.
    """

    span: Span
    inside: Context
    trace: Mapping[str, str]
    origin: str | None


def unrecorded(envelope: Envelope) -> Beginning:
    """Return the beginning of an attempt without an SDK: the trace of its message passes through.

    Cost: 2 µs.
    """
    inside = propagation.context(envelope.trace)
    return Beginning(traces.get_current_span(inside), inside, envelope.trace, envelope.origin)


def begin(
    tracer: Tracer, envelope: Envelope, values: Attributes, *, lost: int, now_ms: int
) -> Beginning:
    """Start the span of an attempt, and record what lies between it and the attempt before.

    Args:
        tracer: Makes the spans.
        envelope: The message that asks for the attempt.
        values: The span's attributes.
        lost: How many attempts at this very message ended with their worker.
        now_ms: The present, in ms since the epoch.
    """
    wait = _wait(envelope, now_ms)
    if wait is not None and wait.milliseconds > LONGEST_WAIT_MS:
        began = _segment(tracer, envelope, values)
        if began is not None:
            _record_lost(tracer, began.inside, envelope, lost=lost, now_ms=now_ms)
            return began
    parent = propagation.context(envelope.trace)
    # With a lost attempt before this one, the wait may have been recorded by its worker.
    if wait is not None and not lost:
        _record_wait(tracer, parent, envelope, wait)
    _record_lost(tracer, parent, envelope, lost=lost, now_ms=now_ms)
    linked, said = _links(
        (envelope.previous, keys.PREVIOUS_ATTEMPT),
        # Redriven from somewhere without tracing, so no trigger span holds this link.
        (None if "traceparent" in envelope.trace else envelope.origin, keys.ORIGIN),
    )
    name = f"process {envelope.task}"
    span = tracer.start_span(name, parent, SpanKind.CONSUMER, values | said, linked)
    inside = traces.set_span_in_context(span, parent)
    return Beginning(span, inside, envelope.trace, envelope.origin)


def queued_ms(envelope: Envelope, now_ms: int) -> int:
    """Return how long the run, once ready, waited for a worker."""
    # The clocks of two machines may differ by more than the message took.
    return max(0, now_ms - _ready_ms(envelope, now_ms))


@dataclass(frozen=True, slots=True)
class _Wait:
    """What a run waited for, and from when until when, in ms since the epoch."""

    kind: str
    since_ms: int
    due_ms: int

    @property
    def milliseconds(self) -> int:
        return self.due_ms - self.since_ms


def _wait(envelope: Envelope, now_ms: int) -> _Wait | None:
    """Return the wait that `envelope` has behind it, if it is known, over and worth a row."""
    first = envelope.seq == 0
    kind = "delay" if first else envelope.wait
    since = envelope.triggered_ms if first else envelope.sent_ms
    due = envelope.due_ms
    if kind not in WAITS or since is None or due is None:
        return None
    # Beyond what two clocks may differ by, it is not over yet.
    if due - since < SHORTEST_WAIT_MS or due > now_ms + SHORTEST_WAIT_MS:
        return None
    return _Wait(kind, since, due)


def _segment(tracer: Tracer, envelope: Envelope, values: Attributes) -> Beginning | None:
    """Begin a new trace; None where the tracer makes none."""
    carried = {name: value for name, value in envelope.trace.items() if name == "baggage"}
    parent = propagation.context(carried)
    origin = envelope.origin or envelope.trace.get("traceparent")
    linked, said = _links((envelope.previous, keys.PREVIOUS_SEGMENT), (origin, keys.RUN_ORIGIN))
    # Nothing of a run that was delayed has run yet: its first attempt is one like others.
    name = f"{'resume' if envelope.seq else 'process'} {envelope.task}"
    span = tracer.start_span(name, parent, SpanKind.CONSUMER, values | said, linked)
    made = span.get_span_context()
    if not made.is_valid:
        return None
    trace = {**propagation.headers(made, Context()), **carried}
    return Beginning(span, traces.set_span_in_context(span, parent), trace, origin)


def _record_wait(tracer: Tracer, parent: Context, envelope: Envelope, wait: _Wait) -> None:
    """Record a wait at the time it was."""
    span = tracer.start_span(
        f"wait {wait.kind}",
        parent,
        SpanKind.INTERNAL,
        {keys.RUN_ID: envelope.run_id, keys.TASK: envelope.task},
        start_time=wait.since_ms * 1_000_000,
    )
    span.end(wait.due_ms * 1_000_000)


def _record_lost(
    tracer: Tracer, parent: Context, envelope: Envelope, *, lost: int, now_ms: int
) -> None:
    """Record the last of the lost attempts in the place of their workers.

    When each began is not known: they share the time since the message was ready.
    """
    shown = min(lost, MAX_LOST)
    ready = min(_ready_ms(envelope, now_ms), now_ms)
    for place in range(shown):
        start, end = (ready + (now_ms - ready) * (place + more) // shown for more in (0, 1))
        span = tracer.start_span(
            "attempt lost",
            parent,
            SpanKind.INTERNAL,
            {
                keys.RUN_ID: envelope.run_id,
                keys.TASK: envelope.task,
                keys.ATTEMPT: envelope.attempt - shown + place,
                keys.OUTCOME: "lost",
                keys.ERROR_TYPE: keys.WORKER_LOST,
            },
            start_time=start * 1_000_000,
        )
        span.set_status(StatusCode.ERROR, "its worker died or lost the broker")
        span.end(end * 1_000_000)


def _ready_ms(envelope: Envelope, now_ms: int) -> int:
    return envelope.due_ms or envelope.sent_ms or envelope.triggered_ms or now_ms


def _links(*wanted: tuple[str | None, str]) -> tuple[list[Link], Attributes]:
    """Return links to the traceparents that are known, each with what it means."""
    return propagation.links(
        (parent, {keys.LINK: meaning}) for parent, meaning in wanted if parent is not None
    )
