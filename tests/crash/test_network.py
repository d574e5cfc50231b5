"""Connections that are cut, reset, or stop passing bytes without a word."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from brokertask.envelope import Message
from brokertask.errors import PublishUnknown
from brokertask.transport.base import Delivery
from brokertask.transport.rabbitmq import RabbitTransport
from infra.rabbitmq.node import Node
from tests.crash.proxy import BOTH, Passage, Proxy, Way
from tests.crash.stage import SECONDS, Gate, Stage, eventually, transport_to

pytestmark = pytest.mark.anyio
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"


@pytest.mark.usefixtures("each_data_plane")
@pytest.mark.parametrize("way", Way, ids=["up", "down"])
async def test_a_half_open_connection_is_noticed_and_its_run_adopted(
    stage: Stage, proxy: Proxy, gate: Gate, way: Way
) -> None:
    worker = await stage.worker(url=proxy.url, heartbeat=2)
    run = await stage.trigger("held", str(gate))
    await stage.until_started(run.run_id)
    proxy.black_hole([way])
    begun = time.monotonic()
    await worker.said("consumer of bt.q.held resumed", timeout=20)
    assert time.monotonic() - begun < 3 * (2 + 1) + 5
    gate.open()
    assert await run.result(timeout=10) == str(gate)
    await stage.check()
    assert len(stage.journal.of(run.run_id, "started")) == 1


async def test_what_ends_while_the_connection_is_half_open_is_not_run_again(
    stage: Stage, proxy: Proxy, gate: Gate
) -> None:
    worker = await stage.worker(url=proxy.url, heartbeat=2)
    run = await stage.trigger("held", str(gate))
    await stage.until_started(run.run_id)
    proxy.black_hole()
    gate.open()
    await stage.until_finished(run.run_id)
    await worker.said("consumer of bt.q.held resumed", timeout=20)
    await run.result(timeout=10)
    await stage.check()
    assert len(stage.journal.of(run.run_id, "started")) == 1


@pytest.mark.usefixtures("each_data_plane")
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_lost_connection_takes_the_lease_but_not_the_run(
    stage: Stage, proxy: Proxy, gate: Gate, reset: bool
) -> None:
    worker = await stage.worker(url=proxy.url)
    runs = [await stage.trigger("held", str(gate)) for _ in range(3)]
    for run in runs:
        await stage.until_started(run.run_id)
    proxy.reset() if reset else proxy.drop()
    await worker.said("consumer of bt.q.held resumed")
    gate.open()
    for run in runs:
        await run.result(timeout=10)
    await stage.check()
    for run in runs:
        assert len(stage.journal.of(run.run_id, "started")) == 1


@pytest.mark.usefixtures("each_data_plane")
async def test_connections_cut_in_the_middle_of_a_frame_lose_nothing(
    stage: Stage, proxy: Proxy
) -> None:
    worker = await stage.worker(url=proxy.url)
    cuts = random.Random(7)
    for number in range(6):
        before = proxy.accepted
        for way in BOTH:
            proxy.cut_after(cuts.randint(1, 3_000), way)
        for _ in range(30):
            await stage.trigger("flaky", 1)
        # The worker has two connections; both came back once they are cut.
        await eventually(lambda before=before: proxy.accepted > before, f"cut number {number}")  # type: ignore[misc]
    await worker.said("resumed")
    await stage.check()


async def test_a_handshake_cut_anywhere_is_tried_again(stage: Stage) -> None:
    """Every way a connection can end before it is one must lead to the next try."""

    async def connect(way: Way, count: int) -> None:
        async with Proxy(stage.url) as proxy:
            proxy.cut_next_after = {way: count}
            transport = transport_to(proxy.url)
            await transport.open(timeout=SECONDS)
            assert proxy.accepted == 2
            await transport.close()

    offsets = [(Way.UP, count) for count in (1, 7, 8, 9, 100, 300)]
    offsets += [(Way.DOWN, count) for count in (1, 6, 7, 8, 100, 300, 480, 510)]
    await asyncio.gather(*(connect(way, count) for way, count in offsets))


async def test_a_broker_that_talks_nonsense_is_tried_again(stage: Stage) -> None:
    async def connect(nonsense: bytes) -> None:
        answers = [nonsense]

        def garble(passage: Passage, way: Way, data: bytes) -> bytes:
            if way is Way.UP or not answers:
                return data
            passage.left[way] = len(nonsense)
            return answers.pop()

        async with Proxy(stage.url) as proxy:
            proxy.tap = garble
            transport = transport_to(proxy.url)
            await transport.open(timeout=SECONDS)
            assert proxy.accepted == 2
            await transport.close()

    await asyncio.gather(
        connect(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        connect(b"AMQP\x00\x00\x09\x01"),
        connect(b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0a\xce"),  # start, without its fields
        connect(b"\x01\x00\x00\x00\x00\x00\x04\x00\xff\x00\xff\xce"),  # a method there is not
        connect(b"\x08\x00\x00\x00\x00\x00\x00\xce"),  # a heartbeat in place of an answer
        connect(b"\x02\x00\x00\x00\x00\x00\x02\xff\xff\xce"),  # half a content header
        connect(b"\xff" * 7),
    )


GARBAGE = {
    "noise": b"\xff" * 40,
    "a frame that never ends": b"\x03\x00\x01\xff\xff\xff\xff",
    "a confirm that is cut short": b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x50\xce",
    "content of nothing": b"\x02\x00\x01\x00\x00\x00\x02\xff\xff\xce",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_a_broker_that_talks_nonsense_while_work_goes_on_loses_nothing(
    stage: Stage, proxy: Proxy, name: str
) -> None:
    """Each connection of a worker is spoilt once in the middle of its work, and made again."""
    worker = await stage.worker(url=proxy.url)
    await eventually(lambda: proxy.passages == 2, "both connections of the worker")
    spoilt = set[Passage]()

    def spoil(passage: Passage, way: Way, data: bytes) -> bytes:
        # After the end of a frame a new one begins.
        spoilable = way is Way.DOWN and data.endswith(b"\xce") and passage not in spoilt
        if not spoilable or len(spoilt) == 2:
            return data
        spoilt.add(passage)
        return data + GARBAGE[name]

    proxy.tap = spoil
    for number in range(40):
        await stage.trigger("flaky", number % 2)
    await worker.said("consumer of bt.q.flaky ended")
    await worker.said("consumer of bt.q.flaky resumed")
    assert len(spoilt) == 2
    await stage.check()


async def test_a_connection_on_which_only_messages_come_is_not_taken_for_dead(
    stage: Stage, proxy: Proxy
) -> None:
    """A broker that has something to send beats no heart, and aiormq sees no messages."""
    beat = 2
    transport = RabbitTransport(proxy.url, heartbeat=beat)
    await transport.open(timeout=SECONDS)
    lost: list[Delivery] = []
    settling = set[asyncio.Task[None]]()

    def receive(delivery: Delivery) -> None:
        if delivery.redelivered:
            lost.append(delivery)
        settling.add(asyncio.ensure_future(delivery.ack()))

    def deaf(passage: Passage, way: Way, data: bytes) -> bytes:
        return data if way is Way.UP else data.replace(HEARTBEAT, b"")

    await transport.consume(stage.names.queue("quick"), receive, prefetch=10)
    proxy.tap = deaf
    until = time.monotonic() + 3 * (beat + 1) + 3
    while time.monotonic() < until:
        await transport.publish(
            stage.names.trigger_route("quick"), Message(body=b"\x01"), timeout=SECONDS
        )
    assert (proxy.accepted, lost) == (2, [])
    await asyncio.gather(*settling)
    await transport.close()


@pytest.mark.usefixtures("each_data_plane")
async def test_a_trigger_without_an_answer_is_unknown_and_safe_to_repeat(
    stage: Stage, proxy: Proxy, gate: Gate
) -> None:
    await stage.worker()
    app = await stage.client(proxy.url, publish_timeout=1)

    def lose_the_confirm(passage: Passage, way: Way, data: bytes) -> bytes:
        if way is Way.UP and str(gate).encode() in data:
            passage.lost.add(Way.DOWN)
        return data

    proxy.tap = lose_the_confirm
    with pytest.raises(PublishUnknown) as caught:
        await app.client.trigger("held", str(gate))
    assert caught.value.unknown
    run_id = caught.value.run_id
    assert run_id is not None
    await stage.until_started(run_id)  # The broker has it, though we do not know.
    proxy.tap = lambda passage, way, data: data
    proxy.reset()
    run, _ = await stage.trigger_surely("held", str(gate), app=app, run_id=run_id)
    gate.open()
    assert await run.result(timeout=10) == str(gate)
    await stage.check()
    assert len(stage.journal.of(run_id, "started")) == 1


async def test_a_caller_that_was_cut_off_still_gets_its_result(
    stage: Stage, proxy: Proxy, gate: Gate
) -> None:
    await stage.worker()
    app = await stage.client(proxy.url)
    run = await app.client.trigger("held", str(gate))
    stage.accepted[run.run_id] = "held"
    await stage.until_started(run.run_id)
    waiting = asyncio.create_task(run.result(timeout=20))
    proxy.refusing = True
    proxy.reset()
    gate.open()
    await stage.until_finished(run.run_id)
    await stage.works()  # By now the event is where its caller is not.
    proxy.refusing = False
    assert await waiting == str(gate)
    await stage.check()


async def test_closing_a_half_open_connection_takes_bounded_time(
    stage: Stage, proxy: Proxy
) -> None:
    transport = transport_to(proxy.url)
    await transport.open(timeout=SECONDS)
    received: list[Delivery] = []
    await transport.consume(stage.names.queue("quick"), received.append, prefetch=10)
    proxy.black_hole()
    begun = time.monotonic()
    await transport.close()
    assert time.monotonic() - begun < 12


async def test_told_to_stop_on_a_half_open_connection_a_worker_stops(
    stage: Stage, proxy: Proxy, gate: Gate
) -> None:
    worker = await stage.worker(url=proxy.url, grace=1, publish_timeout=2)
    run = await stage.trigger("held", str(gate))
    await stage.until_started(run.run_id)
    proxy.black_hole()
    begun = time.monotonic()
    await worker.stop(timeout=45)
    assert time.monotonic() - begun < 30
    proxy.reset()
    stage.workers.remove(worker)
    await stage.worker()
    again = (await stage.until_started(run.run_id, times=2))[1]
    assert again.attempt <= 2
    gate.open()
    await stage.check()


@pytest.mark.usefixtures("each_data_plane")
async def test_publishing_through_a_dead_connection_ends_in_our_own_errors(
    stage: Stage, proxy: Proxy
) -> None:
    """No CancelledError of a foreign library may pass for a cancellation of ours."""
    transport = transport_to(proxy.url)
    await transport.open(timeout=SECONDS)
    route = stage.names.trigger_route("quick")

    async def publish(number: int) -> str:
        try:
            await transport.publish(
                route, Message(body=b"\x01", message_id=f"id-{number}"), timeout=5
            )
        except PublishUnknown:
            return "unknown"
        return "stored"

    for _ in range(5):
        publishing = [asyncio.create_task(publish(number)) for number in range(50)]
        await asyncio.sleep(0)
        proxy.reset()
        fates = await asyncio.gather(*publishing)
        assert set(fates) <= {"unknown", "stored"}
    await transport.close()


@pytest.mark.usefixtures("each_data_plane")
async def test_acks_do_not_wait_for_ever_on_a_dying_connection(stage: Stage, proxy: Proxy) -> None:
    """An ack that hangs keeps its run from being settled when the message comes again."""
    for number in range(100):
        await stage.app.client.trigger("quick", number)
    transport = transport_to(proxy.url)
    await transport.open(timeout=SECONDS)
    received: list[Delivery] = []
    await transport.consume(stage.names.queue("quick"), received.append, prefetch=100)
    await eventually(lambda: len(received) == 100, "all deliveries")
    proxy.reset()
    async with asyncio.timeout(5), asyncio.TaskGroup() as acks:
        for delivery in received:
            acks.create_task(delivery.ack())
    await transport.close()


@pytest.mark.usefixtures("each_data_plane")
async def test_a_publisher_does_not_wait_for_a_blocked_connection_that_is_gone(
    frail: Stage, frail_node: Node
) -> None:
    async with Proxy(frail.url) as proxy:
        app = await frail.client(proxy.url, publish_timeout=60)
        await app.client.trigger("quick", 1)
        await asyncio.to_thread(frail_node.set_memory_alarm, True)
        try:
            first = asyncio.create_task(app.client.trigger("quick", 2))
            await eventually(lambda: blocked_connections(frail), "blocked connection")
            second = asyncio.create_task(app.client.trigger("quick", 3))
            await asyncio.sleep(0)
            proxy.reset()
            with pytest.raises(PublishUnknown):
                await first
        finally:
            await asyncio.to_thread(frail_node.set_memory_alarm, False)
        async with asyncio.timeout(10):
            await second


def blocked_connections(stage: Stage) -> bool:
    states = stage.node.ctl("list_connections", "state").split()
    return "blocked" in states


async def test_closing_a_client_whose_broker_is_gone_takes_bounded_time(
    stage: Stage, proxy: Proxy
) -> None:
    app = await stage.client(proxy.url)
    await app.client.trigger("quick", 1)
    proxy.refusing = True
    proxy.reset()
    async with asyncio.timeout(10):
        await app.client.close()
