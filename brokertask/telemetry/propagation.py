"""W3C trace context and baggage, between message headers and OpenTelemetry's context.

Written here because the stock propagators cost five times as much a message, and because what is
in a message's headers must stay readable whatever OTEL_PROPAGATORS says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, unquote_plus

from opentelemetry import baggage, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags, TraceState

from brokertask.telemetry.attributes import LINK, Attributes

MAX_BAGGAGE_BYTES: Final = 8_192
MAX_BAGGAGE_ENTRIES: Final = 64
_MAX_TRACESTATE: Final = 512
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KNOWN_FLAGS: Final = 0x03


def traceparent(span: SpanContext) -> str:
    """Return a valid span context as a W3C traceparent."""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & _KNOWN_FLAGS:02x}"


def span_context(parent: str | None, tracestate: str | None = None) -> SpanContext | None:
    """Read a W3C traceparent; None when it is missing or malformed. Cost: about 2 µs."""
    match = _TRACEPARENT.fullmatch(parent) if parent else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more):
        return None
    state = None
    if tracestate and len(tracestate) <= _MAX_TRACESTATE:
        state = TraceState.from_header([tracestate])
    read = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16) & _KNOWN_FLAGS),
        trace_state=state,
    )
    return read if read.is_valid else None


def context(headers: Mapping[str, str]) -> Context:
    """Return a context with nothing but the span and the baggage that `headers` name."""
    result = Context()
    if not headers:
        return result
    span = span_context(headers.get("traceparent"), headers.get("tracestate"))
    if span is not None:
        result = trace.set_span_in_context(NonRecordingSpan(span), result)
    carried = headers.get("baggage")
    return _with_baggage(carried, result) if carried else result


def headers(span: SpanContext, carried: Context) -> dict[str, str]:
    """Return what a message carries: `span` if valid, and the baggage of `carried` if small."""
    result: dict[str, str] = {}
    if span.is_valid:
        result["traceparent"] = traceparent(span)
        if span.trace_state:
            result["tracestate"] = span.trace_state.to_header()
    entries = baggage.get_all(carried)
    if entries and len(entries) <= MAX_BAGGAGE_ENTRIES:
        written = ",".join(
            f"{quote(name, safe='')}={quote(str(value), safe='')}"
            for name, value in entries.items()
        )
        if len(written) <= MAX_BAGGAGE_BYTES:
            result["baggage"] = written
    return result


def _with_baggage(header: str, into: Context) -> Context:
    entries = header.split(",")
    if len(header) > MAX_BAGGAGE_BYTES or len(entries) > MAX_BAGGAGE_ENTRIES:
        return into
    for entry in entries:
        # Properties behind ";" have no place in OpenTelemetry's baggage.
        name, equals, value = entry.partition(";")[0].partition("=")
        if equals and name.strip():
            into = baggage.set_baggage(
                unquote_plus(name.strip()), unquote_plus(value.strip()), into
            )
    return into


def links(
    wanted: Iterable[tuple[str, Mapping[str, str]]],
) -> tuple[list[Link], Attributes]:
    """Return links to the traceparents in `wanted`, and what the span itself says about them."""
    made = []
    said: Attributes = {}
    for parent, attributes in wanted:
        span = span_context(parent)
        if span is None:
            continue
        made.append(Link(span, attributes))
        meaning = attributes.get(LINK)
        if meaning is not None:
            said[f"brokertask.{meaning}.trace_id"] = f"{span.trace_id:032x}"
            said[f"brokertask.{meaning}.span_id"] = f"{span.span_id:016x}"
    return made, said
