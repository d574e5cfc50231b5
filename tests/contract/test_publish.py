"""A publish that returned is stored and intact; any other one says what became of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from brokertask.envelope import Headers, HeaderValue, Message
from brokertask.errors import InvalidPayload, PublishError, QueueFull, Unroutable
from brokertask.topology import QueueOptions, Route, TaskQueue
from brokertask.transport.base import Transport
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    TRIGGER,
    WORK,
    Connect,
    consume,
    ready,
    send,
    small,
    until_ready,
)

pytestmark = pytest.mark.anyio

FULL = Message(
    body=b"\x81\xa4path\xa5a.txt\x00\xff",
    message_id="01890a5d-ac96-774b-bcce-b302099a8057",
    type="a",
    content_type="application/msgpack",
    content_encoding="identity",
    app_id="documents",
    reply_to="bt.reply.c1",
    correlation_id="c-1",
    timestamp_ms=1_700_000_123_000,
    headers={
        "bt-version": 1,
        "bt-sent": 1_700_000_123_456,
        "bt-tags": ["x", "ü", ""],
        "bt-derived": True,
        "off": False,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    },
)

HEADERS: dict[str, HeaderValue] = {
    "empty text": "",
    "text with NUL and emoji": "a\0b \N{SNOWMAN} \N{PILE OF POO}",
    "long text": "x" * 10_000,
    "looks like a number": "1",
    "zero": 0,
    "minus one": -1,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "between": 3_000_000_000,
    "true": True,
    "nothing": None,
    "half": 0.5,
    "no items": [],
    "many items": ["item"] * 200,
    "bytes": b"\x00\xff",
}


async def deliver(transport: Transport, message: Message) -> Message:
    await transport.declare(small())
    await transport.publish(TRIGGER, message, timeout=SECONDS)
    delivery = await (await consume(transport)).next()
    await delivery.ack()
    return delivery.message


async def test_every_property_arrives_as_it_was_sent(transport: Transport) -> None:
    assert await deliver(transport, FULL) == FULL


async def test_a_bare_message_stays_bare(transport: Transport) -> None:
    message = await deliver(transport, Message(body=b"\xc0"))
    # A transport may give an id to a message that has none; aiormq does.
    assert replace(message, message_id=None) == Message(body=b"\xc0")


@pytest.mark.parametrize("name", HEADERS)
async def test_a_header_keeps_value_and_type(transport: Transport, name: str) -> None:
    sent = HEADERS[name]
    got = (await deliver(transport, Message(body=b"", headers={name: sent}))).headers[name]
    assert got == sent
    assert isinstance(got, bytes | bytearray if isinstance(sent, bytes) else type(sent))


async def test_the_timestamp_is_in_whole_seconds(transport: Transport) -> None:
    message = await deliver(transport, replace(FULL, timestamp_ms=1_700_000_123_999))
    assert message.timestamp_ms == 1_700_000_123_000


@pytest.mark.parametrize("size", [0, 1, 131_072, 1_048_576])
async def test_a_body_of_any_size_arrives_whole(transport: Transport, size: int) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    assert (await deliver(transport, Message(body=body))).body == body


@pytest.mark.parametrize(
    "hostile",
    [
        Message(body=b"", headers={"k": 2**64}),
        Message(body=b"", headers={"k": "\ud800"}),
        Message(body=b"", headers=cast("Headers", {"k": object()})),
        Message(body=b"", message_id="x" * 256),
        Message(body=b"", type="\N{SNOWMAN}" * 100),
    ],
    ids=["huge number", "half a surrogate", "object", "long id", "long type"],
)
async def test_what_cannot_be_written_is_refused_alone(
    transport: Transport, hostile: Message
) -> None:
    await transport.declare(small())
    with pytest.raises(InvalidPayload):
        await transport.publish(TRIGGER, hostile, timeout=SECONDS)
    await send(transport, b"next")
    assert await ready(transport) == 1


async def test_headers_of_a_received_message_mean_nothing_when_sent_again(
    transport: Transport,
) -> None:
    await transport.declare(small(TaskQueue("a"), TaskQueue("b"), rungs=(100,)))
    work = await consume(transport)
    await transport.publish(NAMES.delay_route("a", 100)[0], FULL, timeout=SECONDS)
    first = await work.next()
    copied: dict[str, Any] = {
        **first.message.headers,
        "x-delivery-count": 7,
        "CC": ["b"],
        "BCC": ["b"],
    }
    again = replace(first.message, headers=copied)
    await transport.publish(NAMES.delay_route("a", 100)[0], again, timeout=SECONDS)
    await transport.publish(TRIGGER, again, timeout=SECONDS)
    sent_again = await work.take(2)
    assert [delivery.lost for delivery in sent_again] == [0, 0]
    assert await ready(transport, NAMES.queue("b")) == 0
    straight, delayed = sorted(sent_again, key=lambda one: "x-death" in one.message.headers)
    assert straight.message.headers == FULL.headers
    deaths: Any = delayed.message.headers["x-death"]
    assert [death["count"] for death in deaths] == [1]


async def test_messages_of_one_publisher_arrive_in_order(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, *(b"%d" % number for number in range(100)))
    work = await consume(transport, prefetch=100)
    assert [one.message.body for one in await work.take(100)] == [b"%d" % n for n in range(100)]


async def test_concurrent_publishes_are_all_stored_once(transport: Transport) -> None:
    await transport.declare(small())
    await asyncio.gather(*(send(transport, b"%d" % number) for number in range(200)))
    work = await consume(transport, prefetch=200)
    bodies = [one.message.body for one in await work.take(200)]
    assert sorted(bodies, key=int) == [b"%d" % number for number in range(200)]


async def test_a_route_without_queue_is_unroutable(transport: Transport) -> None:
    await transport.declare(small())
    with pytest.raises(Unroutable, match="nobody") as caught:
        await transport.publish(NAMES.trigger_route("nobody"), FULL, timeout=SECONDS)
    assert caught.value.unknown is False
    await send(transport, b"next")
    assert await ready(transport) == 1


async def test_optional_messages_without_queue_vanish(transport: Transport) -> None:
    await transport.declare(small())
    route = NAMES.event_route("run.completed", "a", reply_to=NAMES.reply("gone"))
    await transport.publish(route, FULL, timeout=SECONDS, mandatory=False)
    await send(transport, b"next")
    assert await ready(transport) == 1


async def test_a_missing_exchange_is_unroutable_and_named(transport: Transport) -> None:
    await transport.declare(small())
    with pytest.raises(Unroutable, match="no-such-exchange"):
        await transport.publish(Route("no-such-exchange", "a"), FULL, timeout=SECONDS)
    await send(transport, b"next")
    assert await ready(transport) == 1


async def test_each_of_two_publishes_with_one_id_gets_its_own_answer(transport: Transport) -> None:
    await transport.declare(small())
    routes = [TRIGGER, NAMES.trigger_route("nobody")] * 25
    answers = await asyncio.gather(
        *(transport.publish(route, FULL, timeout=SECONDS) for route in routes),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [type(None), Unroutable] * 25
    assert await ready(transport) == 25


async def test_a_full_queue_refuses_until_it_is_read(connect: Connect) -> None:
    transport = await connect()
    intake = NAMES.intake("a")
    await transport.declare(small(TaskQueue("a", QueueOptions(max_length=3))))
    refused, accepted = await _send_until_refused(transport)
    assert refused.unknown is False
    # RabbitMQ counts a moment late, and lets some more in.
    assert 3 <= accepted < 50
    work = await consume(transport, intake, prefetch=50)
    for delivery in await work.take(accepted):
        await delivery.ack()
    await until_ready(transport, 0, intake)
    await _send_when_there_is_room(transport)
    assert (await work.next()).message.body == b"room"


async def _send_until_refused(transport: Transport) -> tuple[QueueFull, int]:
    for accepted in range(50):
        try:
            await send(transport, b"%d" % accepted)
        except QueueFull as error:
            return error, accepted
    pytest.fail("50 messages went into a queue of 3")


async def _send_when_there_is_room(transport: Transport) -> None:
    # RabbitMQ tells its publishers a moment later that there is room again.
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await send(transport, b"room")
            except QueueFull:
                await asyncio.sleep(0.01)


async def test_a_closed_transport_publishes_nothing(connect: Connect) -> None:
    closed, other = await connect(), await connect()
    await other.declare(small())
    await closed.close()
    with pytest.raises(PublishError):
        await closed.publish(TRIGGER, FULL, timeout=0.2)
    assert await ready(other, WORK) == 0
