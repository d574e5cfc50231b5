"""How many deliveries a consumer takes, changed while it holds some."""

from __future__ import annotations

import asyncio
import random

import pytest

from brokertask.envelope import Message
from brokertask.transport.base import Consumer, Delivery, Depth, Transport
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    WORK,
    Connect,
    Cut,
    Inbox,
    consume,
    own_queue,
    ready,
    send,
    small,
    subscribe,
    until,
    until_depth,
    until_ready,
)

pytestmark = pytest.mark.anyio


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


async def handed_out(consumer: Consumer, transport: Transport, count: int) -> list[bytes]:
    """Close a consumer, and return which of `count` messages somebody had been given."""
    await consumer.close()
    rest = await (await consume(transport, prefetch=count)).take(count)
    return sorted(delivery.message.body for delivery in rest if delivery.lost)


async def test_a_limit_counts_what_comes_from_now_on(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3", b"4", b"5")
    consumer, work = await subscribe(transport, prefetch=1)
    held = [await work.next()]
    await consumer.limit(3)
    held += await work.take(3)
    await until_ready(transport, 1)
    assert all(delivery.live for delivery in held)
    assert await handed_out(consumer, transport, 5) == [b"1", b"2", b"3", b"4"]


async def test_what_was_held_before_frees_no_room(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3", b"4", b"5", b"6")
    consumer, work = await subscribe(transport, prefetch=2)
    first, second = await work.take(2)
    await consumer.limit(1)
    third = await work.next()
    await first.ack()
    await second.requeue()
    await third.ack()
    # Given back, the second one is the next in its queue again.
    assert bodies([await work.next()]) == [b"2"]
    assert await handed_out(consumer, transport, 4) == [b"2"]


async def test_the_same_limit_again_counts_anew(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3", b"4")
    consumer, work = await subscribe(transport, prefetch=1)
    await work.next()
    for body in (b"2", b"3"):
        await consumer.limit(1)
        assert bodies([await work.next()]) == [body]
    assert await handed_out(consumer, transport, 4) == [b"1", b"2", b"3"]


async def test_the_same_limit_before_anything_came_adds_no_room(transport: Transport) -> None:
    await transport.declare(small())
    consumer, work = await subscribe(transport, prefetch=2)
    for _ in range(3):
        await consumer.limit(2)
    await send(transport, b"1", b"2", b"3")
    await work.take(2)
    assert await handed_out(consumer, transport, 3) == [b"1", b"2"]


async def test_a_paused_consumer_takes_nothing_and_settles(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3")
    consumer, work = await subscribe(transport, prefetch=2)
    first, second = await work.take(2)
    await consumer.limit(0)
    await consumer.limit(-1)
    await first.ack()
    assert transport.connected
    assert second.live
    await until_ready(transport, 1)
    await second.requeue()
    await until_ready(transport, 2)
    await until_depth(transport, Depth(ready=2, consumers=0))
    assert len(work) == 0
    await consumer.limit(1)
    assert bodies([await work.next()]) == [b"2"]
    assert await transport.depth(WORK) == Depth(ready=1, consumers=1)


async def test_a_limit_can_be_lowered(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1")
    consumer, work = await subscribe(transport, prefetch=50)
    await work.next()
    await consumer.limit(2)
    await send(transport, b"2", b"3", b"4")
    await work.take(2)
    assert await handed_out(consumer, transport, 4) == [b"1", b"2", b"3"]


async def test_without_a_limit_everything_comes(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, *(b"%d" % number for number in range(300)))
    consumer, work = await subscribe(transport, prefetch=0)
    assert len(await work.take(300)) == 300
    await consumer.limit(1)
    await send(transport, b"300", b"301")
    assert bodies([await work.next()]) == [b"300"]
    await until_ready(transport, 1)


async def test_of_concurrent_limits_the_last_one_wins(transport: Transport) -> None:
    await transport.declare(small())
    consumer, work = await subscribe(transport, prefetch=5)
    await asyncio.gather(*(consumer.limit(limit) for limit in (4, 0, 3, 0, 2)))
    await send(transport, *(b"%d" % number for number in range(6)))
    await work.take(2)
    assert await handed_out(consumer, transport, 6) == [b"0", b"1"]


async def test_a_limit_that_nobody_waits_for_any_more_loses_nothing(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2", b"3")
    consumer, work = await subscribe(transport, prefetch=1)
    held = await work.next()
    limiting = asyncio.create_task(consumer.limit(1))
    await asyncio.sleep(0)
    limiting.cancel()
    await asyncio.gather(limiting, return_exceptions=True)
    assert bodies([await work.next()]) == [b"2"]
    assert held.live
    assert await handed_out(consumer, transport, 3) == [b"1", b"2"]


async def test_after_stop_a_limit_does_nothing(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2")
    consumer, work = await subscribe(transport, prefetch=1)
    held = await work.next()
    await consumer.stop()
    await consumer.limit(5)
    assert await ready(transport) == 1
    assert held.live
    assert await handed_out(consumer, transport, 2) == [b"1"]


async def test_a_stop_in_the_middle_of_a_limit_holds(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"1", b"2")
    consumer, work = await subscribe(transport, prefetch=1)
    held = await work.next()
    await asyncio.gather(consumer.limit(0), consumer.stop(), consumer.limit(5))
    assert await ready(transport) == 1
    await held.ack()
    await until_ready(transport, 1)
    await until_depth(transport, Depth(ready=1, consumers=0))


async def test_what_is_settled_before_its_slot_is_free_makes_no_room(transport: Transport) -> None:
    slots, count, chance = 3, 300, random.Random(1)
    await transport.declare(small())
    consumer, work = await subscribe(transport, prefetch=1)
    await consumer.limit(slots)
    await send(transport, *(b"%d" % number for number in range(count)))
    came: list[Delivery] = []
    busy = 0
    while len(came) < count:
        assert busy + len(work) <= slots
        came.append(await work.next())
        busy += 1
        # What waits in `work` is in a slot, too.
        await consumer.limit(slots - busy - len(work))
        await came[-1].ack()
        while busy == slots or (busy and chance.random() < 0.5):
            busy -= 1
            await consumer.limit(slots - busy - len(work))
    assert bodies(came) == [b"%d" % number for number in range(count)]
    # Nobody counts as lost what was never handed out.
    assert {delivery.lost for delivery in came} == {0}


async def test_a_consumer_resumes_with_the_prefetch_it_was_made_with(
    connect: Connect, cut: Cut
) -> None:
    """What it held comes again, and has to find room."""
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, b"1", b"2", b"3", b"4", b"5")
    consumer, work = await subscribe(one, prefetch=2)
    held = await work.take(2)
    await consumer.limit(0)
    await cut()
    await until(lambda: not any(delivery.live for delivery in held))
    again = await work.take(2)
    assert {delivery.lost for delivery in again} == {1}
    await until_ready(other, 3)


async def test_a_limit_while_the_connection_is_lost_is_kept(connect: Connect, cut: Cut) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, *(b"%d" % number for number in range(9)))
    consumer, work = await subscribe(one, prefetch=1)
    held = await work.next()
    cutting = asyncio.create_task(cut())
    while held.live:
        await consumer.limit(0)
        await asyncio.sleep(0.001)
    await consumer.limit(3)
    await cutting
    assert bodies(await work.take(3)) == [b"0", b"1", b"2"]
    # The embedded broker resumes at once, with the prefetch of 1, before the limit is set.
    assert len(await handed_out(consumer, other, 9)) in (3, 4)


async def test_a_listener_has_no_limit(connect: Connect) -> None:
    listening, publishing = await connect(), await connect()
    await publishing.declare(small())
    reply = NAMES.reply("c1")
    heard = Inbox[Message]()
    listener = await listening.listen(*own_queue(reply, reply), heard)
    await listener.limit(0)
    route = NAMES.event_route("run.completed", "a", reply_to=reply)
    for number in range(3):
        await publishing.publish(route, Message(body=b"%d" % number), timeout=SECONDS)
    assert [message.body for message in await heard.take(3)] == [b"0", b"1", b"2"]
