"""The data plane, byte by byte: what a broker may send at any moment, and what it gets back.

The broker here is a script of frames, written by pamqp; the real one is in `tests/contract` and
`tests/crash`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from brokertask.envelope import Message
from brokertask.errors import (
    BrokerBlocked,
    BrokerUnavailable,
    InvalidPayload,
    PublishUnknown,
    QueueFull,
    Unroutable,
)
from brokertask.topology import Route
from brokertask.transport.rabbitmq.acks import Acks
from brokertask.transport.rabbitmq.direct import WINDOW, DirectLane
from brokertask.transport.rabbitmq.tap import HIGH_WATER, Tap

pytestmark = pytest.mark.anyio

CHANNEL = 3
FRAME_MAX = 4_096
ROUTE = Route("bt.tasks", "a")
SECONDS = 5.0


class Socket(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


class Channel:
    """What a lane needs to know of aiormq's."""

    number = CHANNEL

    def __init__(self) -> None:
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Wire:
    """One connection with one lane, in an event loop."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.tap = Tap(self.reader, asyncio.get_running_loop())
        self.socket = Socket()
        self.tap.connection_made(self.socket)
        self.tap.frame_max = FRAME_MAX
        self.channel = Channel()
        channel = cast("AbstractChannel", self.channel)
        self.lane = DirectLane(channel, self.tap, frame_max=FRAME_MAX)

    def says(self, *frames: FrameTypes, channel: int = CHANNEL) -> None:
        """Have the broker send frames."""
        self.tap.data_received(b"".join(marshal(frame, channel) for frame in frames))

    def publish(
        self, body: bytes = b"x", *, message_id: str | None = None, timeout: float = SECONDS
    ) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        return loop.create_task(
            self.lane.publish(
                ROUTE,
                Message(body=body, message_id=message_id),
                timeout=timeout,
                deadline=loop.time() + timeout,
                mandatory=True,
            )
        )

    async def sent(self) -> list[FrameTypes]:
        """Return the frames that were written since the last call, after some turns."""
        for _ in range(5):
            await asyncio.sleep(0)
        data, self.socket.writes = b"".join(self.socket.writes), []
        return list(parsed(data))

    async def heard(self) -> bytes:
        """Return what was left to aiormq since the last call."""
        self.reader.feed_data(b"|")
        return (await self.reader.read(1_000_000))[:-1]


def parsed(data: bytes) -> Iterator[FrameTypes]:
    while data:
        size, _, frame = unmarshal(data)
        yield frame
        data = data[size:]


def content(body: bytes, message_id: str = "id", piece: int = 1_000) -> list[FrameTypes]:
    header = ContentHeader(
        body_size=len(body), properties=commands.Basic.Properties(message_id=message_id)
    )
    parts = [body[at : at + piece] for at in range(0, len(body), piece)]
    return [header, *(ContentBody(part) for part in parts)]


def deliver(consumer: str, tag: int, body: bytes, *, redelivered: bool = False) -> list[FrameTypes]:
    method = commands.Basic.Deliver(consumer, tag, redelivered, "bt.tasks", "a")
    return [method, *content(body)]


def returned(message_id: str) -> list[FrameTypes]:
    return [commands.Basic.Return(312, "NO_ROUTE", "bt.tasks", "a"), *content(b"x", message_id)]


def bodies(frames: list[FrameTypes]) -> list[bytes]:
    return [frame.value for frame in frames if isinstance(frame, ContentBody)]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner() as runner:
        runner.run(main())


# --- the stream -----------------------------------------------------------------------------------


async def consuming(wire: Wire) -> tuple[str, list[tuple[bytes, int, bool]]]:
    got: list[tuple[bytes, int, bool]] = []

    def receive(message: Message, key: str, tag: int, redelivered: bool) -> None:
        got.append((message.body, tag, redelivered))

    consumer = await wire.lane.consume("bt.q.a", receive, no_ack=False, wait=False)
    await wire.sent()
    return consumer, got


STREAM: list[tuple[int, list[FrameTypes]]] = [
    (0, [Heartbeat()]),
    (CHANNEL, deliver("bt.3.1", 1, b"one")),
    (1, deliver("other", 1, b"of a channel without a lane")),
    (CHANNEL, deliver("bt.3.1", 2, b"", redelivered=True)),
    (CHANNEL, [commands.Basic.QosOk()]),
    (CHANNEL, deliver("bt.3.1", 3, b"in pieces" * 30)),
    (0, [commands.Connection.Blocked("memory"), commands.Connection.Unblocked()]),
    (CHANNEL, deliver("nobody", 4, b"for a consumer that is gone")),
    (CHANNEL, deliver("bt.3.1", 5, b"last")),
]


def data_of(stream: list[tuple[int, list[FrameTypes]]]) -> bytes:
    return b"".join(marshal(frame, channel) for channel, frames in stream for frame in frames)


async def read_in_pieces(pieces: list[bytes]) -> tuple[list[tuple[bytes, int, bool]], bytes]:
    wire = Wire()
    _, got = await consuming(wire)
    for piece in pieces:
        wire.tap.data_received(piece)
    heard = (await wire.heard()).replace(marshal(Heartbeat(), 0), b"")
    assert not wire.socket.aborted
    return got, heard


def test_a_stream_cut_at_any_byte_is_the_same_stream() -> None:
    data = data_of(STREAM)

    async def main() -> None:
        whole = await read_in_pieces([data])
        assert [tag for _, tag, _ in whole[0]] == [1, 2, 3, 5]
        assert whole[0][1] == (b"", 2, True)
        assert whole[0][2][0] == b"in pieces" * 30
        others = [part for part in STREAM if part[0] != CHANNEL]
        assert len(whole[1]) == len(data_of(others)) + len(marshal(commands.Basic.QosOk(), 3)) - 8
        for at in range(len(data)):
            assert await read_in_pieces([data[:at], data[at:]]) == whole
        assert await read_in_pieces([bytes([byte]) for byte in data]) == whole

    run(main)


@given(st.lists(st.tuples(st.binary(max_size=9_000), st.booleans()), max_size=8), st.randoms())
def test_any_messages_in_any_pieces(
    messages: list[tuple[bytes, bool]], chance: random.Random
) -> None:
    async def main() -> None:
        data = b"".join(
            marshal(frame, CHANNEL)
            for tag, (body, redelivered) in enumerate(messages, 1)
            for frame in deliver("bt.3.1", tag, body, redelivered=redelivered)
        )
        pieces = []
        while data:
            size = chance.choice([1, 7, 8, 30, 1_000, 20_000])
            pieces.append(data[:size])
            data = data[size:]
        got, _ = await read_in_pieces(pieces)
        assert got == [(body, tag, again) for tag, (body, again) in enumerate(messages, 1)]

    run(main)


async def test_aiormq_hears_that_the_broker_lives_while_only_messages_come() -> None:
    wire = Wire()
    consumer, got = await consuming(wire)
    await wire.heard()
    wire.says(*deliver(consumer, 1, b"x"))
    assert len(got) == 1
    assert await wire.heard() == marshal(Heartbeat(), 0)


def frame(kind: int, size: int, payload: bytes, end: bytes = b"\xce") -> bytes:
    return bytes([kind, 0, CHANNEL]) + size.to_bytes(4, "big") + payload + end


HOSTILE = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another version": b"AMQP\x00\x00\x09\x01",
    "a frame without end": frame(1, 4, b"\0\x3c\0\x50", b"\x00"),
    "a frame larger than agreed": frame(3, 0xFFFF_FFFF, b""),
    "content without a message": frame(3, 1, b"x"),
    "half a confirm": frame(1, 4, b"\0\x3c\0\x50"),
    "half a delivery": frame(1, 4, b"\0\x3c\0\x3c"),
    "a delivery that says too little": frame(1, 8, b"\0\x3c\0\x3c\x01a\0\0"),
    "an empty method": frame(2, 0, b""),
    "half a header": marshal(commands.Basic.Deliver("c", 1, False, "", ""), 3) + frame(2, 2, b"ab"),
    "two deliveries at once": marshal(commands.Basic.Deliver("c", 1, False, "", ""), CHANNEL) * 2,
    "a body before its header": marshal(commands.Basic.Deliver("c", 1, False, "", ""), CHANNEL)
    + frame(3, 1, b"x"),
    "a body longer than it says": b"".join(
        marshal(part, CHANNEL)
        for part in (
            commands.Basic.Deliver("c", 1, False, "", ""),
            ContentHeader(body_size=1),
            ContentBody(b"xyz"),
        )
    ),
    "a body without end": b"".join(
        marshal(part, CHANNEL)
        for part in (
            commands.Basic.Deliver("c", 1, False, "", ""),
            ContentHeader(body_size=2**60),
        )
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_no_amqp_ends_the_connection(name: str) -> None:
    wire = Wire()
    publishing = wire.publish()
    await wire.sent()
    wire.tap.data_received(HOSTILE[name])
    assert wire.socket.aborted
    with pytest.raises(ConnectionError):
        await wire.reader.read(1)
    wire.tap.data_received(b"more of it")
    wire.tap.connection_lost(None)
    with pytest.raises(PublishUnknown):
        await publishing


@given(st.lists(st.binary(max_size=300), max_size=6), st.randoms())
def test_any_bytes_end_the_connection_or_mean_something(
    noise: list[bytes], chance: random.Random
) -> None:
    """Sound frames with damage anywhere: nothing is raised, and nothing hangs."""

    async def main() -> None:
        wire = Wire()
        await consuming(wire)
        publishing = wire.publish()
        await wire.sent()
        sound = bytearray(data_of(STREAM) + data_of([(CHANNEL, [commands.Basic.Ack(1)])]))
        for piece in noise:
            at = chance.randrange(len(sound))
            sound[at : at + chance.randrange(2) * len(piece)] = piece
        wire.tap.data_received(bytes(sound))
        wire.tap.data_received(marshal(Heartbeat(), 0))
        wire.tap.connection_lost(None)
        await asyncio.gather(publishing, return_exceptions=True)

    run(main)


# --- acks -----------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.randoms())
def test_a_range_of_acks_never_runs_ahead(count: int, chance: random.Random) -> None:
    acks, unacked, settled = Acks(), set(range(1, count + 1)), set[int]()

    def tell() -> None:
        last, single = acks.take()
        # The broker closes the channel for a tag that it does not wait for.
        assert not last or last in unacked
        assert all(tag in settled for tag in unacked if tag <= last)
        unacked.difference_update(range(last + 1))
        assert unacked.issuperset(single)
        assert settled.issuperset(single)
        unacked.difference_update(single)

    order = list(range(1, count + 1))
    chance.shuffle(order)
    for tag in order:
        if chance.random() < 0.1:
            unacked.remove(tag)
            acks.skip(tag)
        else:
            settled.add(tag)
            acks.add(tag)
        if chance.random() < 0.3:
            tell()
            assert not settled & unacked
    tell()
    assert not unacked


async def test_acks_of_one_turn_leave_as_one_range() -> None:
    wire = Wire()
    for tag in (3, 1, 5, 2):
        await wire.lane.ack(tag)
    assert not wire.socket.writes
    assert [told(each) for each in await wire.sent()] == [(3, True), (5, False)]
    await wire.lane.reject(4)
    await wire.lane.ack(6)
    first, second = await wire.sent()
    assert isinstance(first, commands.Basic.Reject)
    assert (first.delivery_tag, told(second)) == (4, (6, True))


def told(settled: FrameTypes) -> tuple[int | None, bool]:
    assert isinstance(settled, commands.Basic.Ack)
    return settled.delivery_tag, bool(settled.multiple)


async def test_what_is_settled_before_the_end_is_told() -> None:
    wire = Wire()
    await wire.lane.ack(1)
    wire.lane.end()
    await wire.lane.ack(2)
    await wire.lane.reject(3)
    assert [told(each) for each in await wire.sent()] == [(1, True)]


async def test_a_consumer_is_cancelled_before_what_it_held_is_settled() -> None:
    wire = Wire()
    consumer, _ = await consuming(wire)
    await wire.lane.cancel(consumer, wait=False)
    await wire.lane.ack(1)
    assert [type(each) for each in await wire.sent()] == [commands.Basic.Cancel, commands.Basic.Ack]


# --- publishing -----------------------------------------------------------------------------------


async def test_confirms_find_their_publishes() -> None:
    wire = Wire()
    publishing = [wire.publish(b"%d" % number) for number in range(6)]
    assert bodies(await wire.sent()) == [b"0", b"1", b"2", b"3", b"4", b"5"]
    wire.says(commands.Basic.Ack(2), commands.Basic.Nack(4), commands.Basic.Ack(99))
    wire.says(commands.Basic.Ack(5, multiple=True), commands.Basic.Ack(1))
    done, pending = await asyncio.wait(publishing, timeout=0)
    assert pending == {publishing[5]}
    for number in (0, 1, 2, 4):
        await publishing[number]
    with pytest.raises(QueueFull):
        await publishing[3]
    wire.says(commands.Basic.Nack(0x7FFF, multiple=True))
    with pytest.raises(QueueFull):
        await publishing[5]
    assert len(done) == 5


async def test_a_returned_message_fails_its_own_publish() -> None:
    wire = Wire()
    publishing = [wire.publish(message_id=name) for name in ("a", "b", "c")]
    await wire.sent()
    wire.says(*returned("b"), *returned("unknown"), commands.Basic.Ack(3, multiple=True))
    await publishing[0]
    with pytest.raises(Unroutable, match="'a' from exchange 'bt\\.tasks'"):
        await publishing[1]
    await publishing[2]


async def test_of_one_id_there_is_one_on_its_way() -> None:
    wire = Wire()
    publishing = [wire.publish(b"%d" % number, message_id="same") for number in range(3)]
    assert bodies(await wire.sent()) == [b"0"]
    wire.says(*returned("same"))
    assert bodies(await wire.sent()) == [b"1"]
    wire.says(commands.Basic.Ack(1), commands.Basic.Ack(2))
    assert bodies(await wire.sent()) == [b"2"]
    wire.says(commands.Basic.Ack(3))
    fates = await asyncio.gather(*publishing, return_exceptions=True)
    assert [type(fate) for fate in fates] == [Unroutable, type(None), type(None)]


async def test_each_publish_has_its_own_time_out() -> None:
    wire = Wire()
    slow, quick = wire.publish(timeout=60), wire.publish(timeout=0.01)
    with pytest.raises(PublishUnknown, match=r"within 0\.01 s") as caught:
        await quick
    assert caught.value.unknown
    assert not slow.done()
    # The answer comes in the end, for nobody.
    wire.says(commands.Basic.Ack(2), commands.Basic.Ack(1))
    await slow


async def test_under_an_alarm_nothing_is_sent_and_the_error_says_so() -> None:
    wire = Wire()
    before = wire.publish(timeout=0.02)
    await wire.sent()
    wire.says(commands.Connection.Blocked("memory"), channel=0)
    with pytest.raises(BrokerBlocked) as caught:
        await wire.publish(timeout=0.01)
    assert not caught.value.unknown
    with pytest.raises(BrokerBlocked) as caught:
        await before
    assert caught.value.unknown
    later = wire.publish(b"later")
    assert await wire.sent() == []
    wire.says(commands.Connection.Unblocked(), channel=0)
    assert bodies(await wire.sent()) == [b"later"]
    wire.says(commands.Basic.Ack(2))
    await later


async def test_no_more_than_a_window_is_on_its_way() -> None:
    wire = Wire()
    publishing = [wire.publish(b"%d" % number) for number in range(3 * WINDOW)]
    numbers = [int(body) for body in bodies(await wire.sent())]
    assert numbers == list(range(WINDOW))
    with pytest.raises(BrokerUnavailable, match="nothing was sent"):
        await wire.publish(timeout=0.01)
    wire.says(commands.Basic.Ack(10, multiple=True))
    assert len(bodies(await wire.sent())) == 10
    publishing[20].cancel()  # It stays in the window until it is confirmed: it is on its way.
    publishing[2 * WINDOW].cancel()  # This one is not.
    for answered in range(20, 3 * WINDOW + 1, 10):
        wire.says(commands.Basic.Ack(min(answered, 3 * WINDOW - 1), multiple=True))
        numbers += [int(body) for body in bodies(await wire.sent())]
    fates = await asyncio.gather(*publishing, return_exceptions=True)
    assert sum(isinstance(fate, asyncio.CancelledError) for fate in fates) == 2
    assert len([fate for fate in fates if fate is None]) == 3 * WINDOW - 2


async def test_a_publisher_waits_for_a_socket_that_takes_no_more() -> None:
    wire = Wire()
    wire.tap.pause_writing()
    waiting = wire.publish(b"later")
    assert await wire.sent() == []
    with pytest.raises(BrokerUnavailable, match="nothing was sent"):
        await wire.publish(timeout=0.01)
    await wire.lane.ack(1)
    assert [told(each) for each in await wire.sent()] == [(1, True)]
    wire.tap.resume_writing()
    assert bodies(await wire.sent()) == [b"later"]
    wire.says(commands.Basic.Ack(1))
    await waiting


async def test_large_messages_leave_a_few_at_a_time() -> None:
    wire = Wire()
    half = b"x" * (HIGH_WATER // 2)
    publishing = [wire.publish(half) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert max(map(len, wire.socket.writes)) < 2 * HIGH_WATER
    sizes = []
    for _ in range(10):
        sizes += [len(body) for body in bodies(await wire.sent())]
    assert sum(sizes) == 10 * len(half)
    assert max(sizes) == FRAME_MAX - 8
    wire.says(commands.Basic.Ack(10, multiple=True))
    await asyncio.gather(*publishing)


async def test_a_broker_that_stops_the_flow_is_obeyed() -> None:
    wire = Wire()
    wire.says(commands.Channel.Flow(active=False))
    waiting = wire.publish(b"later")
    assert [type(each) for each in await wire.sent()] == [commands.Channel.FlowOk]
    wire.says(commands.Channel.Flow(active=True))
    assert bodies(await wire.sent()) == [b"later"]
    wire.says(commands.Basic.Ack(1))
    await waiting


async def test_what_cannot_be_written_takes_no_number() -> None:
    wire = Wire()
    with pytest.raises(InvalidPayload):
        await wire.publish(message_id="x" * 256)
    message = Message(body=b"", headers={"large": "x" * FRAME_MAX})
    with pytest.raises(InvalidPayload, match="a frame here takes"):
        await wire.lane.publish(ROUTE, message, timeout=1, deadline=1e12, mandatory=True)
    next_one = wire.publish()
    await wire.sent()
    wire.says(commands.Basic.Ack(1))
    await next_one


# --- the end --------------------------------------------------------------------------------------


async def test_nothing_is_written_on_a_channel_that_the_broker_closed() -> None:
    wire = Wire()
    publishing = wire.publish()
    await wire.sent()
    await wire.heard()
    why = "NOT_FOUND - no exchange 'bt.tasks' in vhost '/'"
    closing = commands.Channel.Close(reply_code=404, reply_text=why, class_id=60, method_id=40)
    wire.says(closing)
    # aiormq answers it; one more frame of ours after that would cost the connection.
    assert marshal(closing, CHANNEL) in await wire.heard()
    await wire.lane.ack(1)
    with pytest.raises(BrokerUnavailable):
        await wire.publish()
    assert await wire.sent() == []
    wire.channel.closing.set_exception(ChannelNotFoundEntity(why))
    with pytest.raises(Unroutable, match=r"exchange 'bt\.tasks' does not exist"):
        await publishing


async def test_what_is_on_its_way_to_a_lane_that_ends_is_still_understood() -> None:
    wire = Wire()
    consumer, got = await consuming(wire)
    publishing = [wire.publish(message_id=name) for name in ("stored", "unroutable")]
    await wire.sent()
    first, *rest = deliver(consumer, 1, b"too late")
    wire.says(first)
    wire.lane.end()
    wire.says(*rest, *returned("unroutable"), commands.Basic.Ack(2, multiple=True))
    assert not got
    assert not wire.socket.aborted
    await publishing[0]
    with pytest.raises(Unroutable):
        await publishing[1]


async def test_a_lost_connection_ends_whoever_waits() -> None:
    wire = Wire()
    on_their_way = [wire.publish() for _ in range(WINDOW)]
    await wire.sent()
    waiting = [wire.publish() for _ in range(3)]
    await wire.sent()
    wire.tap.connection_lost(ConnectionResetError("reset by peer"))
    for publish in on_their_way:
        with pytest.raises(PublishUnknown, match="reset by peer"):
            await publish
    for publish in waiting:
        with pytest.raises(BrokerUnavailable, match="nothing was sent"):
            await publish
    assert wire.lane.ended


async def test_a_lane_on_the_same_number_is_another_lane() -> None:
    wire = Wire()
    consumer, old = await consuming(wire)
    wire.says(commands.Basic.Deliver(consumer, 1, False, "", ""))
    wire.says(commands.Channel.CloseOk())
    again = Channel()
    lane = DirectLane(cast("AbstractChannel", again), wire.tap, frame_max=FRAME_MAX)
    new: list[int] = []
    await lane.consume("bt.q.a", lambda _, __, tag, ___: new.append(tag), no_ack=False, wait=False)
    wire.channel.closing.set_result(None)  # aiormq is late.
    await wire.sent()
    wire.says(*deliver(consumer, 1, b"x"))
    assert (old, new) == ([], [1])
