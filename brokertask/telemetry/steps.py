"""The span of one step, and what it says of the step's own retries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from opentelemetry import context as contexts
from opentelemetry import trace as traces
from opentelemetry.trace import Span, SpanKind, Tracer

from brokertask.raised import name_of
from brokertask.telemetry import attributes as keys
from brokertask.telemetry.attributes import Attributes
from brokertask.telemetry.failure import mark_raised


class StepSpan:
    """One step under way."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    def retried(self, error: BaseException, delay: float) -> None:
        """Record that the step failed and is called again after `delay` seconds."""
        if self._span.is_recording():
            happened: Attributes = {"delay_ms": round(delay * 1000), "reason": name_of(error)}
            self._span.add_event(keys.STEP_RETRY, happened)


UNRECORDED: Final[AbstractContextManager[StepSpan]] = nullcontext(StepSpan(traces.INVALID_SPAN))
"""A step of which nothing is recorded; the same for all of them."""


@contextmanager
def record_step(tracer: Tracer, attempt: Span, name: str, values: Attributes) -> Iterator[StepSpan]:
    """Record the `step <name>` span; it is current inside.

    It is below the current span, which is the attempt's unless the task opened one of its own.
    """
    parent = contexts.get_current()
    if not traces.get_current_span(parent).get_span_context().is_valid:
        # In a thread that the task started itself, which knows no context.
        parent = traces.set_span_in_context(attempt, parent)
    # The numbers of steps in a loop would make a span name of each.
    called = f"step {name.partition('#')[0]}"
    span = tracer.start_span(called, parent, SpanKind.INTERNAL, {**values, keys.STEP: name})
    token = contexts.attach(traces.set_span_in_context(span, parent))
    outcome = "success"
    try:
        yield StepSpan(span)
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    except BaseException as problem:
        outcome = "failed"
        mark_raised(span, problem)
        raise
    finally:
        contexts.detach(token)
        span.set_attribute(keys.STEP_OUTCOME, outcome)
        span.end()
