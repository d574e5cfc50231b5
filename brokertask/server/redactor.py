"""What of a payload is kept: secrets are taken out, and what is too large is left out. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from brokertask.envelope import Envelope
from brokertask.errors import EnvelopeError
from brokertask.values import MSGPACK, decode, pack

MAX_KEPT: Final = 262_144
"""Bytes; a larger payload is known by its run alone."""
REDACTED: Final = "[redacted]"
SECRET: Final = re.compile(
    r"password|passwd|passphrase|secret|token|authorization|cookie|api_?key|private_?key"
    r"|credential|card_?number|cvv|ssn",
    re.IGNORECASE,
)
"""Names of fields whose values are not kept."""
State: TypeAlias = Literal["kept", "redacted", "left_out", "claim"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A payload as the store has it."""

    body: bytes | None
    content_type: str
    state: State
    """`redacted`: parts are missing. `left_out`: all of it. `claim`: it is in the payload store."""


def kept(envelope: Envelope) -> Kept:
    """Return what is kept of the payload of a message."""
    try:
        if envelope.claim() is not None:
            return Kept(envelope.payload, envelope.content_type, "claim")
        if len(envelope.payload) > MAX_KEPT:
            return Kept(None, envelope.content_type, "left_out")
        value = envelope.value()
    except EnvelopeError:
        return Kept(None, envelope.content_type, "left_out")
    if (cleaned := redact(value)) == value:
        return Kept(envelope.payload, envelope.content_type, "kept")
    return Kept(pack(cleaned), MSGPACK, "redacted")


def redact(value: Any) -> Any:
    """Return a decoded value without the values of fields that are named like secrets."""
    if isinstance(value, dict):
        return {
            key: REDACTED if isinstance(key, str) and SECRET.search(key) else redact(item)
            for key, item in value.items()
        }
    return [redact(item) for item in value] if isinstance(value, list) else value


def redact_body(body: bytes) -> bytes:
    """Return a msgpack value without secrets; as it is, if it has none."""
    value = decode(body, MSGPACK)
    cleaned = redact(value)
    return body if cleaned == value else pack(cleaned)
