"""What a check found, and the checks that need no broker: the collector, and two clocks."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib.util import find_spec
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote

from brokertask.durations import readable
from brokertask.lint import Finding, Level
from brokertask.settings import mask

Status: TypeAlias = Literal["ok", "warning", "failed"]

STATUS_OF: Final[Mapping[Level, Status]] = {"error": "failed", "warning": "warning", "note": "ok"}
COLLECTOR_TIMEOUT: Final = 5.0
MAX_SKEW: Final = 2.0
"""Seconds between two clocks, beyond what whole seconds hide."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found, and how to mend it."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def from_finding(name: str, finding: Finding) -> Check:
    """Return a finding as a check."""
    detail = f"{finding.where}: {finding.what}"
    return Check(name, STATUS_OF[finding.level], detail, finding.fix)


def skew(whose: str, at_ms: int | None, earliest: float, latest: float) -> list[Check]:
    """Compare this clock with another that said `at_ms`, cut to seconds, between two instants."""
    if at_ms is None:
        return []
    told = at_ms / 1000
    apart = max(0.0, earliest - (told + 1)) or min(0.0, latest - told)
    if abs(apart) < MAX_SKEW:
        return [Check("clock", "ok", f"within {readable(MAX_SKEW)} of {whose}'s")]
    way = "ahead of" if apart > 0 else "behind"
    return [
        Check(
            "clock",
            "warning",
            f"{readable(abs(apart))} {way} {whose}'s: delays are late or early by that",
            "keep both hosts on NTP",
        )
    ]


def collector(environment: Mapping[str, str]) -> list[Check]:
    """Send an empty trace request to where spans would go."""
    name, prefix = "traces", "OTEL_EXPORTER_OTLP"
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return [Check(name, "ok", "switched off (OTEL_SDK_DISABLED)")]
    url = environment.get(f"{prefix}_TRACES_ENDPOINT", "")
    if not url and (base := environment.get(f"{prefix}_ENDPOINT", "")):
        url = f"{base.rstrip('/')}/v1/traces"
    if not url:
        fix = f"set {prefix}_ENDPOINT to a collector or Jaeger, as http://localhost:4318"
        return [Check(name, "warning", "off: no endpoint is set", fix)]
    protocol = environment.get(f"{prefix}_TRACES_PROTOCOL") or environment.get(f"{prefix}_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        fix = f"set {prefix}_PROTOCOL=http/protobuf, usually port 4318"
        return [Check(name, "failed", f"protocol {protocol} is not spoken here", fix)]
    try:
        find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        fix = 'pip install "brokertask[otlp]"'
        return [Check(name, "failed", "the exporter is not installed", fix)]
    given = environment.get(f"{prefix}_TRACES_HEADERS") or environment.get(f"{prefix}_HEADERS", "")
    return _post(name, url, _headers(given))


def _post(name: str, url: str, headers: dict[str, str]) -> list[Check]:
    started = time.time()
    try:
        request = urllib.request.Request(url, b"", headers, method="POST")
        with urllib.request.urlopen(request, timeout=COLLECTOR_TIMEOUT) as answer:
            date = answer.headers.get("Date")
    except (OSError, ValueError, HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        told = f"{mask(url)} does not take spans: {why}"
        fix = "is the collector running there, and does it speak OTLP over HTTP (port 4318)?"
        return [Check(name, "failed", told, fix)]
    ended = time.time()
    taken = f"{mask(url)} takes spans, in {readable(ended - started)}"
    return [Check(name, "ok", taken), *skew("the collector", _milliseconds(date), started, ended)]


def _headers(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    own = {unquote(key).strip(): unquote(value).strip() for key, _, value in pairs}
    return {"Content-Type": "application/x-protobuf", **own}


def _milliseconds(date: str | None) -> int | None:
    try:
        return round(parsedate_to_datetime(date).timestamp() * 1000) if date else None
    except ValueError:
        return None
