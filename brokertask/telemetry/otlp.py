"""Set up the OpenTelemetry SDK from its standard variables, unless somebody already has."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeAlias

from opentelemetry import metrics, trace
from opentelemetry.metrics import _internal as metrics_internal

from brokertask.errors import ConfigurationError
from brokertask.telemetry.attributes import VERSION
from brokertask.telemetry.spans import installed_version

FLUSH_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 60.0
_OTLP: Final = "OTEL_EXPORTER_OTLP"
_NOISY: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
    "opentelemetry.sdk.metrics._internal.export",
)

Stop: TypeAlias = Callable[[], object]


def configure(service_name: str) -> Callable[[], None]:
    """Send spans and metrics to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, if it does.

    Does nothing when no endpoint is set, when OTEL_SDK_DISABLED is true, or for a signal whose
    global provider somebody else has set. Cost: about 0.4 s of imports when it does something.

    Args:
        service_name: The service's name, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES
            says another.

    Returns:
        A function that sends what is left and shuts down what this has set up; providers that
        somebody else has set are flushed. It returns within 5 seconds, also when the collector is
        gone, and never raises.

    Raises:
        ConfigurationError: The exporter is not installed, or a protocol other than http/protobuf
            is asked for.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return _nothing
    # Those that the service made are its own to shut down. They are flushed, as a worker whose
    # threads do not end leaves nothing of the service the time to do it.
    foreign = (trace.get_tracer_provider(), metrics.get_meter_provider())
    flushes = (getattr(provider, "force_flush", None) for provider in foreign)
    stops: list[Stop] = [flush for flush in flushes if flush is not None]
    if _wanted("TRACES") and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        stops.append(_start_traces(service_name))
    if _wanted("METRICS") and _no_meter_provider():
        stops.append(_start_metrics(service_name))
    if not stops:
        return _nothing
    quiet = _OneLine()
    for name in _NOISY:
        logging.getLogger(name).addFilter(quiet)
    return lambda: _stop_all(stops)


def _nothing() -> None:
    return None


def _wanted(signal: str) -> bool:
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    endpoint = os.environ.get(f"{_OTLP}_{signal}_ENDPOINT") or os.environ.get(f"{_OTLP}_ENDPOINT")
    if not endpoint:
        return False
    protocol = os.environ.get(f"{_OTLP}_{signal}_PROTOCOL") or os.environ.get(f"{_OTLP}_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise ConfigurationError(
            f"OTLP protocol {protocol!r}: brokertask sends http/protobuf (usually port 4318). "
            f"Set {_OTLP}_PROTOCOL=http/protobuf, or set up the OpenTelemetry SDK yourself"
        )
    return True


def _no_meter_provider() -> bool:
    # The API has no public name for "nobody has set one", unlike for traces.
    return isinstance(metrics.get_meter_provider(), metrics_internal._ProxyMeterProvider)


def _start_traces(service_name: str) -> Stop:
    try:
        from brokertask.telemetry.exporter import LeanExporter
    except ImportError as error:
        raise _not_installed() from error
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Its own hook at exit would wait for a dead collector for half a minute.
    provider = TracerProvider(resource=_resource(service_name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(LeanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _start_metrics(service_name: str) -> Stop:
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    except ImportError as error:
        raise _not_installed() from error
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    provider = MeterProvider(
        [PeriodicExportingMetricReader(OTLPMetricExporter())],
        resource=_resource(service_name),
        shutdown_on_exit=False,
    )
    metrics.set_meter_provider(provider)
    return provider.shutdown


def _not_installed() -> ConfigurationError:
    return ConfigurationError(
        f"{_OTLP}_ENDPOINT is set but the exporter is not installed: "
        'pip install "brokertask[otlp]", or unset the variable'
    )


@lru_cache(1)
def _resource(service_name: str) -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = {
        "service.name": service_name,
        "service.instance.id": str(uuid.uuid4()),
        # Jaeger warns about clock skew between spans whose host it can't tell.
        "host.name": socket.gethostname(),
        VERSION: installed_version(),
    }
    # `create` lets its argument win over the environment, and here it is the other way round.
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def _stop_all(stops: list[Stop]) -> None:
    """Run each in a thread of its own: the SDK's shutdown has no time limit that holds."""
    until = time.monotonic() + FLUSH_SECONDS
    threads = []
    while stops:
        thread = threading.Thread(target=_quietly, args=(stops.pop(),), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is already going
            return
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _quietly(stop: Stop) -> None:
    try:
        stop()
    except Exception as error:
        logging.getLogger("brokertask.telemetry").warning("telemetry did not stop: %r", error)


class _OneLine(logging.Filter):
    """Lets one line a minute pass from each logger, without a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next.get(record.name, 0.0):
            return False
        self._next[record.name] = now + QUIET_SECONDS
        if record.exc_info:
            record.msg = f"{record.getMessage()}: {record.exc_info[1]!r}"
            record.args = None
            record.exc_info = None
        return True
