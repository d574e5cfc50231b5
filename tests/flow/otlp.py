"""A small OTLP/HTTP collector for tests: it keeps what it is sent and lets a test wait for it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TypeAlias

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value: TypeAlias = str | int | float | bool | tuple["Value", ...] | None
Attributes: TypeAlias = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Link:
    trace_id: str
    span_id: str
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class SpanEvent:
    name: str
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Ids are hex; `parent_id` is empty on a root; `kind` and `status` are OTLP's words."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    status: str
    message: str
    attributes: Attributes
    events: tuple[SpanEvent, ...]
    links: tuple[Link, ...]
    resource: Attributes
    scope: str
    schema_url: str


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str
    points: tuple[Attributes, ...] = field(default=())
    """The attributes of each of its data points."""


class OtlpReceiver:
    """`with OtlpReceiver() as receiver:` listens on `receiver.endpoint`, a loopback port."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[Span] = []
        self._metrics: list[Metric] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver._take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # Exporters keep their connections open, so that closing would wait for their threads.
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> OtlpReceiver:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def spans(self, trace_id: str | None = None) -> list[Span]:
        """Return the spans received so far, by start, of one trace or of all."""
        with self._arrived:
            kept = [s for s in self._spans if trace_id is None or s.trace_id == trace_id]
        return sorted(kept, key=lambda span: (span.start_ns, span.end_ns))

    def metrics(self) -> list[Metric]:
        """Return the metrics received so far."""
        with self._arrived:
            return list(self._metrics)

    def wait_for(self, predicate: Callable[[list[Span]], bool], timeout: float = 10) -> list[Span]:
        """Return the spans as soon as `predicate` likes them; `timeout` is in seconds."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: predicate(self._spans), timeout):
                raise TimeoutError(f"after {timeout} s there is\n{tree(self._spans)}")
        return self.spans()

    def _take(self, path: str, body: bytes) -> None:
        with self._arrived:
            if path.endswith("/v1/traces"):
                self._spans += read_spans(ExportTraceServiceRequest.FromString(body))
            elif path.endswith("/v1/metrics"):
                self._metrics += _read_metrics(ExportMetricsServiceRequest.FromString(body))
            self._arrived.notify_all()


def read_spans(request: ExportTraceServiceRequest) -> list[Span]:
    """Return the spans of one OTLP request."""
    return [
        Span(
            name=span.name,
            kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            start_ns=span.start_time_unix_nano,
            end_ns=span.end_time_unix_nano,
            status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
            message=span.status.message,
            attributes=_attributes(span.attributes),
            events=tuple(SpanEvent(e.name, _attributes(e.attributes)) for e in span.events),
            links=tuple(
                Link(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes))
                for link in span.links
            ),
            resource=_attributes(resource.resource.attributes),
            scope=scope.scope.name,
            schema_url=scope.schema_url,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def tree(spans: Iterable[Span]) -> str:
    """Return the traces as indented span names, ERROR marked with "!"; children by start."""
    ordered = sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
    known = {span.span_id for span in ordered}

    def lines(parent: str, depth: int) -> Iterable[str]:
        for span in ordered:
            here = span.parent_id if span.parent_id in known else ""
            if here == parent:
                yield f"{'  ' * depth}{span.name}{' !' if span.status == 'ERROR' else ''}"
                yield from lines(span.span_id, depth + 1)

    return "\n".join(lines("", 0))


def _read_metrics(request: ExportMetricsServiceRequest) -> list[Metric]:
    read = []
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                data = getattr(metric, metric.WhichOneof("data") or "gauge")
                points = tuple(_attributes(point.attributes) for point in data.data_points)
                read.append(Metric(metric.name, metric.unit, points))
    return read


def _attributes(pairs: Sequence[KeyValue]) -> Attributes:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bool_value":
            return value.bool_value
        case "array_value":
            return tuple(_value(item) for item in value.array_value.values)
        case _:
            return None
