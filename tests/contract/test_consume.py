"""Deliveries: how many at a time, who may settle them, and what becomes of the unsettled."""

from __future__ import annotations

import asyncio

import pytest

from brokertask.envelope import Message
from brokertask.errors import ConfigurationError
from brokertask.transport.base import Delivery, Depth, Transport
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    TRIGGER,
    WORK,
    Connect,
    Inbox,
    consume,
    ready,
    send,
    small,
    until_ready,
)

pytestmark = pytest.mark.anyio


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


async def test_a_first_delivery_looks_like_one(transport: Transport) -> None:
    await transport.declare(small())
    work = await consume(transport)
    await send(transport, b"1")
    delivery = await work.next()
    assert delivery.queue == WORK
    assert delivery.key == TRIGGER.key
    assert delivery.live
    assert not delivery.redelivered
    assert delivery.lost == 0
    assert "x-delivery-count" not in delivery.message.headers


async def test_prefetch_is_honoured_and_refilled_by_ack(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3", b"4", b"5")
    work = await consume(transport, prefetch=2)
    first = await work.take(2)
    await until_ready(transport, 3)
    assert len(work) == 0
    await first[1].ack()
    assert bodies([await work.next()]) == [b"3"]
    await until_ready(transport, 2)
    assert len(work) == 0


async def test_an_acked_message_is_gone(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, b"1", b"2")
    first, _ = await (await consume(one)).take(2)
    await first.ack()
    assert not first.live
    await one.close()
    again = await consume(other)
    assert bodies([await again.next()]) == [b"2"]
    assert await ready(other) == 0
    assert len(again) == 0


async def test_settling_twice_is_harmless(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2")
    work = await consume(transport, prefetch=1)
    first = await work.next()
    for _ in range(3):
        await first.ack()
        await first.requeue()
    second = await work.next()
    assert second.message.body == b"2"
    assert second.live
    await second.ack()
    await send(transport, b"3")
    assert (await work.next()).message.body == b"3"


async def test_a_requeued_message_comes_again(transport: Transport) -> None:
    await transport.declare(small())
    work = await consume(transport)
    await send(transport, b"1")
    first = await work.next()
    await first.requeue()
    assert not first.live
    again = await work.next()
    assert again.message.body == b"1"
    assert again.redelivered
    # RabbitMQ from 4.3 does not count what was given back on purpose.
    assert again.lost in (0, 1)


async def test_close_gives_back_in_order_and_counts(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, b"1", b"2", b"3", b"4")
    inbox = Inbox[Delivery]()
    consumer = await one.consume(WORK, inbox, prefetch=3)
    held = await inbox.take(3)
    await consumer.close()
    assert [delivery.live for delivery in held] == [False] * 3
    await held[0].ack()
    again = await (await consume(other)).take(4)
    assert bodies(again) == [b"1", b"2", b"3", b"4"]
    assert [one.lost for one in again] == [1, 1, 1, 0]
    assert [one.redelivered for one in again] == [True, True, True, False]
    assert again[0].message.headers["x-delivery-count"] == 1


async def test_a_closed_transport_gives_back_what_it_held(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, b"1")
    held = await (await consume(one)).next()
    work = await consume(other)
    await one.close()
    await one.close()
    assert not held.live
    assert not one.connected
    again = await work.next()
    assert (again.message.body, again.lost) == (b"1", 1)


async def test_after_stop_nothing_comes_but_all_can_be_settled(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2")
    inbox = Inbox[Delivery]()
    consumer = await transport.consume(WORK, inbox, prefetch=2)
    first, second = await inbox.take(2)
    await consumer.stop()
    await send(transport, b"3")
    await first.ack()
    assert second.live
    await until_ready(transport, 1)
    await second.requeue()
    await until_ready(transport, 2)
    assert len(inbox) == 0
    await consumer.close()
    rest = await (await consume(transport)).take(2)
    assert bodies(rest) == [b"2", b"3"]


async def test_two_consumers_share_a_queue(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    mine, theirs = await consume(one, prefetch=1), await consume(other, prefetch=1)
    await send(one, b"1", b"2")
    got = [await mine.next(), await theirs.next()]
    assert sorted(bodies(got)) == [b"1", b"2"]


async def test_receive_is_not_called_inside_publish_or_consume(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1")
    task = asyncio.current_task()
    seen: asyncio.Queue[asyncio.Task[object] | None] = asyncio.Queue()

    def receive(delivery: Delivery) -> None:
        try:
            seen.put_nowait(asyncio.current_task())
        except RuntimeError:
            seen.put_nowait(None)

    await transport.consume(WORK, receive, prefetch=5)
    await send(transport, b"2")
    async with asyncio.timeout(SECONDS):
        assert task not in [await seen.get(), await seen.get()]


async def test_what_is_received_is_nobody_elses(transport: Transport) -> None:
    await transport.declare(small())
    tags = ["x"]
    work = await consume(transport)
    await transport.publish(TRIGGER, Message(body=b"", headers={"bt-tags": tags}), timeout=SECONDS)
    tags.append("changed after sending")
    first = await work.next()
    got = first.message.headers["bt-tags"]
    assert got == ["x"]
    assert isinstance(got, list)
    got.append("changed after receiving")
    await first.requeue()
    assert (await work.next()).message.headers["bt-tags"] == ["x"]


async def test_a_missing_queue_cannot_be_consumed(transport: Transport) -> None:
    await transport.declare(small())
    with pytest.raises(ConfigurationError, match=r"bt\.q\.nobody"):
        await transport.consume(NAMES.queue("nobody"), Inbox[Delivery](), prefetch=1)
    await send(transport, b"1")
    assert (await (await consume(transport)).next()).message.body == b"1"


async def test_depth_tells_what_waits_and_who_reads(transport: Transport) -> None:
    await transport.declare(small())
    assert await transport.depth(NAMES.queue("nobody")) is None
    assert await transport.depth(WORK) == Depth(ready=0, consumers=0)
    await send(transport, b"1", b"2", b"3")
    assert await transport.depth(WORK) == Depth(ready=3, consumers=0)
    await (await consume(transport, prefetch=1)).next()
    await until_ready(transport, 2)
    assert await transport.depth(WORK) == Depth(ready=2, consumers=1)


async def test_an_open_transport_says_so(transport: Transport) -> None:
    await transport.declare(small())
    await consume(transport)
    assert transport.connected
