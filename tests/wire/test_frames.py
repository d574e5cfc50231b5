"""The frames that brokertask writes and reads itself, held to pamqp, the codec below aio-pika."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, decode
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.frame import marshal, unmarshal
from pamqp.header import ContentHeader

from brokertask.envelope import Message
from brokertask.topology import Route
from brokertask.transport.base import BROKER_HEADERS
from brokertask.transport.rabbitmq import frames, properties

FRAME_MAX = 4_096
channels = st.integers(1, 65_535)
tags = st.integers(0, 2**63 - 1)
flags = st.booleans()
# pamqp wants names without some characters, and exchanges of at most 127.
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_:", max_size=120)
short_texts = st.one_of(st.none(), st.text(max_size=60).filter(lambda text: text != ""))
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.one_of(
    st.none(), st.booleans(), integers, st.text(max_size=40), st.binary(max_size=40)
)
tables = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=20), inner, max_size=4)
    ),
    max_leaves=12,
)
messages = st.builds(
    Message,
    body=st.binary(max_size=3 * FRAME_MAX),
    message_id=st.text(min_size=1, max_size=60),
    type=short_texts,
    content_type=short_texts,
    content_encoding=short_texts,
    app_id=short_texts,
    reply_to=short_texts,
    correlation_id=short_texts,
    timestamp_ms=st.one_of(st.none(), st.integers(0, 0xFFFF_FFFF).map(lambda s: s * 1000)),
    headers=st.dictionaries(
        st.text(max_size=20).filter(lambda name: name not in BROKER_HEADERS), tables, max_size=8
    ),
)
ROUTE = Route("bt.tasks", "a")


def of_pamqp(value: Any) -> Any:
    """Return a header's value as pamqp has it, in the order that it writes tables in."""
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, list):
        return [of_pamqp(item) for item in value]
    if isinstance(value, dict):
        return {name: of_pamqp(value[name]) for name in sorted(value)}
    return value


def ordered(value: Any) -> Any:
    if isinstance(value, list):
        return [ordered(item) for item in value]
    return {k: ordered(value[k]) for k in sorted(value)} if isinstance(value, dict) else value


def their_properties(message: Message) -> commands.Basic.Properties:
    at = message.timestamp_ms
    return commands.Basic.Properties(
        delivery_mode=2,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        message_id=message.message_id,
        message_type=message.type,
        app_id=message.app_id,
        reply_to=message.reply_to,
        correlation_id=message.correlation_id,
        timestamp=None if at is None else datetime.fromtimestamp(at // 1000, UTC),
        headers=of_pamqp(message.headers) or None,
    )


def their_frames(message: Message, channel: int, frame_max: int) -> bytes:
    """Return the header and body frames as pamqp writes them."""
    header = ContentHeader(body_size=len(message.body), properties=their_properties(message))
    piece = frame_max - frames.OVERHEAD
    parts = [message.body[at : at + piece] for at in range(0, len(message.body), piece)]
    return marshal(header, channel) + b"".join(
        marshal(ContentBody(part), channel) for part in parts
    )


def payload(frame: bytes) -> tuple[bytes, int, int]:
    return frame, frames.HEAD.size, len(frame) - 1


@given(channels, names, names, flags)
def test_a_publish(channel: int, exchange: str, key: str, mandatory: bool) -> None:
    ours = frames.publish(channel, exchange, key, mandatory=mandatory)
    theirs = commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
    assert ours == marshal(theirs, channel)
    assert ours[frames.HEAD.size :].startswith(frames.PUBLISH)


@given(channels, tags, flags)
def test_a_settlement(channel: int, tag: int, multiple: bool) -> None:
    ack = frames.ack(channel, tag, multiple=multiple)
    assert ack == marshal(commands.Basic.Ack(tag, multiple), channel)
    assert frames.read_tag(*payload(ack)) == (tag, multiple)
    nack = marshal(commands.Basic.Nack(tag, multiple, requeue=True), channel)
    assert frames.read_tag(*payload(nack)) == (tag, multiple)
    assert nack[frames.HEAD.size :].startswith(frames.NACK)
    assert frames.reject(channel, tag) == marshal(commands.Basic.Reject(tag, True), channel)


@given(channels, names, names, flags)
def test_a_consumer(channel: int, queue: str, consumer: str, no_ack: bool) -> None:
    theirs = commands.Basic.Consume(
        queue=queue, consumer_tag=consumer, no_ack=no_ack, nowait=True, arguments={}
    )
    assert frames.consume(channel, queue, consumer, no_ack=no_ack) == marshal(theirs, channel)
    end = commands.Basic.Cancel(consumer_tag=consumer, nowait=True)
    assert frames.cancel(channel, consumer) == marshal(end, channel)


@given(channels, flags)
def test_an_answer_to_a_flow(channel: int, active: bool) -> None:
    theirs = marshal(commands.Channel.FlowOk(active=active), channel)
    assert frames.flow_ok(channel, active=active) == theirs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (frames.CONNECTION_BLOCKED, commands.Connection.Blocked),
        (frames.CONNECTION_UNBLOCKED, commands.Connection.Unblocked),
        (frames.FLOW, commands.Channel.Flow),
        (frames.CHANNEL_CLOSE, commands.Channel.Close),
        (frames.CHANNEL_CLOSE_OK, commands.Channel.CloseOk),
        (frames.RETURN, commands.Basic.Return),
        (frames.DELIVER, commands.Basic.Deliver),
    ],
)
def test_the_number_of_a_method(ours: bytes, theirs: type[Frame]) -> None:
    assert int.from_bytes(ours, "big") == theirs.index


@given(names, tags, flags, names, names)
def test_a_delivery(consumer: str, tag: int, redelivered: bool, exchange: str, key: str) -> None:
    theirs = commands.Basic.Deliver(consumer, tag, redelivered, exchange, key)
    assert frames.read_delivery(*payload(marshal(theirs, 1))) == (
        consumer.encode(),
        key.encode(),
        tag,
        redelivered,
    )


@given(messages, channels)
def test_the_content_of_a_message(message: Message, channel: int) -> None:
    message = replace(message, headers=ordered(message.headers))
    packed = properties.pack(message, ROUTE, message.message_id or "")
    ours = frames.content(channel, packed, message.body, frame_max=FRAME_MAX)
    assert ours == their_frames(message, channel, FRAME_MAX)


@given(messages)
def test_what_pamqp_wrote_reads_as_the_same_message(message: Message) -> None:
    written = their_properties(message).marshal()
    assert properties.unpack(written, message.body) == message


@given(messages)
def test_what_is_written_pamqp_reads_as_the_same(message: Message) -> None:
    packed = properties.pack(message, ROUTE, message.message_id or "")
    header = frames.content(1, packed, b"", frame_max=0)
    _, _, frame = unmarshal(header)
    assert isinstance(frame, ContentHeader)
    assert frame.properties == their_properties(message)


@given(st.floats(allow_nan=False))
def test_a_number_with_a_fraction_keeps_all_its_digits(value: float) -> None:
    # pamqp would write it with half of its digits.
    message = Message(body=b"", headers={"x": value})
    packed = properties.pack(message, ROUTE, "id")
    assert properties.unpack(packed, b"").headers == {"x": value}
    assert decode.field_table(packed[packed.index(b"\1xd") - 4 :])[1] == {"x": value}


def test_a_copy_goes_by_a_header_that_nobody_reads() -> None:
    message = Message(body=b"", headers={"mine": 1, "CC": ["forged"], "x-delivery-count": 3})
    packed = properties.pack(message, Route("bt.delay", "a", ("d.100",)), "id")
    properties_read = commands.Basic.Properties()
    properties_read.unmarshal(*_flags(packed))
    assert properties_read.headers == {"mine": 1, "CC": ["d.100"]}
    assert properties.unpack(packed, b"").headers == {"mine": 1}


def _flags(packed: bytes) -> tuple[int, bytes]:
    return int.from_bytes(packed[:2], "big"), packed[2:]


@given(st.binary(max_size=200))
def test_no_properties_are_too_strange_to_be_read(noise: bytes) -> None:
    message = properties.unpack(noise, b"body")
    assert message.body == b"body"
    # What was read can be written again, in a dead letter.
    assert message.message_id is None or len(message.message_id) <= 255


@pytest.mark.parametrize("depth", [properties.MAX_DEPTH - 1, properties.MAX_DEPTH, 2_000])
def test_headers_within_headers_have_a_limit(depth: int) -> None:
    value = b""
    for _ in range(depth):
        value = b"A" + len(value).to_bytes(4, "big") + value
    table = b"\1x" + value
    packed = properties.HEADERS.to_bytes(2, "big") + len(table).to_bytes(4, "big") + table
    headers = properties.unpack(packed, b"").headers
    assert (headers == properties.UNREADABLE) is (depth >= properties.MAX_DEPTH)


@pytest.mark.parametrize(
    "broken",
    [
        b"\0\x3c\0\x50\0\0\0\0\0\0\0\1",
        b"\0\x3c\0\x50\0\0\0\0\0\0\0\1\0\0",
    ],
)
def test_a_confirm_of_a_wrong_size_is_none(broken: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.read_tag(*payload(frames.frame(frames.METHOD, 1, broken)))


def test_what_does_not_fit_is_said_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="255"):
        frames.publish(1, "x" * 256, "key", mandatory=True)
    with pytest.raises(ValueError, match="a frame here takes 4096"):
        frames.content(1, b"\0" * FRAME_MAX, b"", frame_max=FRAME_MAX)
