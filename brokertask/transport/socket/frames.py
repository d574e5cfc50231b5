"""What is on the socket. Nothing received is looked up by name but in the tables here."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final, cast

import msgpack

from brokertask.envelope import Message
from brokertask.errors import (
    AccessDenied,
    BrokerBlocked,
    BrokertaskError,
    BrokerUnavailable,
    ConfigurationError,
    InvalidPayload,
    PayloadTooLarge,
    PublishError,
    PublishUnknown,
    QueueFull,
    TopologyMismatch,
    Unroutable,
)
from brokertask.topology import Binding, Exchange, Queue, Topology

MAX_FRAME: Final = 33_554_432
"""Room for a payload of 16 MiB, the largest allowed, and as much memory."""
_LENGTH: Final = struct.Struct(">I")
_FIELDS: Final = tuple(field.name for field in fields(Message))
_ERRORS: Final[dict[str, type[BrokertaskError]]] = {
    kind.__name__: kind
    for kind in (
        AccessDenied,
        BrokerBlocked,
        BrokerUnavailable,
        ConfigurationError,
        InvalidPayload,
        PayloadTooLarge,
        PublishUnknown,
        QueueFull,
        TopologyMismatch,
        Unroutable,
    )
}


def pack(frame: Sequence[object]) -> bytes:
    """Return a frame as it is written.

    Raises:
        InvalidPayload: Something in it has no form in msgpack.
        PayloadTooLarge: It is over `MAX_FRAME`.
    """
    try:
        data = cast("bytes", msgpack.packb(frame))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidPayload(f"cannot be sent over the socket: {error}") from None
    if len(data) > MAX_FRAME:
        raise PayloadTooLarge(f"a frame of {len(data)} bytes; the limit is {MAX_FRAME}")
    return _LENGTH.pack(len(data)) + data


async def read(reader: asyncio.StreamReader) -> tuple[int, Any, Any]:
    """Return the three parts of the next frame.

    Raises:
        ConnectionError: The other side is gone, or what it sends is no frame.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME:
            raise ConnectionError(f"a frame of {length} bytes; the limit is {MAX_FRAME}")
        number, second, third = msgpack.unpackb(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ConnectionError(f"the socket was closed or is out of step: {error}") from None
    return number, second, third


def pack_message(message: Message) -> list[object]:
    """Return a message as a list, in the order of its fields."""
    return [getattr(message, name) for name in _FIELDS]


def unpack_message(values: list[Any]) -> Message:
    """Return the message in a list."""
    return Message(**dict(zip(_FIELDS, values, strict=True)))


def pack_topology(topology: Topology) -> dict[str, Any]:
    """Return a topology as maps and lists."""
    return asdict(topology)


def unpack_topology(parts: dict[str, Any]) -> Topology:
    """Return the topology in a map."""
    return Topology(
        tuple(Exchange(**item) for item in parts["exchanges"]),
        tuple(Queue(**item) for item in parts["queues"]),
        tuple(Binding(**item) for item in parts["bindings"]),
        tuple(Binding(**item) for item in parts["absent_bindings"]),
    )


def pack_error(error: BrokertaskError) -> list[object]:
    """Return an error as class name, text and whether the outcome is unknown."""
    return [type(error).__name__, str(error), isinstance(error, PublishError) and error.unknown]


def unpack_error(values: list[Any]) -> BrokertaskError:
    """Return the error in a list; a class this version does not know becomes the root class."""
    name, text, unknown = values
    error = _ERRORS.get(name, BrokertaskError)(text)
    if isinstance(error, PublishError):
        error.unknown = bool(unknown)
    return error
