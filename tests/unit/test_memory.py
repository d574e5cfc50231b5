"""The embedded broker: faults, virtual time, and what only it can show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TypeAlias

import pytest
from anyio.from_thread import start_blocking_portal

from brokertask.clock import VirtualClock
from brokertask.envelope import Message
from brokertask.errors import (
    BrokerBlocked,
    BrokerUnavailable,
    ConfigurationError,
    QueueFull,
    TopologyMismatch,
    Unroutable,
)
from brokertask.topology import (
    Binding,
    Exchange,
    Names,
    Queue,
    QueueOptions,
    Route,
    TaskQueue,
    Topology,
    topology,
)
from brokertask.transport.base import Delivery, Depth, Transport
from brokertask.transport.memory import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.anyio

Work: TypeAlias = Callable[[], Awaitable[object]]
Abroad: TypeAlias = Callable[[Work], Awaitable[object]]

NAMES = Names()
WORK, DEAD = NAMES.queue("a"), NAMES.dead_queue("a")
TRIGGER = NAMES.trigger_route("a")
HOUR_MS = 3_600_000
SOON = 0.02
"""A time-out that is meant to run out."""


class World:
    """A broker on virtual time, one connection, and what it received."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.broker = MemoryBroker(self.clock)
        self.transport = MemoryTransport(self.broker)
        self.received: list[Delivery] = []

    async def settle_down(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def send(self, *bodies: bytes, route: Route = TRIGGER) -> None:
        for body in bodies:
            await self.transport.publish(route, Message(body=body), timeout=SOON)

    async def pass_time(self, milliseconds: int) -> None:
        self.clock.advance_to(self.clock.now_ms() + milliseconds)
        await self.settle_down()

    def waiting(self, queue: str) -> list[bytes]:
        return [message.body for message in self.broker.messages(queue)]

    def live(self) -> list[tuple[bytes, int]]:
        return [(one.message.body, one.lost) for one in self.received if one.live]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.transport.open(timeout=SOON)
    await world.transport.declare(topology(NAMES, [TaskQueue("a")]))
    yield world
    await world.transport.close()
    world.broker.close()


async def test_it_is_a_transport(world: World) -> None:
    assert isinstance(world.transport, Transport)


async def test_an_hour_passes_at_once(world: World) -> None:
    route, left = NAMES.delay_route("a", HOUR_MS)
    rung = HOUR_MS - left
    await world.send(b"1", route=route)
    await world.transport.consume(WORK, world.received.append, prefetch=1)
    await world.pass_time(rung - 1)
    assert world.received == []
    await world.pass_time(1)
    assert world.live() == [(b"1", 0)]


async def test_each_message_expires_at_its_own_time(world: World) -> None:
    route, _ = NAMES.delay_route("a", 1000)
    await world.send(b"1", route=route)
    await world.pass_time(400)
    await world.send(b"2", route=route)
    await world.pass_time(600)
    assert world.waiting(WORK) == [b"1"]
    await world.pass_time(400)
    assert world.waiting(WORK) == [b"1", b"2"]
    assert world.clock.next_ms() is None


async def test_a_held_message_expires_when_it_comes_back(world: World) -> None:
    rung = NAMES.rung(1000)
    consumer = await world.transport.consume(rung, world.received.append, prefetch=1)
    await world.send(b"1", route=NAMES.delay_route("a", 1000)[0])
    await world.pass_time(HOUR_MS)
    assert world.live() == [(b"1", 0)]
    await consumer.close()
    assert world.waiting(WORK) == [b"1"]


async def test_dropped_connections_deliver_anew(world: World) -> None:
    await world.transport.consume(WORK, world.received.append, prefetch=2)
    await world.send(b"1", b"2", b"3")
    await world.settle_down()
    lost = list(world.received)
    world.broker.drop_connections()
    assert [one.live for one in lost] == [False, False]
    await world.settle_down()
    assert world.live() == [(b"1", 1), (b"2", 1)]
    assert all(one.redelivered for one in world.received if one.live)
    for one in lost:
        await one.ack()
        await one.requeue()
    assert world.live() == [(b"1", 1), (b"2", 1)]
    assert world.waiting(WORK) == [b"3"]


async def test_a_delivery_cut_on_its_way_is_never_received(world: World) -> None:
    await world.send(b"1")
    await world.transport.consume(WORK, world.received.append, prefetch=1)
    world.broker.drop_connections()
    assert world.received == []
    await world.settle_down()
    assert world.live() == [(b"1", 1)]
    assert len(world.received) == 1


async def test_a_stopped_consumer_loses_what_it_held_too(world: World) -> None:
    consumer = await world.transport.consume(WORK, world.received.append, prefetch=1)
    await world.send(b"1")
    await consumer.stop()
    world.broker.drop_connections()
    await world.settle_down()
    assert world.live() == []
    assert world.waiting(WORK) == [b"1"]


async def test_listeners_survive_a_drop(world: World) -> None:
    heard: list[bytes] = []
    reply = NAMES.reply("c1")
    await world.transport.listen(
        Queue(reply), (Binding(NAMES.events, reply, reply),), lambda m: heard.append(m.body)
    )
    route = NAMES.event_route("run.completed", "a", reply_to=reply)
    await world.send(b"1", route=route)
    world.broker.drop_connections()
    await world.send(b"2", route=route)
    await world.settle_down()
    assert heard == [b"1", b"2"]


async def test_requeue_counts_and_goes_back_to_its_place(world: World) -> None:
    await world.send(b"1", b"2", b"3")
    consumer = await world.transport.consume(WORK, world.received.append, prefetch=2)
    await consumer.stop()
    second, first = world.received[1], world.received[0]
    await second.requeue()
    await first.requeue()
    assert world.waiting(WORK) == [b"1", b"2", b"3"]
    counts = [one.headers.get("x-delivery-count") for one in world.broker.messages(WORK)]
    assert counts == [1, 1, None]


async def test_what_comes_back_is_sorted_however_it_was_delivered(world: World) -> None:
    await world.send(b"1", b"2", b"3")
    first: list[Delivery] = []
    await world.transport.consume(WORK, first.append, prefetch=1)
    other = MemoryTransport(world.broker)
    await other.open(timeout=SOON)
    consumer = await other.consume(WORK, world.received.append, prefetch=3)
    await world.settle_down()
    await world.transport.close()
    await world.settle_down()
    assert [one.message.body for one in world.received] == [b"2", b"3", b"1"]
    await consumer.close()
    assert world.waiting(WORK) == [b"1", b"2", b"3"]
    await other.close()


async def test_an_alarm_holds_publishes_until_it_ends(world: World) -> None:
    world.broker.block()
    with pytest.raises(BrokerBlocked) as caught:
        await world.send(b"refused")
    assert caught.value.unknown is False
    waiting = asyncio.create_task(world.transport.publish(TRIGGER, Message(body=b"1"), timeout=5))
    await world.settle_down()
    assert world.waiting(WORK) == []
    world.broker.unblock()
    await waiting
    assert world.waiting(WORK) == [b"1"]


async def test_a_transport_closed_while_it_waits_publishes_nothing(world: World) -> None:
    world.broker.block()
    waiting = asyncio.create_task(world.transport.publish(TRIGGER, Message(body=b"1"), timeout=5))
    await world.settle_down()
    await world.transport.close()
    world.broker.unblock()
    with pytest.raises(BrokerUnavailable):
        await waiting
    assert world.waiting(WORK) == []


async def test_an_alarm_does_not_hold_deliveries(world: World) -> None:
    await world.send(b"1", b"2")
    world.broker.block()
    await world.transport.consume(WORK, world.received.append, prefetch=1)
    await world.settle_down()
    await world.received[0].ack()
    await world.settle_down()
    assert world.live() == [(b"2", 0)]


async def test_a_stopped_broker_keeps_its_queues(world: World) -> None:
    await world.transport.consume(WORK, world.received.append, prefetch=1)
    await world.send(b"1", b"2")
    await world.settle_down()
    world.broker.stop()
    assert not world.transport.connected
    assert world.live() == []
    with pytest.raises(BrokerUnavailable) as caught:
        await world.send(b"3")
    assert caught.value.unknown is False
    with pytest.raises(BrokerUnavailable):
        await world.transport.depth(WORK)
    with pytest.raises(BrokerUnavailable):
        await MemoryTransport(world.broker).open(timeout=SOON)
    assert world.waiting(WORK) == [b"1", b"2"]
    world.broker.start()
    await world.settle_down()
    assert world.transport.connected
    assert world.live() == [(b"1", 1)]


async def test_a_publish_waits_for_a_restart(world: World) -> None:
    world.broker.stop()
    waiting = asyncio.create_task(world.transport.publish(TRIGGER, Message(body=b"1"), timeout=5))
    await world.settle_down()
    assert not waiting.done()
    world.broker.start()
    await waiting
    assert world.waiting(WORK) == [b"1"]


async def test_delays_that_ran_out_while_down_move_on_at_start(world: World) -> None:
    await world.send(b"1", route=NAMES.delay_route("a", 1000)[0])
    world.broker.stop()
    await world.pass_time(HOUR_MS)
    assert world.waiting(WORK) == []
    world.broker.start()
    assert world.waiting(WORK) == [b"1"]


async def test_a_closed_broker_has_no_timers(world: World) -> None:
    await world.send(b"1", route=NAMES.delay_route("a", HOUR_MS)[0])
    assert world.clock.next_ms() is not None
    world.broker.close()
    assert world.clock.next_ms() is None


async def test_nothing_is_shared_with_the_reader(world: World) -> None:
    message = Message(body=bytes(bytearray(b"1")), headers={"bt-tags": ["x"]})
    await world.transport.publish(TRIGGER, message, timeout=SOON)
    for _ in range(2):
        (seen,) = world.broker.messages(WORK)
        tags = seen.headers["bt-tags"]
        assert tags == ["x"]
        assert isinstance(tags, list)
        tags.append("mine")


def leased(*names: str) -> Topology:
    return Topology((), tuple(Queue(name, {"x-expires": HOUR_MS}) for name in names), ())


async def test_a_queue_expires_an_hour_after_it_was_last_used(world: World) -> None:
    await world.transport.declare(leased("unread", "renewed", "read", "left"))
    await world.transport.consume("read", world.received.append, prefetch=1)
    consumer = await world.transport.consume("left", world.received.append, prefetch=1)
    await world.pass_time(HOUR_MS - 1)
    await world.transport.declare(leased("renewed"))
    await consumer.stop()
    await world.pass_time(1)
    assert {"renewed", "read", "left"} < set(world.broker.queues)
    assert "unread" not in world.broker.queues
    await world.pass_time(HOUR_MS)
    assert [name for name in world.broker.queues if not name.startswith("bt.")] == ["read"]


async def test_the_time_of_an_unread_queue_begins_anew_with_the_broker(world: World) -> None:
    await world.transport.declare(leased("unread"))
    await world.pass_time(HOUR_MS - 1)
    world.broker.stop()
    await world.pass_time(HOUR_MS)
    world.broker.start()
    await world.pass_time(HOUR_MS - 1)
    assert "unread" in world.broker.queues
    await world.pass_time(1)
    assert "unread" not in world.broker.queues


async def test_a_drop_is_no_end_of_reading(world: World) -> None:
    await world.transport.declare(leased("read"))
    await world.transport.consume("read", world.received.append, prefetch=1)
    world.broker.drop_connections()
    await world.pass_time(HOUR_MS)
    assert "read" in world.broker.queues


async def test_a_consumer_waits_for_a_queue_that_it_did_not_declare(world: World) -> None:
    owner = MemoryTransport(world.broker)
    await owner.open(timeout=SOON)
    own = Topology((), (Queue("own"),), ())
    await owner.declare(own)
    await world.transport.consume("own", world.received.append, prefetch=1)
    await owner.delete("own")
    await world.settle_down()
    assert "own" not in world.broker.queues
    await owner.declare(own)
    assert await owner.depth("own") == Depth(ready=0, consumers=1)
    await owner.close()


async def test_a_listener_remakes_its_queue(world: World) -> None:
    heard: list[Message] = []
    queue, binding = Queue("own"), Binding(NAMES.events, "own", "#")
    await world.transport.listen(queue, (binding,), heard.append)
    world.broker.delete("own")
    await world.settle_down()
    await world.send(b"1", route=Route(NAMES.events, "x"))
    await world.settle_down()
    assert [message.body for message in heard] == [b"1"]


async def test_a_mismatch_is_logged_and_the_rest_restored(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.transport.consume(WORK, world.received.append, prefetch=1)
    world.broker.delete(DEAD)
    world.broker.declare(Topology((), (Queue(DEAD, {"x-max-length": 1}),), ()))
    world.broker.delete(WORK)
    await world.settle_down()
    assert WORK in world.broker.queues
    assert f"queue {DEAD!r}" in caplog.text


async def test_the_names_of_queues_are_readable(world: World) -> None:
    assert {WORK, DEAD, NAMES.unrouted, NAMES.rung(1000)} <= set(world.broker.queues)
    with pytest.raises(ConfigurationError, match="nobody"):
        world.broker.messages("nobody")


def chain(target: Queue, **arguments: str | int) -> Topology:
    """Return a queue `source` that dead-letters into `target` over exchange `dead`."""
    return Topology(
        (Exchange("in", "direct"), Exchange("dead", "direct")),
        (
            Queue("source", {"x-dead-letter-exchange": "dead", "x-message-ttl": 1000, **arguments}),
            target,
        ),
        (Binding("in", "source", "k"), Binding("in", "target", "t")),
    )


AT_LEAST_ONCE = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
BOUND = Topology((), (), (Binding("dead", "target", "k"),))


async def test_a_dead_letter_waits_for_its_target(world: World) -> None:
    await world.transport.declare(chain(Queue("target"), **AT_LEAST_ONCE))
    await world.send(b"1", b"2", route=Route("in", "k"))
    await world.pass_time(HOUR_MS)
    assert world.waiting("target") == []
    await world.transport.declare(BOUND)
    assert world.waiting("target") == [b"1", b"2"]


async def test_without_at_least_once_it_is_dropped_as_rabbitmq_does(world: World) -> None:
    await world.transport.declare(chain(Queue("target")))
    await world.send(b"1", route=Route("in", "k"))
    await world.pass_time(HOUR_MS)
    await world.transport.declare(BOUND)
    assert world.waiting("target") == []


async def test_a_dead_letter_waits_for_room(world: World) -> None:
    limits: dict[str, str | int] = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await world.transport.declare(chain(Queue("target", limits), **AT_LEAST_ONCE))
    await world.transport.declare(BOUND)
    await world.send(b"1", b"2", route=Route("in", "k"))
    await world.pass_time(HOUR_MS)
    assert world.waiting("target") == [b"1"]
    with pytest.raises(QueueFull):
        await world.send(b"3", route=Route("in", "t"))
    await world.transport.consume("target", world.received.append, prefetch=5)
    await world.settle_down()
    assert world.live() == [(b"1", 0), (b"2", 0)]


async def test_without_reject_publish_the_oldest_goes(world: World) -> None:
    limits: dict[str, str | int] = {"x-max-length": 2, "x-dead-letter-exchange": "dead"}
    await world.transport.declare(chain(Queue("target", limits)))
    await world.transport.declare(Topology((), (), (Binding("dead", "source", "t"),)))
    await world.send(b"1", b"2", b"3", route=Route("in", "t"))
    assert world.waiting("target") == [b"2", b"3"]
    (dropped,) = world.broker.messages("source")
    assert dropped.headers["x-first-death-reason"] == "maxlen"


async def test_dying_twice_of_one_cause_is_counted(world: World) -> None:
    back = Topology((), (), (Binding("dead", "source", "k"),))
    await world.transport.declare(chain(Queue("target"), **AT_LEAST_ONCE))
    await world.transport.declare(back)
    await world.send(b"1", route=Route("in", "k"))
    await world.pass_time(2500)
    (message,) = world.broker.messages("source")
    deaths = message.headers["x-death"]
    assert isinstance(deaths, list)
    assert len(deaths) == 1
    assert deaths[0]["count"] == 2
    await world.transport.declare(replace(back, bindings=(), absent_bindings=back.bindings))


async def test_a_binding_to_nothing_is_an_error(world: World) -> None:
    with pytest.raises(ConfigurationError, match="no-exchange"):
        await world.transport.declare(Topology((), (), (Binding("no-exchange", WORK, "k"),)))
    with pytest.raises(ConfigurationError, match="no-queue"):
        await world.transport.declare(Topology((), (), (Binding(NAMES.tasks, "no-queue", "k"),)))


async def test_a_mismatch_names_a_removed_argument(world: World) -> None:
    options = TaskQueue("b", QueueOptions(max_length=3))
    await world.transport.declare(topology(NAMES, [options]))
    intake = next(q for q in topology(NAMES, [options]).queues if q.name == NAMES.intake("b"))
    rest = {name: value for name, value in intake.arguments.items() if name != "x-max-length"}
    with pytest.raises(TopologyMismatch) as caught:
        await world.transport.declare(Topology((), (Queue(intake.name, rest),), ()))
    for part in (intake.name, "x-max-length", "3", "None"):
        assert part in str(caught.value)


async def test_readers_take_turns(world: World) -> None:
    turns: list[str] = []
    await world.transport.consume(WORK, lambda _: turns.append("x"), prefetch=10)
    await world.transport.consume(WORK, lambda _: turns.append("y"), prefetch=10)
    await world.send(b"1", b"2", b"3", b"4")
    await world.settle_down()
    assert turns == ["x", "y", "x", "y"]


async def test_alternate_exchanges_in_a_circle_end(world: World) -> None:
    await world.transport.declare(
        Topology(
            (
                Exchange("one", "direct", {"alternate-exchange": "two"}),
                Exchange("two", "direct", {"alternate-exchange": "one"}),
            ),
            (),
            (),
        )
    )
    await world.transport.publish(
        Route("one", "k"), Message(body=b""), timeout=SOON, mandatory=False
    )


@pytest.fixture
async def abroad(world: World) -> AsyncIterator[Abroad]:
    """A function that runs a coroutine function in the loop of another thread."""
    # In debug mode a loop notices when another thread touches it.
    asyncio.get_running_loop().set_debug(True)
    with start_blocking_portal("asyncio", {"debug": True}) as portal:

        async def run(work: Work) -> object:
            return await asyncio.wrap_future(portal.start_task_soon(work))

        yield run


async def test_another_thread_publishes_and_is_heard_at_once(world: World, abroad: Abroad) -> None:
    arrived = asyncio.Event()
    await world.transport.consume(WORK, lambda _: arrived.set(), prefetch=1)

    async def work() -> None:
        transport = MemoryTransport(world.broker)
        await transport.open(timeout=5)
        assert transport.connected
        with pytest.raises(Unroutable):
            await transport.publish(NAMES.trigger_route("b"), Message(body=b""), timeout=5)
        await transport.publish(TRIGGER, Message(body=b"1"), timeout=5)
        await transport.close()

    await abroad(work)
    async with asyncio.timeout(5):
        await arrived.wait()


async def test_another_thread_consumes_in_its_own_loop(world: World, abroad: Abroad) -> None:
    await world.send(b"1", b"2")

    async def work() -> None:
        received: asyncio.Queue[tuple[Delivery, int]] = asyncio.Queue()
        transport = MemoryTransport(world.broker)
        await transport.open(timeout=5)
        consumer = await transport.consume(
            WORK, lambda one: received.put_nowait((one, threading.get_ident())), prefetch=1
        )
        async with asyncio.timeout(5):
            first, thread = await received.get()
            assert thread == threading.get_ident()
            assert first.message.body == b"1"
            assert first.live
            await first.ack()
            assert not first.live
            second, _ = await received.get()
            await second.requeue()
            assert (await received.get())[0].lost == 1
        await consumer.stop()
        await consumer.close()
        await transport.close()

    await abroad(work)
    assert world.waiting(WORK) == [b"2"]


async def test_another_thread_limits_and_deletes(world: World, abroad: Abroad) -> None:
    await world.send(b"1", b"2", b"3")

    async def work() -> None:
        received: asyncio.Queue[Delivery] = asyncio.Queue()
        transport = MemoryTransport(world.broker)
        await transport.open(timeout=5)
        consumer = await transport.consume(WORK, received.put_nowait, prefetch=1)
        await consumer.limit(1)
        async with asyncio.timeout(5):
            held = [await received.get(), await received.get()]
        await consumer.limit(0)
        assert [delivery.live for delivery in held] == [True, True]
        assert await transport.depth(WORK) == Depth(ready=1, consumers=0)
        await transport.delete(DEAD)
        await transport.close()

    await abroad(work)
    assert DEAD not in world.broker.queues
    assert world.waiting(WORK) == [b"1", b"2", b"3"]


async def test_another_thread_listens_in_its_own_loop(world: World, abroad: Abroad) -> None:
    reply = NAMES.reply("c1")

    async def work() -> None:
        heard: asyncio.Queue[Message] = asyncio.Queue()
        transport = MemoryTransport(world.broker)
        await transport.open(timeout=5)
        await transport.listen(
            Queue(reply), (Binding(NAMES.events, reply, reply),), heard.put_nowait
        )
        route = NAMES.event_route("run.completed", "a", reply_to=reply)
        await transport.publish(route, Message(body=b"1"), timeout=5)
        async with asyncio.timeout(5):
            assert (await heard.get()).body == b"1"
        await transport.close()

    await abroad(work)
    assert reply not in world.broker.queues


def test_a_broker_outlives_the_loop_it_lived_in() -> None:
    broker = MemoryBroker()
    received: list[bytes] = []

    async def leave() -> None:
        transport = MemoryTransport(broker)
        await transport.open(timeout=SOON)
        await transport.declare(topology(NAMES, [TaskQueue("a")]))
        await transport.consume(WORK, lambda one: received.append(one.message.body), prefetch=1)
        await transport.publish(TRIGGER, Message(body=b"held"), timeout=SOON)
        route, _ = NAMES.delay_route("a", 50)
        await transport.publish(route, Message(body=b"delayed"), timeout=SOON)
        await wait_in_vain(transport)

    async def wait_in_vain(transport: MemoryTransport) -> None:
        broker.block()
        with pytest.raises(BrokerBlocked):
            await transport.publish(TRIGGER, Message(body=b"blocked"), timeout=SOON)
        broker.unblock()

    async def return_to_it() -> list[tuple[bytes, int]]:
        transport = MemoryTransport(broker)
        await transport.open(timeout=5)
        deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        await transport.consume(WORK, deliveries.put_nowait, prefetch=2)
        async with asyncio.timeout(5):
            got = [await deliveries.get(), await deliveries.get()]
        await wait_in_vain(transport)
        await transport.close()
        return [(one.message.body, one.lost) for one in got]

    asyncio.run(leave())
    assert asyncio.run(return_to_it()) == [(b"held", 1), (b"delayed", 0)]
    assert received == [b"held"]
