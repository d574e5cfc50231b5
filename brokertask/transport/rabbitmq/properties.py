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
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from struct import Struct
from typing import Any, Final

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
LAST_SECOND: Final = 0xFFFF_FFFF
"""A later timestamp counts ms, whatever the specification says."""

_FLAGS: Final = Struct(">H")
_LENGTH: Final = Struct(">I")
_INSTANT: Final = Struct(">Q")
_FAILURES: Final = (ValueError, IndexError, struct.error, RecursionError)


# --- writing ------------------------------------------------------------------------------------


def pack(message: Message, route: Route, message_id: str) -> bytes:
    """Return the properties of `message`, to be published as `message_id` and persistently.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError, struct.error: Something has no form
            on the wire.
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


_INTEGERS: Final = (
    (-(2**7), 2**7, b"b", Struct(">b")),
    (-(2**15), 2**15, b"s", Struct(">h")),
    (0, 2**16, b"u", Struct(">H")),
    (-(2**31), 2**31, b"I", Struct(">i")),
    (0, 2**32, b"i", Struct(">I")),
    (-(2**63), 2**63, b"l", Struct(">q")),
)
"""The smallest form that a whole number fits in."""


def _pack_integer(value: int) -> bytes:
    for lowest, beyond, kind, form in _INTEGERS:
        if lowest <= value < beyond:
            return kind + form.pack(value)
    raise OverflowError(f"{value} has more than 64 bits")


# --- reading ------------------------------------------------------------------------------------


def unpack(properties: bytes, body: bytes) -> Message:
    """Return the message, whoever wrote it."""
    fields = _Fields(properties)
    take, text = fields.take, fields.text
    content_type = text(CONTENT_TYPE)
    content_encoding = text(CONTENT_ENCODING)
    headers = fields.headers()
    take(DELIVERY_MODE, 1)
    take(PRIORITY, 1)
    correlation_id = text(CORRELATION_ID)
    reply_to = text(REPLY_TO)
    text(EXPIRATION)
    message_id = text(MESSAGE_ID)
    timestamp_ms = _ms(take(TIMESTAMP, 8))
    kind = text(TYPE)
    text(USER_ID)
    return Message(
        body=body,
        message_id=message_id,
        type=kind,
        content_type=content_type,
        content_encoding=content_encoding,
        app_id=text(APP_ID),
        reply_to=reply_to,
        correlation_id=correlation_id,
        timestamp_ms=timestamp_ms,
        headers=headers,
    )


class _Fields:
    """The properties that are there, one after the other."""

    __slots__ = ("_at", "_data", "_flags")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._flags = int.from_bytes(data[:2], "big")
        self._at = 2
        flags = self._flags
        # The specification leaves room for more properties than there are.
        while flags & MORE_FLAGS and self._at < len(data):
            flags = int.from_bytes(data[self._at : self._at + 2], "big")
            self._at += 2

    def take(self, flag: int, size: int) -> bytes | None:
        """Return a property of so many bytes, or None."""
        if not self._flags & flag:
            return None
        at = self._at
        self._at = at + size
        return self._data[at : at + size]

    def text(self, flag: int) -> str | None:
        """Return a short string, or None."""
        at, data = self._at, self._data
        if not self._flags & flag or at >= len(data):
            return None
        self._at = end = at + 1 + data[at]
        return _readable(data[at + 1 : end])

    def headers(self) -> Mapping[str, object]:
        """Return the headers, without what has done its duty."""
        length = self.take(HEADERS, 4)
        if length is None:
            return {}
        at = self._at
        self._at = end = at + int.from_bytes(length, "big")
        try:
            if end > len(self._data):
                raise ValueError("the headers are cut off")
            table = _table(self._data, at, end)
        except _FAILURES:
            return dict(UNREADABLE)
        table.pop("CC", None)
        return table


def _readable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        # Escaped, it grows; longer than 255 bytes, it could not be written again.
        return raw.decode("utf-8", "backslashreplace")[:255]


def _ms(raw: bytes | None) -> int | None:
    if raw is None or len(raw) < 8:
        return None
    at = int.from_bytes(raw, "big")
    at = at if at > LAST_SECOND else at * 1000
    return at if at <= LAST_INSTANT_MS else None


@lru_cache(maxsize=1_024)
def _name(raw: bytes) -> str:
    return raw.decode()


def _table(data: bytes, at: int, end: int) -> dict[str, object]:
    table: dict[str, object] = {}
    while at < end:
        named = at + 1 + data[at]
        name = _name(data[at + 1 : named])
        table[name], at = _value(data, named)
    if at != end:
        raise ValueError("a table that is longer than it says")
    return table


def _array(data: bytes, at: int, end: int) -> list[object]:
    items = []
    while at < end:
        item, at = _value(data, at)
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


def _value(data: bytes, at: int) -> tuple[object, int]:
    """Return the value whose type is at `at`, and where the next one begins."""
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
    if kind == _TABLE:
        return _table(data, at, end), end
    if kind == _ARRAY:
        return _array(data, at, end), end
    if kind == _BYTES:
        return data[at:end], end
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
