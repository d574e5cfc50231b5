"""The frames of the hot path, byte by byte: what carries messages, their acks and confirms.

    frame    kind, channel, size (7 bytes) | payload of that size | the byte 0xCE
    method   class and method number (4 bytes) | its arguments
    header   class, weight, size of the body (12 bytes) | properties (`properties`)
    body     bytes

A message is one method frame (publish, deliver or return), one header frame, and as many body
frames as its body takes; on one channel nothing comes between them.

Source: AMQP 0-9-1 specification, sections 2.3.5 and 4.2.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final

METHOD: Final = 1
HEADER: Final = 2
BODY: Final = 3
HEARTBEAT_KIND: Final = 8
KINDS: Final = frozenset({METHOD, HEADER, BODY, HEARTBEAT_KIND})

HEAD: Final = Struct(">BHI")
OVERHEAD: Final = HEAD.size + 1
END: Final = 0xCE
_END: Final = bytes([END])
_CONTENT: Final = Struct(">HHQ")
_TAG: Final = Struct(">QB")
_NUMBERS: Final = Struct(">HH")
_BASIC: Final = 60
PROPERTIES_AT: Final = _CONTENT.size
"""Where in a header frame's payload the properties begin."""

CONNECTION_BLOCKED: Final = _NUMBERS.pack(10, 60)
CONNECTION_UNBLOCKED: Final = _NUMBERS.pack(10, 61)
FLOW: Final = _NUMBERS.pack(20, 20)
FLOW_OK: Final = _NUMBERS.pack(20, 21)
CHANNEL_CLOSE: Final = _NUMBERS.pack(20, 40)
CHANNEL_CLOSE_OK: Final = _NUMBERS.pack(20, 41)
CONSUME: Final = _NUMBERS.pack(_BASIC, 20)
CANCEL: Final = _NUMBERS.pack(_BASIC, 30)
PUBLISH: Final = _NUMBERS.pack(_BASIC, 40)
RETURN: Final = _NUMBERS.pack(_BASIC, 50)
DELIVER: Final = _NUMBERS.pack(_BASIC, 60)
ACK: Final = _NUMBERS.pack(_BASIC, 80)
REJECT: Final = _NUMBERS.pack(_BASIC, 90)
NACK: Final = _NUMBERS.pack(_BASIC, 120)

HEARTBEAT: Final = HEAD.pack(HEARTBEAT_KIND, 0, 0) + _END

_MULTIPLE: Final = 1
_REQUEUE: Final = 1
_MANDATORY: Final = 1
_NO_ACK: Final = 2
_NO_WAIT: Final = 8
_RESERVED: Final = b"\0\0"
_NO_ARGUMENTS: Final = b"\0\0\0\0"


class FrameError(ValueError):
    """The other side does not speak AMQP as it should; nothing after this can be understood."""


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """Return one frame."""
    return b"".join((HEAD.pack(kind, channel, len(payload)), payload, _END))


def short(text: str) -> bytes:
    """Return a short string: at most 255 bytes, or it is a `ValueError`."""
    raw = text.encode()
    if len(raw) > 255:
        raise ValueError(f"{text[:30]!r}… is {len(raw)} bytes, AMQP takes 255")
    return bytes([len(raw)]) + raw


@lru_cache(maxsize=1_024)
def publish(channel: int, exchange: str, key: str, *, mandatory: bool) -> bytes:
    """Return the first frame of a message to send; `content` makes the others."""
    flags = bytes([_MANDATORY if mandatory else 0])
    return frame(METHOD, channel, PUBLISH + _RESERVED + short(exchange) + short(key) + flags)


def content(channel: int, properties: bytes, body: bytes, *, frame_max: int) -> bytes:
    """Return the header frame and the body frames of a message.

    Args:
        channel: Where it is sent.
        properties: As `properties.pack` makes them.
        body: Cut into pieces that fit.
        frame_max: The largest frame that the broker takes, in bytes; 0 for any.
    """
    head = _CONTENT.pack(_BASIC, 0, len(body)) + properties
    if frame_max and len(head) + OVERHEAD > frame_max:
        raise ValueError(f"its properties are {len(head)} bytes, a frame here takes {frame_max}")
    frames = [HEAD.pack(HEADER, channel, len(head)), head, _END]
    piece = frame_max - OVERHEAD if frame_max else max(1, len(body))
    for at in range(0, len(body), piece):
        part = body[at : at + piece]
        frames += (HEAD.pack(BODY, channel, len(part)), part, _END)
    return b"".join(frames)


def ack(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Return the frame that settles one delivery; `multiple`: and all before it."""
    return frame(METHOD, channel, ACK + _TAG.pack(tag, _MULTIPLE if multiple else 0))


def reject(channel: int, tag: int) -> bytes:
    """Return the frame that gives one delivery back to its queue."""
    return frame(METHOD, channel, REJECT + _TAG.pack(tag, _REQUEUE))


def consume(channel: int, queue: str, consumer: str, *, no_ack: bool) -> bytes:
    """Return the frame that begins a consumer, and asks for no answer."""
    flags = bytes([_NO_WAIT | (_NO_ACK if no_ack else 0)])
    arguments = _RESERVED + short(queue) + short(consumer) + flags + _NO_ARGUMENTS
    return frame(METHOD, channel, CONSUME + arguments)


def cancel(channel: int, consumer: str) -> bytes:
    """Return the frame that ends a consumer, and asks for no answer."""
    return frame(METHOD, channel, CANCEL + short(consumer) + b"\1")


def flow_ok(channel: int, *, active: bool) -> bytes:
    """Return the answer to a `FLOW`."""
    return frame(METHOD, channel, FLOW_OK + bytes([active]))


def read_tag(data: bytes, start: int, end: int) -> tuple[int, bool]:
    """Return what a confirm is for, and whether for all before it as well.

    Args:
        data: The stream, with this frame's payload from `start` to `end`.
        start: Of the payload of an `ACK` or `NACK`.
        end: Of the payload.
    """
    if end - start != 13:
        raise FrameError("a confirm of a wrong size")
    tag, flags = _TAG.unpack_from(data, start + 4)
    return tag, bool(flags & _MULTIPLE)


def read_delivery(data: bytes, start: int, end: int) -> tuple[bytes, bytes, int, bool]:
    """Return of a `DELIVER` the consumer, the routing key, the tag, and if it is redelivered."""
    at = start + 5 + data[start + 4]
    tag, redelivered = _TAG.unpack_from(data, at)
    exchange = at + _TAG.size
    key = exchange + 1 + data[exchange]
    if key + 1 + data[key] != end:
        raise FrameError("a delivery of a wrong size")
    return data[start + 5 : at], data[key + 1 : end], tag, bool(redelivered & 1)


def read_size(data: bytes, start: int, end: int) -> int:
    """Return how large the body is that a `HEADER` announces."""
    if end - start < _CONTENT.size:
        raise FrameError("a header that is too short")
    number, _, size = _CONTENT.unpack_from(data, start)
    if number != _BASIC:
        raise FrameError(f"content of class {number}")
    return int(size)
