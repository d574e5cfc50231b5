"""Messages as the store keeps them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from brokertask.envelope import Message
from brokertask.values import MSGPACK, decode, pack


def pack_message(message: Message) -> bytes:
    """Return a message as bytes, its headers and properties with it."""
    return pack({name: value for name, value in asdict(message).items() if value is not None})


def unpack_message(blob: bytes) -> Message:
    """Return the message that `pack_message` was given."""
    values: dict[str, Any] = decode(blob, MSGPACK)
    return Message(**values)
