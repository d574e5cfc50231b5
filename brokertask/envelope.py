"""What is on the wire for one message of a run: reading, limits, writing. Pure.

    body     payload bytes, verbatim from the trigger | memory (msgpack map), from `bt-memory` on
             the payload may be a claim: then it waits in the payload store
    headers  AMQP properties and `bt-*`, as docs/concepts/wire-format.md specifies them

A bare `msgpack(payload)` with no header at all is a valid trigger.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from brokertask.claim import CLAIM, Claim
from brokertask.errors import EnvelopeError, PayloadTooLarge
from brokertask.memory import MAX_ERRORS_BYTES, Memory
from brokertask.values import LAST_INSTANT_MS, MSGPACK, decode, kind_of

VERSION: Final = 1
MAX_HEADERS_BYTES: Final = 16_384
"""A header must fit one frame; an oversized one closes the connection and all in flight on it."""
MAX_ID: Final = 128
"""Bytes of UTF-8 in a run id, a tag, a traceparent: what headers hold many of."""
MAX_TAGS: Final = 32
MAX_TRACEBACK: Final = 8_000

HeaderValue: TypeAlias = object
Headers: TypeAlias = Mapping[str, HeaderValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An AMQP message as brokertask sees it, both ways; instants are ms since the epoch."""

    body: bytes
    message_id: str | None = None
    type: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    app_id: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    timestamp_ms: int | None = None
    headers: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One message of a run, understood. Instants are ms since the epoch, delays are ms."""

    run_id: str
    task: str
    payload: bytes
    content_type: str = MSGPACK
    attempt: int = 1
    """The attempt this message asks for, 1-based, before deliveries that were lost."""
    seq: int = 0
    """The message's place in the run, 0 for the trigger: the fence against stale copies."""
    memory: Memory = field(default_factory=Memory)
    triggered_ms: int | None = None
    sent_ms: int | None = None
    due_ms: int | None = None
    left_ms: int = 0
    """What is left to wait when this message arrives; see `topology.Names.delay_route`."""
    expires_ms: int | None = None
    tags: tuple[str, ...] = ()
    parent: str | None = None
    root: str | None = None
    reply_to: str | None = None
    app_id: str | None = None
    id_derived: bool = False
    """The publisher gave no id: two identical messages share one, so they are never merged."""
    wait: str | None = None
    """What the run waited for before this message: `retry`, `sleep`; None after a trigger."""
    previous: str | None = None
    """The traceparent of the attempt before, for the link between their spans."""
    origin: str | None = None
    """After a redrive: the traceparent of the trigger that the run began with."""
    redrives: int = 0
    trace: Mapping[str, str] = field(default_factory=dict)
    """traceparent, tracestate and baggage of the creation context; the same for the whole run."""

    def message(self) -> Message:
        """Return it as the message to publish."""
        memory = self.memory.pack()
        optional: tuple[tuple[str, HeaderValue], ...] = (
            ("bt-attempt", self.attempt if self.attempt > 1 else None),
            ("bt-seq", self.seq or None),
            ("bt-memory", len(self.payload) if memory else None),
            ("bt-triggered", self.triggered_ms),
            ("bt-sent", self.sent_ms),
            ("bt-due", self.due_ms),
            ("bt-left", self.left_ms or None),
            ("bt-expires", self.expires_ms),
            ("bt-tags", list(self.tags) or None),
            ("bt-parent", self.parent),
            ("bt-root", self.root),
            ("bt-derived", self.id_derived or None),
            ("bt-wait", self.wait),
            ("bt-previous", self.previous),
            ("bt-origin", self.origin),
            ("bt-redrives", self.redrives or None),
        )
        headers: Headers = {
            "bt-version": VERSION,
            **self.trace,
            **{name: value for name, value in optional if value is not None},
        }
        check_headers(headers)
        return Message(
            body=self.payload + memory,
            message_id=self.run_id,
            type=self.task,
            content_type=self.content_type,
            app_id=self.app_id,
            reply_to=self.reply_to,
            timestamp_ms=self.triggered_ms,
            headers=headers,
        )

    @staticmethod
    def read(
        message: Message, *, task: str, max_bytes: int, max_memory_bytes: int = 1_048_576
    ) -> Envelope:
        """Return the envelope in `message`, delivered from the queue of `task`.

        Only the headers are understood here; the payload stays bytes until the run is to start.
        `max_bytes` bounds the payload, `max_memory_bytes` what the run remembers beside errors.

        Raises:
            EnvelopeError: It can't be a run; its `reason` is the dead-letter reason.
        """
        headers = _Headers(message.headers)
        size = _payload_size(
            headers, len(message.body), max_bytes, max_memory_bytes + MAX_ERRORS_BYTES
        )
        values = headers.values()
        values["attempt"] = max(1, values.get("attempt", 1))
        values["triggered_ms"] = values.get("triggered_ms") or _instant(message.timestamp_ms)
        return Envelope(
            run_id=run_id_of(message, task),
            task=task,
            payload=message.body[:size],
            content_type=message.content_type or MSGPACK,
            memory=Memory.unpack(message.body[size:]),
            reply_to=message.reply_to,
            app_id=message.app_id,
            id_derived=not message.message_id or bool(headers.integer("bt-derived", 0)),
            trace=headers.trace(),
            **values,
        )

    def claim(self) -> Claim | None:
        """Return the claim that the payload is, or None if it is the payload itself.

        Raises:
            EnvelopeError: It says that it is a claim, and is none.
        """
        return Claim.unpack(self.payload) if kind_of(self.content_type) == CLAIM else None

    def value(self) -> object:
        """Decode the payload, which is no claim.

        Raises:
            EnvelopeError: It is not what its content type says, or too deep.
        """
        return decode(self.payload, self.content_type)

    def claimed(self, claim: Claim | None) -> Envelope:
        """Return this message with a claim for its payload; None: as it is."""
        return self if claim is None else replace(self, payload=claim.pack(), content_type=CLAIM)

    def again(
        self,
        *,
        attempt: int,
        now_ms: int,
        memory: Memory | None = None,
        wait: str | None = None,
    ) -> Envelope:
        """Return the message that follows this one in the run."""
        return replace(
            self,
            attempt=attempt,
            seq=self.seq + 1,
            memory=self.memory if memory is None else memory,
            sent_ms=now_ms,
            due_ms=None,
            left_ms=0,
            wait=wait,
        )

    def redriven(self, *, trace: Mapping[str, str], now_ms: int, forget: bool = False) -> Envelope:
        """Return a new start of a dead run: first attempt, no errors, a link to what it was.

        It goes on behind its finished steps, unless it shall forget them.
        """
        memory = Memory() if forget else self.memory.redriven()
        return replace(
            self.again(attempt=1, now_ms=now_ms, memory=memory),
            trace=trace,
            previous=None,
            origin=self.origin or self.trace.get("traceparent"),
            redrives=self.redrives + 1,
            expires_ms=None,
        )


def _payload_size(headers: _Headers, body: int, max_bytes: int, max_memory: int) -> int:
    """Return how many bytes of the body are payload, if this is a message we can read."""
    version = headers.integer("bt-version", VERSION)
    if version > VERSION or version < 1:
        raise EnvelopeError(
            f"written in wire format {version}, this worker reads {VERSION}: update the worker",
            reason="unsupported_version",
        )
    size = headers.integer("bt-memory", body)
    if size > body:
        raise EnvelopeError(f"bt-memory points to byte {size} of {body}", reason="undecodable")
    if size > max_bytes:
        raise EnvelopeError(
            f"{size} bytes, the limit is {max_bytes} (max_payload_bytes)", reason="too_large"
        )
    if body - size > max_memory:
        raise EnvelopeError(
            f"a memory of {body - size} bytes, the limit is {max_memory}", reason="too_large"
        )
    return size


def check_headers(headers: Headers) -> None:
    """Raise `PayloadTooLarge` unless the headers fit in one frame, with room to spare."""
    size = sum(len(name) + 8 + _size(value) for name, value in headers.items())
    if size > MAX_HEADERS_BYTES:
        raise PayloadTooLarge(
            f"the headers of the message are {size} bytes, the limit is {MAX_HEADERS_BYTES}: "
            "use fewer or shorter tags, and less baggage"
        )


def _size(value: HeaderValue) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    return sum(5 + _size(item) for item in value) if isinstance(value, list) else 8


def _instant(value: int | None) -> int | None:
    return value if value is not None and 0 <= value <= LAST_INSTANT_MS else None


def run_id_of(message: Message, task: str) -> str:
    """Return the id of the run that `message` is of, whoever wrote it.

    One too long for our own headers is hashed, not cut: what begins alike must stay different.
    """
    given = message.message_id
    if not given:
        return derived_id(message, task)
    if _fits(given, MAX_ID):
        return given
    return _uuid(given.encode("utf-8", "replace"))


def derived_id(message: Message, task: str) -> str:
    """Return an id for a message that came without: the same for each of its redeliveries."""
    seen = repr((task, message.timestamp_ms, message.app_id, message.correlation_id)).encode()
    return _uuid(seen + message.body)


def _uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=hashlib.sha256(data).digest()[:16], version=5))


def _fits(text: str, limit: int) -> bool:
    """Whether `text` takes at most `limit` bytes, and has no lone surrogates."""
    return len(text) <= limit and (text.isascii() or _cut(text, limit) == text)


def _cut(text: str, limit: int = MAX_ID) -> str:
    """Return the beginning of `text` that takes at most `limit` bytes; "?" for lone surrogates."""
    return text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


class _Headers:
    """Header values by type; a foreign client's nonsense is an `EnvelopeError`, not a crash."""

    def __init__(self, headers: Headers) -> None:
        self.headers = headers

    def optional_integer(self, name: str) -> int | None:
        value = self.headers.get(name)
        if value is None:
            return None
        # The limit keeps dates and sums of what we read within what can be written again.
        if not isinstance(value, int) or not 0 <= value <= LAST_INSTANT_MS:
            raise EnvelopeError(
                f"header {name} is not a whole number from 0 to {LAST_INSTANT_MS}",
                reason="undecodable",
            )
        return int(value)

    def values(self) -> dict[str, Any]:
        """Return the fields of an envelope that are headers and nothing else."""
        values: dict[str, Any] = {}
        for name in self.headers.keys() & _FIELDS.keys():
            field, read = _FIELDS[name]
            if (value := read(self, name)) is not None:
                values[field] = value
        return values

    def trace(self) -> dict[str, str]:
        """Return the trace headers that can be read."""
        return {name: value for name in _TRACE if (value := self.text(name)) is not None}

    def integer(self, name: str, default: int) -> int:
        value = self.optional_integer(name)
        return default if value is None else value

    def text(self, name: str) -> str | None:
        value = _text(self.headers.get(name))
        # A foreign header must never make our own, which copies it, too large for a frame.
        return value if value is not None and _fits(value, _LONGEST.get(name, MAX_ID)) else None

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.headers.get(name)
        if not isinstance(values, list | tuple):
            return ()
        return tuple(_cut(text) for value in values[:MAX_TAGS] if (text := _text(value)))


def _text(value: HeaderValue) -> str | None:
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


_LONGEST: Final = {"baggage": 8_192, "tracestate": 512}
_TRACE: Final = ("traceparent", "tracestate", "baggage")
_FIELDS: Final[Mapping[str, tuple[str, Callable[[_Headers, str], object]]]] = {
    "bt-attempt": ("attempt", _Headers.optional_integer),
    "bt-seq": ("seq", _Headers.optional_integer),
    "bt-triggered": ("triggered_ms", _Headers.optional_integer),
    "bt-sent": ("sent_ms", _Headers.optional_integer),
    "bt-due": ("due_ms", _Headers.optional_integer),
    "bt-left": ("left_ms", _Headers.optional_integer),
    "bt-expires": ("expires_ms", _Headers.optional_integer),
    "bt-tags": ("tags", _Headers.texts),
    "bt-parent": ("parent", _Headers.text),
    "bt-root": ("root", _Headers.text),
    "bt-wait": ("wait", _Headers.text),
    "bt-previous": ("previous", _Headers.text),
    "bt-origin": ("origin", _Headers.text),
    "bt-redrives": ("redrives", _Headers.optional_integer),
}
