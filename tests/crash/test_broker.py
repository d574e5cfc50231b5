"""A broker that dies, hangs up, sounds an alarm, loses a queue, or loses its patience."""

from __future__ import annotations

import asyncio
import time

import pytest

from brokertask.errors import BrokerBlocked
from infra.rabbitmq.node import Node
from tests.crash.stage import Gate, Stage, eventually

pytestmark = pytest.mark.anyio


@pytest.mark.usefixtures("each_data_plane")
async def test_a_broker_killed_under_load_loses_nothing(frail: Stage, frail_node: Node) -> None:
    worker = await frail.worker(processes=2)
    kinds = [("quick", 1), ("slow", 0.05), ("flaky", 1), ("flaky", 2), ("failing", None)]

    async def publish(kind: int) -> None:
        for _ in range(60):
            await frail.trigger_surely(*kinds[kind])

    async with asyncio.TaskGroup() as publishers:
        for kind in range(len(kinds)):
            publishers.create_task(publish(kind))
        await eventually(lambda: len(frail.journal.finished()) > 60, "work in progress")
        await asyncio.to_thread(frail_node.kill)
        await asyncio.to_thread(frail_node.start)
    await worker.said("connection to", times=4)
    await worker.said("lost")
    await worker.said("resumed")
    await frail.check(lasting=1.5, timeout=60)
    twice = sum(count - 1 for count in frail.journal.finished().values())
    assert twice <= 2 * (10 + 20 + 10), "more doubles than two workers can hold"
    assert {letter.reason for letter in await frail.dead("failing")} <= {"max_attempts", "crashed"}


@pytest.mark.usefixtures("each_data_plane")
async def test_connections_closed_by_the_broker_take_no_run(
    frail: Stage, frail_node: Node, gate: Gate
) -> None:
    worker = await frail.worker()
    runs = [await frail.trigger("held", str(gate)) for _ in range(3)]
    for run in runs:
        await frail.until_started(run.run_id)
    await asyncio.to_thread(frail_node.close_connections, "closed by an operator")
    await worker.said("closed by an operator")
    await worker.said("consumer of bt.q.held resumed")
    gate.open()
    for run in runs:
        await run.result(timeout=15)
    await frail.check()
    for run in runs:
        assert [entry.attempt for entry in frail.journal.of(run.run_id, "started")] == [1]


@pytest.mark.usefixtures("each_data_plane")
async def test_in_an_alarm_publishers_are_told_and_workers_go_on(
    frail: Stage, frail_node: Node, gate: Gate
) -> None:
    worker = await frail.worker(publish_timeout=1)
    app = await frail.client(frail.url, publish_timeout=1)
    before = [await frail.trigger("held", str(gate)) for _ in range(9)]
    await frail.until_started(before[0].run_id)
    await asyncio.to_thread(frail_node.set_memory_alarm, True)
    try:
        with pytest.raises(BrokerBlocked) as first:
            await app.client.trigger("quick", 1)
        begun = time.monotonic()
        with pytest.raises(BrokerBlocked) as second:
            await app.client.trigger("quick", 2)
        assert time.monotonic() - begun < 1.5
        # Three at a time: the next are delivered only as the first are acked.
        gate.open()
        for run in before:
            await frail.until_finished(run.run_id)
        assert worker.alive
    finally:
        await asyncio.to_thread(frail_node.set_memory_alarm, False)
    assert first.value.unknown, "it was sent before the broker said that it was blocked"
    assert first.value.run_id is not None
    frail.accepted[first.value.run_id] = "quick"
    assert not second.value.unknown
    assert second.value.run_id is not None
    await frail.check()
    assert frail.journal.of(second.value.run_id) == []


async def test_a_retry_that_cannot_be_published_is_not_lost_with_its_worker(
    frail: Stage, frail_node: Node, gate: Gate
) -> None:
    """Whoever acks before what follows is on the broker's disk loses these runs."""
    first_gate = Gate(frail.folder / "first gate")
    worker = await frail.worker(publish_timeout=1)
    completing = await frail.trigger("held", str(first_gate))
    failing = [await frail.trigger("flaky_held", str(gate)) for _ in range(3)]
    for run in (completing, *failing):
        await frail.until_started(run.run_id)
    await asyncio.to_thread(frail_node.set_memory_alarm, True)
    try:
        first_gate.open()
        await worker.said("is lost: a memory or disk alarm")
        # From now on nothing leaves the worker, not even into a buffer on the way.
        gate.open()
        await worker.said("cannot be settled yet: a memory or disk alarm", times=3)
        assert worker.log.count("nothing was sent") >= 3
        await worker.kill()
        frail.workers.remove(worker)
    finally:
        await asyncio.to_thread(frail_node.set_memory_alarm, False)
    await frail.worker()
    await frail.check()


@pytest.mark.usefixtures("each_data_plane")
async def test_a_run_longer_than_the_consumer_timeout_runs_once(
    frail: Stage, frail_node: Node, gate: Gate
) -> None:
    frail_node.set_consumer_timeout(2)
    try:
        worker = await frail.worker()
        run = await frail.trigger("held", str(gate))
        await frail.until_started(run.run_id)
        await worker.said("consumer of bt.q.held ended", timeout=20)
        await worker.said("consumer of bt.q.held resumed")
        gate.open()
        assert await run.result(timeout=15) == str(gate)
        await frail.check()
    finally:
        frail_node.set_consumer_timeout(None)
    assert len(frail.journal.of(run.run_id, "started")) == 1


async def test_after_a_consumer_timeout_two_workers_lose_nothing(
    frail: Stage, frail_node: Node, gate: Gate
) -> None:
    frail_node.set_consumer_timeout(2)
    try:
        worker = await frail.worker(processes=2)
        runs = [await frail.trigger("held", str(gate)) for _ in range(4)]
        for run in runs:
            await frail.until_started(run.run_id)
        await worker.said("consumer of bt.q.held ended", times=2, timeout=20)
        gate.open()
        await frail.check()
    finally:
        frail_node.set_consumer_timeout(None)
    for run in runs:
        assert len(frail.journal.of(run.run_id, "started")) <= 3


async def test_a_deleted_queue_is_made_again_and_consumed(stage: Stage, gate: Gate) -> None:
    worker = await stage.worker()
    running = await stage.trigger("held", str(gate))
    await stage.until_started(running.run_id)
    for task in ("held", "quick"):
        await stage.transport.delete(stage.names.queue(task))
    for task in ("held", "quick"):
        await worker.said(f"queue 'bt.q.{task}' does not exist")
        await worker.said(f"consumer of bt.q.{task} resumed")
    gate.open()
    await stage.until_finished(running.run_id)
    after = await stage.trigger("held", str(gate))
    assert await after.result(timeout=10) == str(gate)
    await stage.check()
