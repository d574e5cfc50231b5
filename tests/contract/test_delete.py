"""Queues that go: deleted on purpose, behind a consumer's back, or unused for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from brokertask.envelope import Message
from brokertask.errors import AccessDenied, BrokerUnavailable, QueueFull, Unroutable
from brokertask.topology import Argument, Binding, Exchange, Queue, Route, TaskQueue, Topology
from brokertask.transport.base import Depth, Transport
from brokertask.transport.rabbitmq import RabbitTransport
from infra.rabbitmq.node import Node
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    TRIGGER,
    WORK,
    Connect,
    consume,
    ready,
    send,
    send_when_routed,
    small,
    subscribe,
)

pytestmark = pytest.mark.anyio

OTHER, OTHER_TRIGGER = NAMES.queue("b"), NAMES.trigger_route("b")
SHORT_MS, LONG_MS = 300, 1000
"""Leases of queues. A queue with the long one has several of the short ones to be used in."""


async def test_a_deleted_queue_is_gone_with_what_it_holds(transport: Transport) -> None:
    await transport.declare(small(TaskQueue("a"), TaskQueue("b")))
    await send(transport, b"1", b"2")
    await transport.delete(WORK)
    assert await transport.depth(WORK) is None
    assert await transport.depth(OTHER) is not None
    with pytest.raises(Unroutable):
        await send(transport, b"3")
    await transport.declare(small())
    assert await ready(transport) == 0


async def test_deleting_what_does_not_exist_does_nothing(transport: Transport) -> None:
    await transport.delete("nobody")
    await transport.declare(small())
    await transport.delete(WORK)
    await transport.delete(WORK)
    assert await transport.depth(WORK) is None


async def test_a_closed_transport_deletes_nothing(connect: Connect) -> None:
    closed, other = await connect(), await connect()
    await other.declare(small())
    await closed.close()
    with pytest.raises(BrokerUnavailable):
        await closed.delete(WORK)
    assert await ready(other) == 0


async def test_what_was_delivered_from_a_deleted_queue_does_not_come_back(
    connect: Connect,
) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    await send(one, b"1")
    consumer, work = await subscribe(one)
    held = await work.next()
    await other.delete(WORK)
    await held.ack()
    await send_when_routed(other, TRIGGER, b"2")
    again = await work.next()
    assert (again.message.body, again.lost) == (b"2", 0)
    await again.ack()
    await consumer.close()
    assert await ready(other) == 0


async def test_a_consumer_resumes_on_the_queue_it_had_declared_first(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small(TaskQueue("a")))
    await one.declare(small(TaskQueue("b")))
    work = await consume(one)
    await other.delete(WORK)
    await send_when_routed(other, TRIGGER, b"1")
    assert (await work.next()).message.body == b"1"


async def test_a_queue_deleted_on_purpose_is_not_restored(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small(TaskQueue("a"), TaskQueue("b")))
    work = await consume(one, OTHER)
    await one.delete(WORK)
    await other.delete(OTHER)
    await send_when_routed(other, OTHER_TRIGGER, b"1")
    assert (await work.next()).message.body == b"1"
    assert await other.depth(WORK) is None


async def test_a_paused_consumer_resumes_on_a_queue_made_anew(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(small())
    consumer, work = await subscribe(one)
    await consumer.limit(0)
    await other.delete(WORK)
    assert await other.depth(WORK) is None
    await consumer.limit(1)
    await send_when_routed(other, TRIGGER, b"1")
    assert (await work.next()).message.body == b"1"


def expiring(name: str, lease_ms: int = SHORT_MS) -> Topology:
    """Return a queue that goes when nobody has read it for so long, bound by its name."""
    arguments: dict[str, Argument] = {"x-queue-type": "classic", "x-expires": lease_ms}
    leased = Exchange("leased", "direct")
    return Topology((leased,), (Queue(name, arguments),), (Binding("leased", name, name),))


async def put(transport: Transport, queue: str) -> bool:
    """Publish to an expiring queue; False: there is none."""
    try:
        await transport.publish(Route("leased", queue), Message(body=b"1"), timeout=SECONDS)
    except Unroutable:
        return False
    except QueueFull:
        # RabbitMQ 4.3 refuses what comes while the queue is just going.
        return True
    return True


async def until_gone(
    transport: Transport, queue: str, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Return once a queue takes nothing more. To ask for its depth would be to use it."""
    async with asyncio.timeout(SECONDS):
        while await put(transport, queue):
            if meanwhile is not None:
                await meanwhile()
    assert await transport.depth(queue) is None


async def test_an_unread_queue_expires_with_what_it_holds(transport: Transport) -> None:
    await transport.declare(expiring("unread"))
    await until_gone(transport, "unread")
    await transport.declare(expiring("unread"))
    assert await ready(transport, "unread") == 0


async def test_a_queue_that_is_read_stays(transport: Transport) -> None:
    await transport.declare(expiring("read", LONG_MS))
    consumer, work = await subscribe(transport, "read", prefetch=1)
    assert await put(transport, "read")
    held = await work.next()
    for _ in range(LONG_MS // SHORT_MS + 1):
        await transport.declare(expiring("unread"))
        await until_gone(transport, "unread")
    assert held.live
    assert await transport.depth("read") == Depth(ready=0, consumers=1)
    await consumer.close()
    await until_gone(transport, "read")


async def test_a_paused_consumer_keeps_no_queue(transport: Transport) -> None:
    await transport.declare(expiring("paused", LONG_MS))
    consumer, _ = await subscribe(transport, "paused", prefetch=1)
    await consumer.limit(0)
    await until_gone(transport, "paused")


async def test_to_be_declared_anew_is_to_be_used(transport: Transport) -> None:
    renewed = expiring("renewed", LONG_MS)
    await transport.declare(renewed)
    assert await put(transport, "renewed")
    for _ in range(LONG_MS // SHORT_MS + 1):
        await transport.declare(expiring("unread"))
        await until_gone(transport, "unread", lambda: transport.declare(renewed))
    # Made anew, it would be empty.
    assert await ready(transport, "renewed") == 1


async def test_one_who_may_not_delete_is_told(rabbitmq_node: Node, amqp_url: str) -> None:
    vhost, owner = amqp_url.rsplit("/", 1)[1], RabbitTransport(amqp_url)
    guest = RabbitTransport(amqp_url.replace("guest:guest", "reader:reader"))
    rabbitmq_node.api("PUT", "/api/users/reader", {"password": "reader", "tags": ""})
    allowed = {"configure": "", "write": ".*", "read": ".*"}
    rabbitmq_node.api("PUT", f"/api/permissions/{vhost}/reader", allowed)
    try:
        await owner.open(timeout=SECONDS)
        await owner.declare(small())
        await guest.open(timeout=SECONDS)
        with pytest.raises(AccessDenied, match=r"bt\.q\.a"):
            await guest.delete(WORK)
        assert await ready(owner) == 0
    finally:
        await guest.close()
        await owner.close()
        rabbitmq_node.api("DELETE", "/api/users/reader")
