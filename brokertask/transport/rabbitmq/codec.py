"""`Message` to and from the properties and headers of pamqp, for `plain`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from aiormq.abc import DeliveredMessage
from pamqp import decode
from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.topology import Route
from brokertask.transport.base import own_headers

PERSISTENT: Final = 2


def properties_of(message: Message, route: Route) -> Basic.Properties:
    """Return the AMQP properties to publish `message` with."""
    headers: dict[str, Any] = {
        # pamqp writes a bytearray as AMQP's byte array, and bytes not at all.
        name: bytearray(value) if isinstance(value, bytes) else value
        for name, value in own_headers(message.headers).items()
    }
    if route.also:
        headers["CC"] = list(route.also)
    at = message.timestamp_ms
    return Basic.Properties(
        delivery_mode=PERSISTENT,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        message_id=message.message_id,
        message_type=message.type,
        app_id=message.app_id,
        reply_to=message.reply_to,
        correlation_id=message.correlation_id,
        timestamp=None if at is None else datetime.fromtimestamp(at // 1000, UTC),
        headers=headers or None,
    )


def message_of(delivered: DeliveredMessage) -> Message:
    """Return what was delivered, whoever wrote it."""
    properties = delivered.header.properties
    headers: Mapping[str, Any] = properties.headers or {}
    at = properties.timestamp
    return Message(
        body=delivered.body,
        message_id=properties.message_id,
        type=properties.message_type,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        app_id=properties.app_id,
        reply_to=properties.reply_to,
        correlation_id=properties.correlation_id,
        timestamp_ms=None if at is None else round(at.timestamp() * 1000),
        headers={name: _plain(value) for name, value in headers.items() if name != "CC"},
    )


def _plain(value: Any) -> Any:
    """Return a header's value with instants as ms since the epoch, as everywhere in brokertask."""
    if isinstance(value, datetime):
        return round(value.timestamp() * 1000)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return bytes(value) if isinstance(value, bytearray) else value


_UNREADABLE: Final = (ValueError, OverflowError, OSError, RecursionError)
_read_properties: Final = Basic.Properties.unmarshal


def _read_any_properties(self: Basic.Properties, flags: int, data: bytes) -> None:
    """Read properties as pamqp does, and what it cannot read as well as can be.

    AMQP carries bytes where pamqp wants UTF-8, and timestamps beyond the year 9999. pamqp raises,
    which ends the connection and everything in flight on it; then the message comes again.
    """
    try:
        _read_properties(self, flags, data)
    except _UNREADABLE:
        for name in self.__slots__:
            if flags & self.flags[name]:
                consumed, value = _read_any(data, getattr(self, f"_{name}"))
                setattr(self, name, value)
                data = data[consumed:]


def _read_any(data: bytes, kind: str) -> tuple[int, object]:
    try:
        return decode.by_type(data, kind)
    except _UNREADABLE:
        if kind == "shortstr":
            end = 1 + data[0]
            # Escaped, it grows; longer than 255 bytes, it could not be written again.
            return end, data[1:end].decode("utf-8", "backslashreplace")[:255]
        if kind == "timestamp":
            return 8, None
        # Headers: without them nobody knows what the message is. This buries it as undecodable.
        return 4 + int.from_bytes(data[:4], "big"), {"bt-version": "unreadable"}


def forgive() -> None:
    """Have pamqp read any properties; docs/decisions/0008-properties-that-cannot-be-read.md."""
    Basic.Properties.unmarshal = _read_any_properties  # type: ignore[assignment,method-assign]
