"""Runs of several steps, and workers that die, drain and share while they go on."""

from __future__ import annotations

import asyncio
import os
import signal
from urllib.parse import quote, urlsplit

import pytest

from brokertask.transport.rabbitmq.link import BACKOFF_MAX
from tests.crash.stage import SECONDS, Gate, Stage, kill

pytestmark = pytest.mark.anyio


async def test_a_finished_step_survives_a_killed_worker(stage: Stage, gate: Gate) -> None:
    await stage.worker(processes=2)
    run = await stage.trigger("stepping_held", str(gate))
    (began,) = await stage.until_told(run.run_id, "began:second")
    kill(began.pid)
    again = (await stage.until_told(run.run_id, "began:second", times=2))[1]
    assert again.pid != began.pid
    assert again.attempt == 2
    gate.open()
    first_worker = await run.result(timeout=30)
    assert f"-{began.pid}-" in first_worker, "the result of the first step is the remembered one"
    assert told(stage, run.run_id, "did:first") == 1
    assert told(stage, run.run_id, "did:second") == 1
    await stage.check()


async def test_a_document_is_fetched_once_however_often_its_summary_fails(
    stage: Stage, gate: Gate
) -> None:
    await stage.worker(processes=2)
    run = await stage.trigger("summarising", str(gate))
    began = await stage.until_told(run.run_id, "began:ask", times=3)
    assert [entry.attempt for entry in began] == [1, 2, 3]
    kill(began[2].pid)
    (*_, again) = await stage.until_told(run.run_id, "began:ask", times=4)
    assert again.attempt == 4
    gate.open()
    assert await run.result(timeout=30) == [36, 36, 36]
    assert told(stage, run.run_id, "did:fetch") == 1
    assert told(stage, run.run_id, "did:fan out") == 1
    await stage.check()


async def test_a_step_of_a_new_worker_survives_the_broker(frail: Stage, gate: Gate) -> None:
    """A queue that is used as soon as it is declared is gone with all that it had confirmed."""
    await frail.worker()
    run = await frail.trigger("stepping_held", str(gate))
    await frail.until_told(run.run_id, "began:second")
    await asyncio.to_thread(frail.node.kill)
    await asyncio.to_thread(frail.node.start)
    gate.open()
    await run.result(timeout=SECONDS + BACKOFF_MAX)
    assert told(frail, run.run_id, "did:first") == 1
    await frail.check(timeout=60)


async def test_a_worker_that_stops_leaves_no_queue_behind(stage: Stage, gate: Gate) -> None:
    worker = await stage.worker()
    run = await stage.trigger("stepping", 0.0)
    assert len(await run.result(timeout=30)) == 5
    assert await inflight_queues(stage) == 1
    assert await worker.stop() == 0
    assert await inflight_queues(stage) == 0
    stage.workers.clear()


async def test_a_drained_worker_hands_its_run_on_behind_its_steps(stage: Stage, gate: Gate) -> None:
    first = await stage.worker()
    run = await stage.trigger("stepping_held", str(gate))
    await stage.until_told(run.run_id, "began:second")
    second = await stage.worker()
    first.process.send_signal(signal.SIGTERM)
    gate.open()
    assert await first.process.wait() == 0
    stage.workers = [second]
    await run.result(timeout=30)
    assert told(stage, run.run_id, "did:first") == 1
    await stage.check()


async def test_told_to_stop_a_worker_hands_on_a_run_that_sleeps(stage: Stage) -> None:
    first = await stage.worker(grace=60)
    run = await stage.trigger("napping", 4.5)
    await stage.until_told(run.run_id, "did:before")
    second = await stage.worker()
    os.kill(first.process.pid, signal.SIGTERM)
    assert await first.process.wait() == 0
    assert told(stage, run.run_id, "did:after") == 0, "it waited for the sleep to end"
    stage.workers = [second]
    await run.result(timeout=30)
    assert told(stage, run.run_id, "did:before") == 1
    assert told(stage, run.run_id, "did:after") == 1
    await stage.check()


async def test_a_long_sleep_leaves_the_slot_to_others(stage: Stage) -> None:
    await stage.worker()
    # A new worker's first checkpoint waits until its inflight queue would survive the broker.
    await (await stage.trigger("stepping", 0.0)).result(timeout=30)
    sleeping = await stage.trigger("napping", 6)
    await stage.until_told(sleeping.run_id, "did:before")
    other = await stage.trigger("napping", 0.1)
    await stage.until_told(other.run_id, "did:after")
    assert told(stage, sleeping.run_id, "did:after") == 0
    await sleeping.result(timeout=20)
    assert told(stage, sleeping.run_id, "did:before") == 1
    entries = stage.journal.of(sleeping.run_id)
    slept = next(e.at for e in entries if e.fact == "did:after") - entries[1].at
    assert 6 <= slept < 6.5
    await stage.check()


async def test_a_run_with_steps_takes_one_slot_and_no_more_runs_from_others(
    stage: Stage, gate: Gate
) -> None:
    """Its first delivery is acked at the first checkpoint; the broker must not send another."""
    await stage.worker(processes=2)
    held = await stage.trigger("stepping_held", str(gate))
    await stage.until_told(held.run_id, "began:second")
    gates = [Gate(stage.folder / f"gate-{number}") for number in range(4)]
    runs = []
    for one in gates:
        runs.append(await stage.trigger("stepping_held", str(one)))
        one.open()
    for run in runs:
        await run.result(timeout=30)
    gate.open()
    await held.result(timeout=30)
    assert stage.journal.most_at_once()["stepping_held"] == 1
    await stage.check()


async def test_a_run_longer_than_the_consumer_timeout_runs_once_among_many(frail: Stage) -> None:
    frail.node.set_consumer_timeout(4)
    try:
        await frail.worker(processes=2, consumer_timeout=4)
        run = await frail.trigger("slow", 14.0)
        assert await run.result(timeout=30) == 14.0
        assert len(frail.journal.of(run.run_id, "started")) == 1
        await frail.check()
    finally:
        frail.node.set_consumer_timeout(None)


def told(stage: Stage, run_id: str, fact: str) -> int:
    return len(stage.journal.of(run_id, fact))


async def inflight_queues(stage: Stage) -> int:

    vhost = quote(urlsplit(stage.url).path[1:], safe="")
    queues = stage.node.api("GET", f"/api/queues/{vhost}?columns=name")
    return sum(queue["name"].startswith("bt.inflight.") for queue in queues)
