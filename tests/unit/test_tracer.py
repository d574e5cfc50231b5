"""Lean spans are the SDK's spans: whatever is done to one, an exporter is given the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pytest
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TraceFlags

from brokertask.telemetry.tracer import LeanSpan, lean

SCOPE: Final = ("brokertask", "1.0", "https://example.org/schema")
OTHER: Final = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1))
OURS: Final[dict[str, Any]] = {"run": "r-1", "attempt": 1, "share": 0.5, "last": True}


class Counted(IdGenerator):
    """The same ids each time, so that spans can be compared."""

    def __init__(self) -> None:
        self._next = 1

    def generate_span_id(self) -> int:
        self._next += 1
        return self._next

    def generate_trace_id(self) -> int:
        self._next += 1
        return self._next << 64


class Looking(sdk.SpanProcessor):
    """Puts its mark on each span that starts, as a processor for baggage does."""

    def on_start(self, span: sdk.Span, parent_context: Context | None = None) -> None:
        span.set_attribute("looked", type(span).__name__)


class Chatty(Sampler):
    """Records all, and adds to it what had to be checked."""

    def should_sample(self, *args: Any, **options: Any) -> SamplingResult:
        added: dict[str, Any] = {"rule": "all", "list": ["a", 1], "": "no name"}
        return SamplingResult(Decision.RECORD_AND_SAMPLE, added)

    def get_description(self) -> str:
        return "chatty"


class Recording:
    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = sdk.TracerProvider(
            shutdown_on_exit=False, id_generator=Counted(), **options
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.stock = self.provider.get_tracer(*SCOPE)

    def told(self) -> list[trace_pb2.Span]:
        """Return what an exporter sends, without the times that nobody chose."""
        request = encode_spans(self.exporter.get_finished_spans())
        spans = [
            span
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        for span in spans:
            assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
            span.start_time_unix_nano = span.end_time_unix_nano = 0
            for event in span.events:
                event.time_unix_nano = event.time_unix_nano if event.time_unix_nano < 100 else 0
                for attribute in event.attributes:
                    if attribute.key == "exception.stacktrace":
                        attribute.value.string_value = ""
        return spans


def untouched(span: Span) -> None:
    pass


def plain(span: Span) -> None:
    span.set_attribute("text", "é")
    span.set_attribute("number", 2)
    span.set_attribute("attempt", 9)


def checked(span: Span) -> None:
    span.set_attribute("list", ["a", "b"])
    span.set_attribute("mixed", ["a", 1])
    span.set_attribute("bytes", b"text")
    span.set_attribute("object", object())  # type: ignore[arg-type]
    span.set_attribute("", "no name")
    span.set_attribute("after", 1)


def together(span: Span) -> None:
    span.set_attributes({"one": 1, "two": ["x"]})


def many(span: Span) -> None:
    for number in range(200):
        span.set_attribute(f"n{number}", "x" * 50)
        span.add_event("e", {"number": number}, 7)
        span.add_link(OTHER, {"number": number})


def eventful(span: Span) -> None:
    span.add_event("one", {"a": 1, "b": ["x"]}, 50)
    span.add_link(OTHER, {"why": "so"})
    span.update_name("another name")
    span.set_status(StatusCode.ERROR, "it broke")


def fine(span: Span) -> None:
    span.set_status(StatusCode.OK)
    span.set_status(StatusCode.ERROR, "too late")


def raised(span: Span) -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        span.record_exception(error, {"more": 1})


def late(span: Span) -> None:
    span.end()
    span.set_attribute("late", 1)
    span.add_event("late")
    span.add_link(OTHER)
    span.set_status(StatusCode.ERROR)


@contextmanager
def inside(span: Span | None) -> Iterator[Context]:
    parent = Context() if span is None else trace.set_span_in_context(span, Context())
    token = context.attach(parent)
    try:
        yield parent
    finally:
        context.detach(token)


OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "usual": {},
    "tight limits": {
        "span_limits": sdk.SpanLimits(
            max_attributes=3, max_events=2, max_links=1, max_attribute_length=4
        )
    },
    "chatty sampler": {"sampler": Chatty()},
    "resource": {"resource": Resource({"service.name": "shop"})},
}


@pytest.mark.parametrize("use", [untouched, plain, checked, together, many, eventful, fine, raised])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("linked", [False, True], ids=["", "linked"])
@pytest.mark.parametrize("remote", [False, True], ids=["root", "child"])
def test_an_exporter_is_given_what_the_sdks_own_span_would_say(
    use: Callable[[Span], None], options: dict[str, Any], linked: bool, remote: bool
) -> None:
    told = []
    for choose in (lean, lambda tracer: tracer):
        recording = Recording(**options)
        tracer = choose(recording.stock)
        links = [Link(OTHER, {"why": "so", "list": [1]}), Link(OTHER)] if linked else None
        with inside(trace.NonRecordingSpan(OTHER) if remote else None) as parent:
            span = tracer.start_span("name", parent, SpanKind.CONSUMER, dict(OURS), links)
            assert span.is_recording()
            use(span)
            span.end()
            assert not span.is_recording()
        told.append(recording.told())
    assert isinstance(lean(recording.stock).start_span("it is lean"), LeanSpan)
    assert told[0] == told[1]
    assert len(told[0]) == 1


def test_nothing_changes_after_the_end_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    said = []
    for choose in (lean, lambda tracer: tracer):
        recording = Recording()
        span = choose(recording.stock).start_span("name", attributes=dict(OURS))
        with caplog.at_level(logging.WARNING):
            late(span)
            span.end()
        (told,) = recording.told()
        assert len(told.attributes) == len(OURS)
        assert not told.events
        said.append([record.message for record in caplog.records])
        caplog.clear()
    assert said[0] == said[1]


def test_a_child_span_of_the_users_is_below_it() -> None:
    recording = Recording()
    span = lean(recording.stock).start_span("outer")
    with trace.use_span(span, end_on_exit=True), recording.stock.start_as_current_span("inner"):
        pass
    inner, outer = recording.told()
    assert inner.parent_span_id == outer.span_id
    assert inner.trace_id == outer.trace_id


def test_what_is_raised_under_it_marks_it_as_the_sdk_does() -> None:
    told = []
    for choose in (lean, lambda tracer: tracer):
        recording = Recording()
        with (
            pytest.raises(ValueError, match="no"),
            choose(recording.stock).start_as_current_span("name"),
        ):
            raise ValueError("no")
        told.append(recording.told())
    assert told[0] == told[1]


def test_a_processor_that_looks_at_starting_spans_gets_the_sdks_own() -> None:
    recording = Recording()
    tracer = lean(recording.stock)
    tracer.start_span("before").end()
    recording.provider.add_span_processor(Looking())
    tracer.start_span("after").end()
    before, after = recording.told()
    assert not before.attributes
    assert after.attributes[0].value.string_value == "_Span"


def test_every_processor_hears_of_the_end() -> None:
    recording = Recording()
    second = InMemorySpanExporter()
    batch = BatchSpanProcessor(second)
    recording.provider.add_span_processor(batch)
    lean(recording.stock).start_span("name").end()
    batch.force_flush()
    recording.provider.shutdown()
    assert [span.name for span in second.get_finished_spans()] == ["name"]
    assert len(recording.told()) == 1


def test_what_is_not_sampled_costs_no_span() -> None:
    recording = Recording(sampler=ALWAYS_OFF)
    span = lean(recording.stock).start_span("name")
    assert not span.is_recording()
    assert span.get_span_context().is_valid
    assert not span.get_span_context().trace_flags.sampled
    span.end()
    assert not recording.told()


def test_a_tracer_that_is_not_the_sdks_is_left_alone() -> None:
    tracer = trace.NoOpTracer()
    assert lean(tracer) is tracer


@pytest.mark.parametrize("lacking", ["_span_limits", "_instrumentation_scope", "_tracer_metrics"])
def test_an_sdk_that_has_changed_makes_its_spans_by_itself(lacking: str) -> None:
    tracer = Recording().stock
    delattr(tracer, lacking)
    assert lean(tracer) is tracer


def test_an_sdk_that_counts_its_own_spans_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    tracer = Recording().stock
    assert lean(tracer) is tracer


def test_it_costs_less_than_the_sdks_own() -> None:
    class Nowhere(sdk.SpanProcessor):
        pass

    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Nowhere())
    stock = provider.get_tracer(*SCOPE)
    attributes = {f"messaging.{number}": "some text" for number in range(16)}

    def cost(tracer: trace.Tracer) -> float:
        begun = time.process_time()
        for _ in range(3_000):
            tracer.start_span("name", Context(), SpanKind.CONSUMER, attributes).end()
        return time.process_time() - begun

    def ratio() -> float:
        return cost(lean(stock)) / cost(stock)

    assert min(_each(ratio, 5)) < 0.7


def _each(measure: Callable[[], float], count: int) -> Sequence[float]:
    return [measure() for _ in range(count)]
