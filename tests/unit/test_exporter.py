"""What the lean exporter sends is what the stock one would."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from brokertask.telemetry import exporter
from brokertask.telemetry.exporter import LeanExporter, encode
from brokertask.telemetry.tracer import lean
from tests.flow.otlp import OtlpReceiver

RESOURCES: Final = (
    Resource({"service.name": "shop", "host": ["a", "b"]}, "https://example.org/resource"),
    Resource({}),
)
SCOPES: Final = (
    InstrumentationScope("brokertask", "1.0", "https://example.org/schema", {"a": 1}),
    InstrumentationScope("other"),
    None,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
values = st.one_of(
    texts,
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.booleans(),
    st.floats(allow_nan=False),
    st.lists(texts, max_size=3),
)
contexts = st.builds(
    SpanContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    st.sampled_from([None, TraceState([("vendor", "x")])]),
)
attributes = st.dictionaries(texts, values, max_size=6)
instants = st.integers(0, (1 << 64) - 1)
spans = st.builds(
    ReadableSpan,
    texts,
    contexts,
    st.none() | contexts,
    st.sampled_from(RESOURCES),
    attributes,
    st.lists(st.builds(Event, texts, attributes, instants), max_size=1),
    st.lists(st.builds(Link, contexts, attributes), max_size=1),
    st.sampled_from(SpanKind),
    status=st.builds(Status, st.just(StatusCode.ERROR), st.none() | texts)
    | st.sampled_from([Status(), Status(StatusCode.OK)]),
    start_time=instants,
    end_time=instants,
    instrumentation_scope=st.sampled_from(SCOPES),
)


def told(request: ExportTraceServiceRequest) -> dict[bytes, list[bytes]]:
    """Return the spans by resource and scope; one may be there in several parts."""
    found: dict[bytes, list[bytes]] = {}
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            about = resource.resource.SerializeToString(deterministic=True)
            about += resource.schema_url.encode() + scope.schema_url.encode()
            about += scope.scope.SerializeToString(deterministic=True)
            written = (span.SerializeToString(deterministic=True) for span in scope.spans)
            found.setdefault(about, []).extend(written)
    return {about: sorted(written) for about, written in found.items()}


@given(st.lists(spans, max_size=6))
def test_every_span_is_written_as_the_stock_exporter_writes_it(given: list[ReadableSpan]) -> None:
    assert told(ExportTraceServiceRequest.FromString(encode(given))) == told(encode_spans(given))


def test_attributes_that_are_equal_and_of_different_types_stay_apart() -> None:
    given = [one_span({"a": 1, "b": 1}), one_span({"a": True, "b": 1.0}), one_span({"a": 1.0})]
    assert told(ExportTraceServiceRequest.FromString(encode(given))) == told(encode_spans(given))


def one_span(values: Mapping[str, Any]) -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    return ReadableSpan("a", context, None, RESOURCES[0], values, start_time=1, end_time=2)


def test_it_sends_to_where_the_stock_exporter_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        sending = LeanExporter()
        assert sending.export([one_span({"a": 1}), one_span({"b": ["x"]})]) is (
            SpanExportResult.SUCCESS
        )
        sending.shutdown()  # type: ignore[no-untyped-call]
        assert [span.attributes for span in receiver.spans()] == [{"a": 1}, {"b": ("x",)}]


def test_nobody_there_is_a_failure_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    sending = LeanExporter(timeout=0.1)
    assert sending.export([one_span({"a": 1})]) is SpanExportResult.FAILURE
    sending.shutdown()  # type: ignore[no-untyped-call]
    assert sending.export([one_span({"a": 1})]) is SpanExportResult.FAILURE


def test_what_it_cannot_write_is_left_to_the_stock_exporter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[object] = []

    def export(self: OTLPSpanExporter, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        left.extend((span.attributes or {})["a"] for span in spans)
        return SpanExportResult.SUCCESS

    monkeypatch.setattr(OTLPSpanExporter, "export", export)
    sending = LeanExporter()
    sending.export([one_span({"a": "\ud800"})])
    monkeypatch.setattr(exporter, "LARGEST", 10)
    sending.export([one_span({"a": "too large"})])
    sending.shutdown()  # type: ignore[no-untyped-call]
    del sending._client
    sending.export([one_span({"a": "changed"})])
    assert left == ["\ud800", "too large", "changed"]


def test_it_costs_less_than_the_stock_exporters() -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = lean(provider.get_tracer("brokertask"))
    values = {f"messaging.{number}": "some text" for number in range(16)}
    made: list[ReadableSpan] = []
    for number in range(500):
        span = tracer.start_span("name", attributes=values | {"run": f"run-{number}"})
        span.end()
        assert isinstance(span, ReadableSpan)
        made.append(span)

    def cost(write: Callable[[Sequence[ReadableSpan]], object]) -> float:
        begun = time.process_time()
        write(made)
        return time.process_time() - begun

    def stock(spans: Sequence[ReadableSpan]) -> bytes:
        return encode_spans(spans).SerializePartialToString()

    assert min(cost(encode) / cost(stock) for _ in range(7)) < 0.6
