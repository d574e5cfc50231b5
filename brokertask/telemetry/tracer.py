"""A tracer that makes the SDK's spans at a fraction of their cost.

What the SDK spends on a span is, for the most part, checking attributes that are ours, room for
events and links that never come, and a copy at the end. `lean` leaves that out until it is needed.
Sampler, identifiers, resource, scope, limits and processors are the provider's; a provider that is
not the SDK's, or has processors that look at spans which start, makes its spans by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from time import time_ns
from typing import Any, Final

from opentelemetry import trace as traces
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.util.types import Attributes, AttributeValue

PLAIN_ATTRIBUTES: Final = 64
"""Beyond so many attributes a span has the SDK's own storage for them; ours has about 20."""
_UNSET: Final = Status()
_PLAIN_TYPES: Final = frozenset({str, int, bool, float})
_QUIET: Final = (sdk.SpanProcessor, BatchSpanProcessor, SimpleSpanProcessor)
"""Processors that do nothing with a span before it has ended."""


class LeanSpan(sdk.Span):
    """The SDK's span, whose parts are made when they are used."""

    def __init__(
        self,
        tracer: sdk.Tracer,
        name: str,
        context: SpanContext,
        parent: SpanContext | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: dict[str, Any] | None = None,
        start_time: int | None = None,
    ) -> None:
        sdk.ReadableSpan.__init__(
            self,
            name,
            context,
            parent,
            tracer.resource,
            {} if attributes is None else attributes,
            kind=kind,
            instrumentation_info=tracer.instrumentation_info,
            instrumentation_scope=tracer._instrumentation_scope,
            status=_UNSET,
            start_time=time_ns() if start_time is None else start_time,
        )
        self._limits = tracer._span_limits
        self._span_processor = tracer.span_processor
        self._lock = Lock()
        self._record_exception = self._set_status_on_exception = True

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """See `opentelemetry.trace.Span`."""
        plain = self._attributes
        if type(plain) is dict:
            with self._lock:
                known = key and type(key) is str and type(value) in _PLAIN_TYPES
                if known and len(plain) < PLAIN_ATTRIBUTES and self._end_time is None:
                    # A new value has a new place, as in the SDK.
                    plain.pop(key, None)
                    plain[key] = value
                    return
            self._make_room()
        super().set_attribute(key, value)

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        """See `opentelemetry.trace.Span`."""
        self._make_room()
        super().set_attributes(attributes)

    def add_event(
        self, name: str, attributes: Attributes = None, timestamp: int | None = None
    ) -> None:
        """See `opentelemetry.trace.Span`."""
        self._make_room()
        super().add_event(name, attributes, timestamp)

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """See `opentelemetry.trace.Span`."""
        self._make_room()
        super().add_link(context, attributes)

    def end(self, end_time: int | None = None) -> None:
        """See `opentelemetry.trace.Span`."""
        with self._lock:
            ended = self._end_time is not None
            if not ended:
                self._end_time = time_ns() if end_time is None else end_time
        if ended:
            super().end()  # which says that this is a mistake
            return
        # Nothing changes any more, so it can be read without a copy.
        self._span_processor.on_end(self)

    def _make_room(self) -> None:
        """Change to the SDK's storage, which checks and counts what comes from users."""
        with self._lock:
            if type(self._events) is tuple:
                self._events = self._new_events()  # type: ignore[no-untyped-call]
                self._links = self._links or self._new_links(())
                if type(self._attributes) is dict:
                    self._attributes = _bounded(self._limits, self._attributes)


def lean(tracer: traces.Tracer) -> traces.Tracer:
    """Return what makes the spans of `tracer`: a lean one for the SDK's, else itself."""
    return LeanTracer(tracer) if type(tracer) is sdk.Tracer and _fits(tracer) else tracer


class LeanTracer(sdk.Tracer):
    """Makes lean spans in the place of the SDK's tracer."""

    def __init__(self, stock: sdk.Tracer) -> None:
        self._stock = stock
        limits = stock._span_limits
        self._roomy = limits.max_span_attribute_length is None and (
            limits.max_span_attributes is None or limits.max_span_attributes >= PLAIN_ATTRIBUTES
        )
        self._processors: object = None
        self._quiet = False

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> traces.Span:
        """See `opentelemetry.trace.Tracer`."""
        stock = self._stock
        if not (self._is_quiet() and stock._is_enabled()):
            return stock.start_span(name, context, kind, attributes, links, start_time)
        parent: SpanContext | None = traces.get_current_span(context).get_span_context()
        if parent is not None and parent.is_valid:
            trace_id, random = parent.trace_id, parent.trace_flags.random_trace_id
        else:
            parent, trace_id = None, stock.id_generator.generate_trace_id()
            random = stock.id_generator.is_trace_id_random()
        result = stock.sampler.should_sample(context, trace_id, name, kind, attributes, links)
        decision = result.decision
        made = SpanContext(
            trace_id,
            stock.id_generator.generate_span_id(),
            is_remote=False,
            trace_flags=_FLAGS[decision is Decision.RECORD_AND_SAMPLE, random],
            trace_state=result.trace_state,
        )
        if decision is Decision.DROP:
            return NonRecordingSpan(made)
        kept = dict(result.attributes or {})
        span = LeanSpan(stock, name, made, parent, kind, kept, start_time)
        if links:
            span._links = span._new_links(links)
        if not self._roomy or kept != attributes:
            span._make_room()
        return span

    def _is_quiet(self) -> bool:
        """Whether no processor looks at a span before it has ended; one may come at any time."""
        processors = getattr(self._stock.span_processor, "_span_processors", None)
        if processors is not self._processors:
            self._processors = processors
            self._quiet = isinstance(processors, tuple) and all(
                any(_same(type(each), quiet) for quiet in _QUIET) for each in processors
            )
        return self._quiet


_FLAGS: Final = {
    (sampled, random): TraceFlags(
        (TraceFlags.SAMPLED if sampled else 0) | (TraceFlags.RANDOM_TRACE_ID if random else 0)
    )
    for sampled in (False, True)
    for random in (False, True)
}


def _fits(tracer: sdk.Tracer) -> bool:
    """Whether this SDK has all that lean spans need, and nothing that only its own spans do.

    Some of it has no public name. An SDK that has changed it makes its spans by itself.
    """
    if type(getattr(tracer, "_tracer_metrics", None)).__name__ != "NoOpTracerMetrics":
        return False
    try:
        tried = LeanSpan(tracer, "tried", traces.INVALID_SPAN_CONTEXT)
        tried._span_processor = sdk.SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]
        tried.set_attribute("tried", 1)
        tried.add_event("tried")
        tried.set_status(StatusCode.ERROR, "tried")
        tried.end()
        told = (tried.attributes, len(tried.events), tried.status.status_code, tried.is_recording())
        random = tracer.id_generator.is_trace_id_random() and tracer._is_enabled()
    except (AttributeError, TypeError):
        return False
    return told == ({"tried": 1}, 1, StatusCode.ERROR, False) and isinstance(random, bool)


def _bounded(limits: sdk.SpanLimits, attributes: Mapping[str, Any]) -> BoundedAttributes:
    return BoundedAttributes(
        limits.max_span_attributes,
        attributes,
        immutable=False,
        max_value_len=limits.max_span_attribute_length,
    )


def _same(kind: type, quiet: type) -> bool:
    return all(
        getattr(kind, hook, None) is getattr(quiet, hook, None)
        for hook in ("on_start", "_on_ending")
    )
