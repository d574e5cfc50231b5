"""Spans and metrics. Until `configure` has work to do, only the OpenTelemetry API is imported."""

from brokertask.telemetry.attempt import AttemptSpan
from brokertask.telemetry.failure import fingerprint
from brokertask.telemetry.otlp import configure
from brokertask.telemetry.spans import Telemetry

__all__ = ["AttemptSpan", "Telemetry", "configure", "fingerprint"]
