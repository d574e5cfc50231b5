"""How a failure is told: by its class, what it says, and what it has in common with others."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from opentelemetry.trace import Span, StatusCode

from brokertask.outcome import AttemptError
from brokertask.raised import name_of, text_of
from brokertask.telemetry import attributes as keys
from brokertask.values import clip

MAX_MESSAGE: Final = 256
"""Characters of an exception's message in a span: it is the user's text and may hold anything."""
_VARIABLE: Final = re.compile(
    r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)(?!\w)          # what is quoted
    |\b0x[0-9a-f]+\b                                       # addresses
    |\b(?=[0-9a-f-]*[0-9])[0-9a-f][0-9a-f-]{7,}\b         # ids
    |\d+(?:[.,:]\d+)*                                     # numbers, times, versions""",
    re.VERBOSE | re.IGNORECASE,
)


def fingerprint(error: AttemptError) -> str:
    """Return 12 hex digits that are equal for failures of one kind.

    Type and message count; numbers, ids and quoted parts of the message do not.
    """
    pattern = _VARIABLE.sub("?", error.message)
    return hashlib.sha256(f"{error.type}\n{pattern}".encode()).hexdigest()[:12]


def mark_raised(span: Span, error: BaseException) -> None:
    """Mark a span as failed by what was raised in it."""
    if span.is_recording():
        mark_failed(span, name_of(error), text_of(error))


def mark_failed(span: Span, kind: str, message: str) -> None:
    """Mark a span as failed: never by `record_exception`, which would add the traceback."""
    if not span.is_recording():
        return
    text = clip(message, MAX_MESSAGE)
    span.set_status(StatusCode.ERROR, clip(f"{kind}: {text}", MAX_MESSAGE))
    span.set_attribute(keys.ERROR_TYPE, kind)
    span.add_event(keys.EXCEPTION, {keys.EXCEPTION_TYPE: kind, keys.EXCEPTION_MESSAGE: text})
