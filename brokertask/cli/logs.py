"""Logs of workers: lines for people, or one JSON object a line. Payloads are in neither."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from opentelemetry import trace

from brokertask.run import running_in

_STANDARD: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
FOREIGN: Final = ("aio_pika", "aiormq", "pamqp")


class Level(StrEnum):
    """What is logged, at least so important."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Format(StrEnum):
    """How a line is written."""

    TEXT = "text"
    JSON = "json"


def configure(level: str, format: str) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == Format.JSON else _Text())
    handler.addFilter(_complete)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in FOREIGN:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    # Every failed try to connect; `brokertask.rabbitmq` tells of them, less often.
    logging.getLogger("aiormq.connection").setLevel(logging.CRITICAL)


def _complete(record: logging.LogRecord) -> bool:
    """Add the run that a line was logged in, unless it says so itself."""
    if not hasattr(record, "run_id") and (running := running_in.get()) is not None:
        record.run_id, record.task = running.run_id, running.task
        record.attempt = running.attempt
    span = trace.get_current_span().get_span_context()
    if not hasattr(record, "trace_id") and span.is_valid:
        record.trace_id = f"{span.trace_id:032x}"
    if record.exc_info and record.name.startswith(FOREIGN):
        # A lost connection is an event of ours, told in one line, not a traceback of theirs.
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]!r}", None
        record.exc_info = record.exc_text = None
    return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        run_id = getattr(record, "run_id", None)
        return line if run_id is None or run_id in line else f"{line}  run {run_id}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        values |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)
