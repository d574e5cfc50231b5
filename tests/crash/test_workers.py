"""Workers that die, freeze, block, or are told to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.crash.stage import Gate, Stage, eventually, kill

pytestmark = pytest.mark.anyio


async def test_a_killed_worker_loses_no_run(stage: Stage, gate: Gate) -> None:
    worker = await stage.worker(processes=2)
    runs = [await stage.trigger("held", str(gate)) for _ in range(4)]
    victim = (await stage.until_started(runs[0].run_id))[0].pid
    held_by_victim = {entry.run_id for entry in stage.journal.running() if entry.pid == victim}
    kill(victim)
    for run_id in held_by_victim:
        again = (await stage.until_started(run_id, times=2))[1]
        assert again.pid != victim
        assert again.attempt == 2
    gate.open()
    assert await runs[0].result(timeout=10) == str(gate)
    await worker.said("killed by signal 9 (SIGKILL)")
    await stage.check()


async def test_a_task_that_exits_is_buried_and_the_others_go_on(stage: Stage) -> None:
    worker = await stage.worker(processes=2)
    poison = await stage.trigger("exiting", 17)
    siblings = [await stage.trigger("slow", 0.3) for _ in range(20)]
    (dead,) = await stage.until_dead("exiting", timeout=30)
    assert dead.run_id == poison.run_id
    assert dead.reason == "crashed"
    assert dead.attempts == 3
    starts = stage.journal.of(poison.run_id, "started")
    assert [entry.attempt for entry in starts] == [1, 2, 3]
    assert len({entry.pid for entry in starts}) == 3
    for sibling in siblings:
        await stage.until_finished(sibling.run_id)
    await worker.said("exit code 17", times=3)
    await stage.check()


async def test_told_to_stop_a_worker_finishes_its_runs(stage: Stage) -> None:
    worker = await stage.worker(heartbeat=2, grace=30)
    longer_than_three_heartbeats = await stage.trigger("slow", 7)
    await stage.until_started(longer_than_three_heartbeats.run_id)
    os.kill(worker.process.pid, signal.SIGTERM)
    await worker.said("lets 1 run(s) finish")
    waiting = await stage.trigger("quick", 1)
    assert await worker.process.wait() == 0
    assert await longer_than_three_heartbeats.result(timeout=1) == 7
    assert stage.journal.of(waiting.run_id) == [], "work was taken after the order to stop"
    stage.workers.remove(worker)
    await stage.worker()
    await stage.check()


async def test_what_does_not_finish_in_time_is_handed_back_uncounted(
    stage: Stage, gate: Gate
) -> None:
    worker = await stage.worker(grace=0.5)
    runs = [await stage.trigger("held", str(gate)) for _ in range(3)]
    for run in runs:
        await stage.until_started(run.run_id)
    assert await worker.stop(timeout=8) == 0
    await worker.said("hands back 3 run(s)")
    stage.workers.remove(worker)
    await stage.worker()
    for run in runs:
        assert [entry.attempt for entry in await stage.until_started(run.run_id, times=2)] == [1, 1]
    gate.open()
    await stage.check()


async def test_a_run_of_a_foreign_message_without_id_is_handed_back_too(stage: Stage) -> None:
    worker = await stage.worker(grace=0.5)
    stage.put("slow", b"\x14", content_type="application/msgpack")  # 20
    (first,) = await eventually(stage.journal.running, "start of the run")
    assert await worker.stop(timeout=8) == 0
    await worker.said("hands back 1 run(s)")
    stage.workers.remove(worker)
    second_worker = await stage.worker()
    second = (await stage.until_started(first.run_id, times=2))[1]
    assert second.attempt == 1
    await second_worker.kill()


async def test_the_end_of_the_supervisor_is_the_end_of_its_children(
    stage: Stage, gate: Gate
) -> None:
    worker = await stage.worker(processes=2)
    runs = [await stage.trigger("held", str(gate)) for _ in range(3)]
    for run in runs:
        await stage.until_started(run.run_id)
    children = worker.children
    os.kill(worker.process.pid, signal.SIGKILL)
    await worker.process.wait()
    gate.open()
    await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "end")
    for run in runs:
        assert await run.result(timeout=5) == str(gate)
    stage.workers.remove(worker)
    await stage.worker()
    await stage.check()


async def test_a_blocked_event_loop_is_named_and_its_run_is_not_run_again(stage: Stage) -> None:
    worker = await stage.worker(heartbeat=2)
    run = await stage.trigger("blocking", 9.0)
    await stage.until_finished(run.run_id)
    await worker.said("the event loop is blocked")
    await worker.said("in blocking")
    await run.result(timeout=15)
    await stage.check()
    assert len(stage.journal.of(run.run_id, "started")) == 1


async def test_a_frozen_worker_is_replaced_and_does_no_harm_when_it_wakes(
    stage: Stage, gate: Gate
) -> None:
    worker = await stage.worker(processes=2, heartbeat=2)
    run = await stage.trigger("held", str(gate))
    frozen = (await stage.until_started(run.run_id))[0].pid
    os.kill(frozen, signal.SIGSTOP)
    again = (await stage.until_started(run.run_id, times=2))[1]
    assert again.pid != frozen
    os.kill(frozen, signal.SIGCONT)
    await worker.said("resumed")
    gate.open()
    assert await run.result(timeout=10) == str(gate)
    await stage.check()


@pytest.mark.parametrize(
    "kind", ["SystemExit", "KeyboardInterrupt", "CancelledError", "MemoryError"]
)
async def test_no_exception_of_a_task_ends_its_worker(stage: Stage, kind: str) -> None:
    await stage.worker()
    run = await stage.trigger("raising", kind)
    (dead,) = await stage.until_dead("raising")
    assert dead.run_id == run.run_id
    assert dead.error is not None
    await stage.check()
    assert len({entry.pid for entry in stage.journal.entries}) == 1
