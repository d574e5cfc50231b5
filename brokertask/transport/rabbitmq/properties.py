"""A `Message` to and from the properties of a content header, which is all but its body.

    flags (2 bytes), one bit for each property that is there | the properties, in this order
    short string   length (1 byte) | UTF-8
    headers        length (4 bytes) | for each: name (short string), type (1 byte), value

Reading never fails: a message that nobody could read would come again and again. What is no text
or no time is read as well as can be; docs/decisions/0008-properties-that-cannot-be-read.md.

Source: AMQP 0-9-1 specification, sections 4.2.5 and 4.2.6; types of values: RabbitMQ's errata.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from struct import Struct
from typing import Any, Final, TypeAlias

from brokertask.envelope import Message
from brokertask.topology import Route
from brokertask.transport.base import BROKER_HEADERS
from brokertask.transport.rabbitmq.frames import short
from brokertask.values import LAST_INSTANT_MS

CONTENT_TYPE: Final = 1 << 15
CONTENT_ENCODING: Final = 1 << 14
HEADERS: Final = 1 << 13
DELIVERY_MODE: Final = 1 << 12
PRIORITY: Final = 1 << 11
CORRELATION_ID: Final = 1 << 10
REPLY_TO: Final = 1 << 9
EXPIRATION: Final = 1 << 8
MESSAGE_ID: Final = 1 << 7
TIMESTAMP: Final = 1 << 6
TYPE: Final = 1 << 5
USER_ID: Final = 1 << 4
APP_ID: Final = 1 << 3
MORE_FLAGS: Final = 1

PERSISTENT: Final = b"\2"
UNREADABLE: Final[Mapping[str, Any]] = {"bt-version": "unreadable"}
"""For headers that cannot be read: the message is buried, as any other that is no run."""
MAX_DEPTH: Final = 320
"""Tables and arrays within each other; each takes two calls of the thousand that Python allows."""
LAST_SECOND: Final = 0xFFFF_FFFF
"""A later timestamp counts ms, whatever the specification says."""

_FLAGS: Final = Struct(">H")
_LENGTH: Final = Struct(">I")
_INSTANT: Final = Struct(">Q")
_FAILURES: Final = (ValueError, IndexError, struct.error)


# --- writing ------------------------------------------------------------------------------------


def pack(message: Message, route: Route, message_id: str) -> bytes:
    """Return the properties of `message`, to be published as `message_id` and persistently.

    Raises:
        TypeError, ValueError, RecursionError, struct.error: Something has no form on the wire.
    """
    flags = DELIVERY_MODE | MESSAGE_ID
    parts = [b""]
    if message.content_type:
        flags |= CONTENT_TYPE
        parts.append(_common(message.content_type))
    if message.content_encoding:
        flags |= CONTENT_ENCODING
        parts.append(_common(message.content_encoding))
    if headers := _pack_headers(message.headers, route.also):
        flags |= HEADERS
        parts.append(headers)
    parts.append(PERSISTENT)
    if message.correlation_id:
        flags |= CORRELATION_ID
        parts.append(short(message.correlation_id))
    if message.reply_to:
        flags |= REPLY_TO
        parts.append(_common(message.reply_to))
    parts.append(short(message_id))
    if message.timestamp_ms is not None:
        flags |= TIMESTAMP
        parts.append(_INSTANT.pack(message.timestamp_ms // 1000))
    if message.type:
        flags |= TYPE
        parts.append(_common(message.type))
    if message.app_id:
        flags |= APP_ID
        parts.append(_common(message.app_id))
    parts[0] = _FLAGS.pack(flags)
    return b"".join(parts)


_common: Final = lru_cache(maxsize=1_024)(short)
"""A short string that comes again and again."""


def _pack_headers(headers: Mapping[str, object], also: Sequence[str]) -> bytes:
    fields = [b""]
    for name, value in headers.items():
        if name not in BROKER_HEADERS:
            fields += (_common(name), _pack_value(value))
    if also:
        fields += (_common("CC"), _pack_value(list(also)))
    if len(fields) == 1:
        return b""
    table = b"".join(fields)
    return _LENGTH.pack(len(table)) + table


def _pack_value(value: object) -> bytes:
    if isinstance(value, str):
        raw = value.encode()
        return b"S" + _LENGTH.pack(len(raw)) + raw
    if isinstance(value, bool):
        return b"t\1" if value else b"t\0"
    if isinstance(value, int):
        return _pack_integer(value)
    if value is None:
        return b"V"
    return _pack_rare(value)


def _pack_rare(value: object) -> bytes:
    if isinstance(value, float):
        return b"d" + Struct(">d").pack(value)
    if isinstance(value, bytes | bytearray):
        return b"x" + _LENGTH.pack(len(value)) + value
    if isinstance(value, list):
        items = b"".join(map(_pack_value, value))
        return b"A" + _LENGTH.pack(len(items)) + items
    if isinstance(value, dict):
        fields = b"".join(short(name) + _pack_value(item) for name, item in value.items())
        return b"F" + _LENGTH.pack(len(fields)) + fields
    raise TypeError(f"a header of type {type(value).__name__}")


_INT64: Final = Struct(">cq").pack
_INTEGERS: Final = (
    (-(2**7), 2**7, b"b", Struct(">b")),
    (-(2**15), 2**15, b"s", Struct(">h")),
    (0, 2**16, b"u", Struct(">H")),
    (-(2**31), 2**31, b"I", Struct(">i")),
    (0, 2**32, b"i", Struct(">I")),
)
"""The smaller forms that a whole number may fit in, the smallest first."""


def _pack_integer(value: int) -> bytes:
    # Most are instants.
    if -(2**31) <= value < 2**32:
        for lowest, beyond, kind, form in _INTEGERS:
            if lowest <= value < beyond:
                return kind + form.pack(value)
    return _INT64(b"l", value)


# --- reading ------------------------------------------------------------------------------------


def unpack(properties: bytes, body: bytes) -> Message:
    """Return the message, whoever wrote it."""
    at, flags = _read_flags(properties)
    found: dict[str, Any] = {}
    try:
        for name, read in _layout(flags):
            found[name], at = read(properties, at)
    except _FAILURES:
        # Cut off, which no broker does: the rest is lost.
        found.setdefault("headers", dict(UNREADABLE))
    found.pop("", None)
    return Message(body=body, **found)


def _read_flags(data: bytes) -> tuple[int, int]:
    """Return where the properties begin, and which there are."""
    flags = more = int.from_bytes(data[:2], "big")
    at = 2
    # The specification leaves room for more properties than there are.
    while more & MORE_FLAGS and at < len(data):
        more = int.from_bytes(data[at : at + 2], "big")
        at += 2
    return at, flags


def _read_text(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    raw = data[at + 1 : end]
    try:
        return raw.decode(), end
    except UnicodeDecodeError:
        # Escaped, it grows; longer than 255 bytes, it could not be written again.
        return raw.decode("utf-8", "backslashreplace")[:255], end


def _read_instant(data: bytes, at: int) -> tuple[int | None, int]:
    return _ms(data[at : at + 8]), at + 8


def _read_octet(_: bytes, at: int) -> tuple[None, int]:
    return None, at + 1


def _read_headers(data: bytes, at: int) -> tuple[dict[str, object], int]:
    """Return the headers, without what has done its duty."""
    (length,) = _LENGTH.unpack_from(data, at)
    at += 4
    end = at + length
    try:
        if end > len(data):
            raise ValueError("headers that are cut off")
        table = _table(data, at, end)
    except _FAILURES:
        table = dict(UNREADABLE)
    table.pop("CC", None)
    return table, end


_Reader: TypeAlias = Callable[[bytes, int], tuple[object, int]]
_LAYOUT: Final[Sequence[tuple[int, str, _Reader]]] = (
    (CONTENT_TYPE, "content_type", _read_text),
    (CONTENT_ENCODING, "content_encoding", _read_text),
    (HEADERS, "headers", _read_headers),
    (DELIVERY_MODE, "", _read_octet),
    (PRIORITY, "", _read_octet),
    (CORRELATION_ID, "correlation_id", _read_text),
    (REPLY_TO, "reply_to", _read_text),
    (EXPIRATION, "", _read_text),
    (MESSAGE_ID, "message_id", _read_text),
    (TIMESTAMP, "timestamp_ms", _read_instant),
    (TYPE, "type", _read_text),
    (USER_ID, "", _read_text),
    (APP_ID, "app_id", _read_text),
)


@lru_cache(maxsize=1_024)
def _layout(flags: int) -> Sequence[tuple[str, _Reader]]:
    """Return the fields of `Message` that are there, in their order; "" is of no use to us."""
    return [(name, read) for flag, name, read in _LAYOUT if flags & flag]


def _ms(raw: bytes) -> int | None:
    at = int.from_bytes(raw, "big")
    at = at if at > LAST_SECOND else at * 1000
    return at if at <= LAST_INSTANT_MS else None


@lru_cache(maxsize=1_024)
def _name(raw: bytes) -> str:
    return raw.decode()


def _table(data: bytes, at: int, end: int, depth: int = 1) -> dict[str, object]:
    table: dict[str, object] = {}
    while at < end:
        named = at + 1 + data[at]
        name = _name(data[at + 1 : named])
        table[name], at = _value(data, named, depth)
    if at != end:
        raise ValueError("a table that is longer than it says")
    return table


def _array(data: bytes, at: int, end: int, depth: int) -> list[object]:
    items = []
    while at < end:
        item, at = _value(data, at, depth)
        items.append(item)
    if at != end:
        raise ValueError("an array that is longer than it says")
    return items


_FIXED: Final[Mapping[int, Struct]] = {
    ord(kind): Struct(form)
    for kind, form in (
        *(("b", ">b"), ("B", ">B"), ("s", ">h"), ("u", ">H"), ("I", ">i"), ("i", ">I")),
        *(("l", ">q"), ("L", ">q"), ("f", ">f"), ("d", ">d"), ("t", ">?")),
    )
}
_TEXT, _BYTES, _TABLE, _ARRAY, _TIME, _DECIMAL = b"SxFATD"
_NOTHING: Final = b"V\0"


def _value(data: bytes, at: int, depth: int) -> tuple[object, int]:
    """Return the value whose type is at `at`, in so many tables, and where the next one begins."""
    kind = data[at]
    at += 1
    if (form := _FIXED.get(kind)) is not None:
        return form.unpack_from(data, at)[0], at + form.size
    if kind in _NOTHING:
        return None, at
    if kind in (_TIME, _DECIMAL):
        return _rare(kind, data, at)
    (length,) = _LENGTH.unpack_from(data, at)
    at += 4
    end = at + length
    if kind == _TEXT:
        return _text(data[at:end]), end
    if end > len(data):
        raise ValueError("headers that are cut off")
    if kind == _BYTES:
        return data[at:end], end
    if depth >= MAX_DEPTH:
        raise ValueError(f"headers nested deeper than {MAX_DEPTH}")
    if kind == _TABLE:
        return _table(data, at, end, depth + 1), end
    if kind == _ARRAY:
        return _array(data, at, end, depth + 1), end
    raise ValueError(f"a header of type {kind}")


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _rare(kind: int, data: bytes, at: int) -> tuple[object, int]:
    if kind == _DECIMAL:
        (digits,) = _LENGTH.unpack_from(data, at + 1)
        return Decimal(digits).scaleb(-data[at]), at + 5
    # As everywhere in brokertask, an instant is ms since the epoch.
    if (instant := _ms(data[at : at + 8])) is None:
        raise ValueError("an instant after the year 9999")
    return instant, at + 8
