"""Runs of several steps on the embedded broker: attempts, sleeps, cuts, crashes and drains."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from brokertask import (
    Abort,
    App,
    CallNext,
    Context,
    Event,
    Retry,
    RetryAfter,
    Run,
    RunFailed,
    Settings,
)
from brokertask.deadletter import DeadLetter
from brokertask.envelope import Envelope, Message
from brokertask.testing import DrainTimeout, Harness
from brokertask.topology import Binding, Names, Queue
from brokertask.transport.base import Delivery
from brokertask.transport.memory import MemoryTransport
from tests.flow.rehearsal import Rehearsal, StagedApp

pytestmark = pytest.mark.anyio

NAMES = Names()
HOUR_MS = 3_600_000
AT_ONCE = Retry(max_attempts=5, min_delay=0)


class Order(BaseModel):
    number: int
    at: datetime


class GatewayDown(Exception):
    pass


class Journal(list[str]):
    """What was done, in order."""

    async def do(self, what: str) -> str:
        self.append(what)
        return what

    async def do_slowly(self, what: str) -> str:
        self.append(f"began {what}")
        for _ in range(20):
            await asyncio.sleep(0)
        self.append(f"ended {what}")
        return what

    def do_in_a_thread(self, what: str) -> str:
        assert threading.current_thread() is not threading.main_thread()
        self.append(what)
        return what


class Gate:
    """Where code waits for the test, in the event loop or in a thread."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        self.passed = 0
        self._loop = asyncio.get_running_loop()
        self._opened = threading.Event()

    async def __call__(self) -> str:
        self.reached.set()
        await self.opened.wait()
        self.passed += 1
        return "passed"

    def in_a_thread(self) -> str:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self._opened.wait(timeout=5)
        self.passed += 1
        return "passed"

    def open(self) -> None:
        self.opened.set()
        self._opened.set()


class Heard(list[Message]):
    """Messages, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def hear(self, message: Message) -> None:
        self.append(message)
        self._more.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self._more.clear()
                await self._more.wait()


@pytest.fixture
def app() -> App:
    return App("flow", settings=Settings(amqp_url="memory:"))


@pytest.fixture
def did() -> Journal:
    return Journal()


def letters(harness: Harness, task: str = "work") -> list[tuple[str, int]]:
    return [(dead.reason, dead.attempts) for dead in harness.dead_letters(task)]


def last_error(harness: Harness, task: str = "work") -> str:
    (dead,) = harness.dead_letters(task)
    return dead.errors[-1].message


def keys(dead: DeadLetter) -> list[str]:
    assert dead.envelope is not None
    return [step.key for step in dead.envelope.memory.steps]


async def assert_clean(harness: Harness) -> None:
    """Nothing is left of any run: no message in any queue, no queue of a worker that ended."""
    await harness.stop_worker()
    await harness.advance("1d")
    control = harness.app.settings.names.control
    queues = [name for name in harness.broker.queues if name != control]
    left = {name: harness.broker.messages(name) for name in queues}
    assert {name for name, messages in left.items() if messages} == set()
    assert [name for name in harness.broker.queues if ".inflight." in name] == []


@asynccontextmanager
async def connected(harness: Harness) -> AsyncIterator[MemoryTransport]:
    transport = MemoryTransport(harness.broker)
    await transport.open(timeout=1)
    yield transport
    await transport.close()


@asynccontextmanager
async def checkpoints(harness: Harness, task: str = "work") -> AsyncIterator[Heard]:
    """Hear of every message that goes to an inflight queue."""
    heard = Heard()
    async with connected(harness) as transport:
        queue = Queue("checkpoints", {"x-queue-type": "classic"})
        binding = Binding(NAMES.inflight, queue.name, task)
        await transport.listen(queue, (binding,), heard.hear)
        yield heard


# --- steps and attempts --------------------------------------------------------------------------


async def test_a_finished_step_is_not_done_again_by_a_later_attempt(app: App, did: Journal) -> None:
    seen: list[Order] = []

    async def fetch(number: int) -> Order:
        did.append("fetched")
        return Order(number=number, at=datetime.now(UTC))

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> Order:
        seen.append(await ctx.step("fetch", fetch, 7))
        if ctx.attempt < 3:
            raise GatewayDown
        return seen[-1]

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == seen[0]
        assert (len(seen), seen[0]) == (3, seen[2])
        assert did == ["fetched"]
        await assert_clean(harness)


async def test_the_retries_of_a_step_are_within_the_attempt(app: App, did: Journal) -> None:
    async def flaky() -> int:
        did.append("asked")
        if len(did) < 4:
            raise GatewayDown
        return len(did)

    @app.task(concurrency=1)
    async def work(ctx: Context) -> int:
        retry = Retry(max_attempts=5, min_delay=60, factor=2, max_delay=600, jitter=False)
        return await ctx.step("flaky", flaky, retry=retry)

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == 4
        assert (harness[run].attempts, harness[run].delays) == (1, [])
        assert harness.clock.now_ms() - began == (60 + 120 + 240) * 1000


async def test_spent_retries_fail_the_attempt_and_what_was_done_is_kept(
    app: App, did: Journal
) -> None:
    async def flaky() -> str:
        did.append("flaky")
        if did.count("flaky") < 4:
            raise GatewayDown
        return "up"

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        return await ctx.step("flaky", flaky, retry=Retry(max_attempts=2, min_delay=0))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "up"
        assert (harness[run].attempts, did.count("before")) == (2, 1)


@pytest.mark.parametrize(
    ("error", "delays", "reason"),
    [(Abort("no use"), [], "aborted"), (RetryAfter(90), [90], "max_attempts")],
)
async def test_what_a_step_raises_decides_for_the_run(
    app: App, error: Exception, delays: list[float], reason: str
) -> None:
    async def refuse() -> None:
        raise error

    @app.task(retry=Retry(max_attempts=2))
    async def work(ctx: Context) -> None:
        await ctx.step("refuse", refuse)

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert (harness[run].delays, harness[run].reason) == (delays, reason)


async def test_sync_functions_run_in_threads_side_by_side(app: App, did: Journal) -> None:
    together = threading.Barrier(3)

    def meet(number: int) -> int:
        together.wait(timeout=5)
        did.do_in_a_thread(str(number))
        return number

    @app.task
    async def work(ctx: Context) -> list[int]:
        return await asyncio.gather(*(ctx.step("meet", meet, number) for number in range(3)))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == [0, 1, 2]
        await assert_clean(harness)


async def test_a_sync_task_has_steps_and_sleeps(app: App, did: Journal) -> None:
    @app.task(retry=AT_ONCE, concurrency=1)
    def work(ctx: Context) -> list[str]:
        texts = [ctx.step_sync("fetch", did.do_in_a_thread, letter) for letter in "ab"]
        ctx.sleep_sync(3)
        texts.append(ctx.step_sync("awaited", did.do, "c"))
        ctx.sleep_sync("1h")
        if ctx.attempt == 1:
            raise GatewayDown
        ctx.sleep_sync("1h")
        return [*texts, ctx.step_sync("last", did.do, "d")]

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == list("abcd")
        assert did == list("abcd")
        assert 0 <= harness.clock.now_ms() - began - 2 * HOUR_MS - 3_000 < 100
        assert harness[run].attempts == 2
        await assert_clean(harness)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_a_step_cannot_end_the_worker(app: App, error: BaseException) -> None:
    def leave() -> None:
        raise error

    @app.task(retry=Retry(max_attempts=1))
    def sync(ctx: Context) -> None:
        ctx.step_sync("leave", leave)

    @app.task(retry=Retry(max_attempts=1))
    async def gathered(ctx: Context) -> None:
        await asyncio.gather(ctx.step("leave", leave))

    @app.task
    async def other() -> str:
        return "still here"

    async with Harness(app) as harness:
        runs = [await sync.trigger(), await gathered.trigger()]
        await harness.drain()
        assert [harness[run].status for run in runs] == ["failed", "failed"]
        assert type(error).__name__ in harness[runs[0]].errors[-1].message
        run = await other.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "still here"


async def test_steps_in_middleware_are_steps_of_the_run(app: App, did: Journal) -> None:
    @app.middleware
    async def around(context: Context, call_next: CallNext) -> Any:
        await context.step("before", did.do, "before")
        result = await call_next(context)
        await context.step("after", did.do, "after")
        if context.attempt == 1:
            raise GatewayDown
        return result

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        return await ctx.step("within", did.do, "within")

    @app.task(retry=AT_ONCE)
    def work_sync(ctx: Context) -> str:
        return ctx.step_sync("within", did.do_in_a_thread, "within")

    async with Harness(app) as harness:
        for task in (work, work_sync):
            run = await task.trigger()
            await harness.drain()
            assert await run.result(timeout=1) == "within"
        assert did == ["before", "within", "after"] * 2


async def test_a_failure_in_gather_does_not_leave_the_others_to_themselves(
    app: App, did: Journal
) -> None:
    async def fail() -> None:
        if did.count("began slow") < 2 and "failed" not in did:
            did.append("failed")
            raise GatewayDown

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        await asyncio.gather(ctx.step("slow", did.do_slowly, "slow"), ctx.step("fail", fail))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert did.count("began slow") == 1
        await assert_clean(harness)


async def test_steps_done_are_kept_when_the_attempt_is_out_of_time(app: App, did: Journal) -> None:
    @app.task(retry=AT_ONCE, timeout=0.05)
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        if ctx.attempt == 1:
            try:
                await asyncio.Event().wait()
            finally:
                await ctx.step("tidy", did.do, "too late")
        return await ctx.step("after", did.do, "after")

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "after"
        assert did == ["before", "after"]
        assert harness[run].errors[0].type == "TimeoutError"


@pytest.mark.parametrize("value", [(1, 2), {"a": {1}}])
async def test_what_would_come_back_as_something_else_buries_the_run(
    app: App, value: object
) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await ctx.step("given", lambda: value)

    async with Harness(app) as harness:
        await work.trigger()
        await harness.drain()
        assert letters(harness) == [("never_retried", 1)]
        assert "step 'given'" in last_error(harness)
        assert "annotate" in last_error(harness)


# --- changed code --------------------------------------------------------------------------------


@pytest.mark.parametrize("catches", [False, True])
async def test_code_that_asks_for_other_steps_is_buried_and_mended_code_goes_on(
    app: App, did: Journal, catches: bool
) -> None:
    steps = ["a", "b", "c"]

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> list[str]:
        results = []
        for name in steps:
            try:
                results.append(await ctx.step(name, did.do, name))
            except Exception:
                if not catches or name == "gate":
                    raise
        if "end" not in steps:
            steps[:] = ["a", "c", "b", "end"]
            raise GatewayDown
        return results

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert letters(harness) == [("step_mismatch", 2)]
        for part in ("the code has changed", "'b'", "'c'", "redrive"):
            assert part in last_error(harness)
        with pytest.raises(RunFailed) as failure:
            await run.result(timeout=1)
        assert failure.value.reason == "step_mismatch"
        assert did == ["a", "b", "c"]
        steps[:] = ["a", "b", "c", "end"]
        await redrive(harness)
        await harness.drain()
        assert harness[run].result == ["a", "b", "c", "end"]
        assert did == ["a", "b", "c", "end"]


async def redrive(harness: Harness, task: str = "work", *, forget: bool = False) -> None:
    """Put a dead run back to work, as `brokertask dead redrive` does."""
    async with connected(harness) as transport:
        taken: asyncio.Queue[Delivery] = asyncio.Queue()
        consumer = await transport.consume(NAMES.dead_queue(task), taken.put_nowait, prefetch=1)
        delivery = await taken.get()
        dead = DeadLetter.read(delivery.message, task=task)
        assert dead.envelope is not None
        again = dead.envelope.redriven(trace={}, now_ms=harness.clock.now_ms(), forget=forget)
        await transport.publish(NAMES.trigger_route(task), again.message(), timeout=1)
        await delivery.ack()
        await consumer.close()


async def test_a_redriven_run_goes_on_behind_its_steps_or_forgets_them(
    app: App, did: Journal
) -> None:
    @app.task(retry=Retry(max_attempts=1))
    async def work(ctx: Context) -> None:
        await ctx.step("a", did.do, "a")
        await ctx.sleep("1h")
        await ctx.step("b", did.do, "b")
        if did.count("b") < 2:
            raise GatewayDown

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        (dead,) = harness.dead_letters("work")
        assert keys(dead) == ["a", "sleep", "b"]
        began = harness.clock.now_ms()
        await redrive(harness)
        await harness.drain()
        assert (did, harness.clock.now_ms()) == (["a", "b"], began)
        await redrive(harness, forget=True)
        await harness.drain()
        assert harness[run].status == "completed"
        assert did == ["a", "b"] * 2
        assert harness.clock.now_ms() - began >= HOUR_MS


async def test_a_step_at_the_end_may_be_added_while_runs_are_under_way(
    app: App, did: Journal
) -> None:
    steps = ["a", "b"]

    @app.task
    async def work(ctx: Context) -> None:
        for name in steps:
            await ctx.step(name, did.do, name)
        await ctx.sleep("1h")
        for name in steps[2:]:
            await ctx.step(f"{name} later", did.do, name)

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.advance("1m")
        assert harness[run].status == "sleeping"
        await harness.drain()
        assert harness[run].status == "completed"


async def test_a_failed_step_is_no_change_of_code_across_sleeps_and_attempts(
    app: App, did: Journal
) -> None:
    """It fails in the first and third pass, and each pass takes the way that follows from that."""
    passes = 0

    async def ask() -> str:
        if passes % 2:
            raise GatewayDown
        return "answer"

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        nonlocal passes
        passes += 1
        await ctx.step("before", did.do, "before")
        try:
            await ctx.step("ask", ask)
            await ctx.step("use", did.do, "use")
        except GatewayDown:
            await ctx.step("instead", did.do, "instead")
        await ctx.sleep("1h", name="pause")
        if ctx.attempt < 3:
            raise GatewayDown
        return await ctx.step("after", did.do, "after")

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "after"
        assert sorted(did) == ["after", "before", "instead", "use"]


# --- sleeps --------------------------------------------------------------------------------------


async def test_a_short_sleep_keeps_its_slot_and_a_long_one_leaves_it(
    app: App, did: Journal
) -> None:
    @app.task(concurrency=1)
    async def work(seconds: float, ctx: Context) -> None:
        did.append(f"{seconds:g}: before")
        await ctx.sleep(seconds)
        did.append(f"{seconds:g}: after")

    async with Harness(app) as harness:
        short, other = await work.trigger_many([5, 0.5])
        await harness.drain()
        assert did == ["5: before", "5: after", "0.5: before", "0.5: after"]
        assert (harness[short].delays, harness[other].delays) == ([], [])
        did.clear()
        long, other = await work.trigger_many([5.001, 0.5])
        await harness.drain()
        assert did == ["5.001: before", "0.5: before", "0.5: after", *did[-2:]]
        assert did[-2:] == ["5.001: before", "5.001: after"], "it ran again from the top"
        assert harness[long].delays == [5.001]


@pytest.mark.parametrize("seconds", [5, 5.5, 61, 3_600, 86_400 * 40])
async def test_a_sleep_is_as_long_as_it_says(app: App, seconds: float) -> None:
    ended: list[int] = []

    @app.task
    async def work(ctx: Context) -> None:
        await ctx.sleep(seconds)
        ended.append(harness.clock.now_ms())

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await harness.drain()
        assert 0 <= ended[0] - began - seconds * 1000 < 100
        assert (len(ended), harness[run].attempts) == (1, 1)
        await assert_clean(harness)


async def test_a_sleep_until_the_past_is_none(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await ctx.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        await ctx.sleep(0)
        now = datetime.fromtimestamp(harness.clock.now_ms() / 1000, UTC)
        await ctx.sleep_until(now + timedelta(hours=1))

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert 0 <= harness.clock.now_ms() - began - HOUR_MS < 100


async def test_a_sleep_to_the_end_of_time_is_a_sleep(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await ctx.sleep_until(datetime.max.replace(tzinfo=UTC))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.advance("40d")
        assert harness[run].status == "sleeping"
        assert letters(harness) == []


async def test_a_remembered_sleep_is_not_slept_again(app: App, did: Journal) -> None:
    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        await ctx.sleep("1h")
        await ctx.sleep(3)
        did.append(f"attempt {ctx.attempt}")
        if ctx.attempt < 3:
            raise GatewayDown

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        await work.trigger()
        await harness.drain()
        assert did == ["attempt 1", "attempt 2", "attempt 3"]
        assert 0 <= harness.clock.now_ms() - began - HOUR_MS - 3_000 < 100


@pytest.mark.parametrize("first", ["sleep", "steps"])
@pytest.mark.parametrize("kind", ["gather", "group"])
async def test_a_run_does_not_fall_asleep_while_its_steps_run(
    app: App, did: Journal, first: str, kind: str
) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        async def branch() -> None:
            await ctx.step("one", did.do_slowly, "one")
            await ctx.step("two", did.do_slowly, "two")

        async def pause() -> None:
            await ctx.sleep("1h")

        branches = (pause, branch) if first == "sleep" else (branch, pause)
        if kind == "gather":
            await asyncio.gather(*(each() for each in branches))
        else:
            async with asyncio.TaskGroup() as group:
                for each in branches:
                    group.create_task(each())
        did.append("end")

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.advance("59m")
        assert did == ["began one", "ended one", "began two", "ended two"]
        assert harness[run].status == "sleeping"
        await harness.drain()
        assert did[4:] == ["end"]
        await assert_clean(harness)


async def test_sleeps_side_by_side_pass_together(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        async def branch(name: str, *hours: int) -> None:
            await ctx.step(name, did.do, name)
            for each in hours:
                await ctx.sleep(f"{each}h")
            await ctx.step(f"end of {name}", did.do, f"end of {name}")

        await asyncio.gather(ctx.sleep("1h"), ctx.sleep(3), ctx.sleep("2h"))
        async with asyncio.TaskGroup() as group:
            group.create_task(branch("a" * 120, *[1] * 12))
            group.create_task(branch("b", 3, 7))

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert 0 <= harness.clock.now_ms() - began - 14 * HOUR_MS < 1_000
        assert len(did) == len(set(did)) == 4
        assert harness[run].attempts == 1


async def test_branches_that_begin_with_a_sleep_name_it(app: App, did: Journal) -> None:
    @app.task
    async def work(named: bool, ctx: Context) -> None:
        async def branch(number: int) -> None:
            await ctx.sleep("1h", name=f"pause {number}" if named else None)
            await ctx.step(f"remind {number}", did.do, str(number))

        await asyncio.gather(branch(1), branch(2))

    async with Harness(app) as harness:
        good, bad = await work.trigger_many([True, False])
        await harness.drain()
        assert harness[good].status == "completed"
        assert sorted(did) == ["1", "2"]
        assert harness[bad].reason == "step_mismatch"
        assert "name" in last_error(harness)


async def test_a_name_may_be_slept_and_numbered_in_a_branch(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        async def branch() -> None:
            for _ in range(3):
                await ctx.step("mail", did.do, "mail")
                await ctx.sleep("1h")

        await asyncio.gather(branch())

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert did == ["mail"] * 3


async def test_a_step_called_sleep_is_a_step(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        text = await ctx.step("sleep", did.do, "a nap")
        await ctx.sleep("1h")
        return text

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "a nap"
        assert did == ["a nap"]


async def test_code_is_told_that_it_sleeps_and_may_tidy_up(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        try:
            await ctx.sleep("1h")
        finally:
            did.append(f"because of {ctx.cancelled}")
            if ctx.cancelled:
                await asyncio.sleep(0)
                did.append("tidied")

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert did == ["because of sleep", "tidied", "because of None"]
        assert harness[run].status == "completed"


@pytest.mark.parametrize("error", [asyncio.CancelledError, BaseException])
async def test_code_that_swallows_its_cancellation_sleeps_all_the_same(
    app: App, did: Journal, error: type[BaseException]
) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        with contextlib.suppress(error):
            await ctx.sleep("1h")
            did.append("slept")
        with contextlib.suppress(error):
            await ctx.step("after", did.do, "after")
        return "done"

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert did == ["slept", "after"]
        assert harness[run].delays == [3600]
        assert await run.result(timeout=1) == "done"


async def test_code_that_ignores_its_cancellation_goes_on_later(app: App, did: Journal) -> None:
    """It is left behind, and what it asks for then is not done."""

    @app.task(concurrency=1)
    async def work(ctx: Context) -> None:
        try:
            await ctx.sleep("1h")
        except asyncio.CancelledError:
            with contextlib.suppress(asyncio.CancelledError):
                await ctx.step("stubborn", did.do, "stubborn")
            raise
        await ctx.step("after", did.do, "after")

    async with Harness(app) as harness:
        await work.trigger()
        await harness.drain()
        assert did == ["after"]


async def test_each_part_between_sleeps_has_the_tasks_timeout(app: App, did: Journal) -> None:
    @app.task(timeout=1.5, retry=Retry(max_attempts=2, min_delay=0))
    async def work(ctx: Context) -> None:
        for number in range(4):
            await ctx.step(f"part {number}", asyncio.sleep, 0.5)
            await ctx.sleep("1h")
            did.append(str(ctx.deadline))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert harness[run].attempts == 1


async def test_a_timeout_around_a_sleep_is_none_of_the_long_ones(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        async with asyncio.timeout(5):
            await ctx.sleep("1h")
        did.append("slept")

    async with Harness(app) as harness:
        await work.trigger()
        await harness.drain()
        assert did == ["slept"]


async def test_a_sleep_in_a_task_that_nobody_cancels_leaves_nothing_behind(app: App) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))

    @app.task
    async def work(ctx: Context) -> None:
        await asyncio.wait({asyncio.ensure_future(ctx.sleep("1h"))})

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
    gc.collect()
    assert complaints == []


# --- what a run remembers ------------------------------------------------------------------------


async def test_a_full_memory_buries_the_run_and_names_what_fills_it(did: Journal) -> None:
    settings = Settings(amqp_url="memory:", max_memory_bytes=20_000)
    app = App("flow", settings=settings)

    async def page(size: int) -> bytes:
        return b"x" * size

    @app.task
    async def work(ctx: Context) -> None:
        for size in (3_000, 9_000, 5_000):
            await ctx.step(f"page of {size}", page, size)
        with contextlib.suppress(Exception):
            await ctx.step("the last one", page, 4_000)

    async with Harness(app) as harness:
        await work.trigger()
        await harness.drain()
        (dead,) = harness.dead_letters("work")
        assert (dead.reason, dead.attempts) == ("memory_full", 1)
        for part in ("'page of 9000' 9", "'page of 5000' 5", "'the last one' 4", "20000"):
            assert part in dead.errors[-1].message
        assert keys(dead) == ["page of 3000", "page of 9000", "page of 5000"]


async def test_a_large_memory_can_be_seen_and_redriven(did: Journal) -> None:
    app = App("flow", settings=Settings(amqp_url="memory:", max_memory_bytes=8_388_608))

    async def page(number: int) -> bytes:
        did.append(f"page {number}")
        return bytes([number]) * 900_000

    @app.task(retry=Retry(max_attempts=1))
    async def work(ctx: Context) -> list[int]:
        pages = [await ctx.step("page", page, number) for number in range(5)]
        if did.count("tried") == 0:
            did.append("tried")
            raise GatewayDown
        return [each[0] for each in pages]

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert letters(harness) == [("max_attempts", 1)]
        await redrive(harness)
        await harness.drain()
        assert harness[run].result == [0, 1, 2, 3, 4]
        assert did == [*(f"page {number}" for number in range(5)), "tried"]


async def test_a_nearly_full_memory_is_said(caplog: pytest.LogCaptureFixture, did: Journal) -> None:
    app = App("flow", settings=Settings(amqp_url="memory:", max_memory_bytes=1_024))

    @app.task
    async def work(ctx: Context) -> None:
        await ctx.step("page", did.do, "x" * 900)

    async with Harness(app) as harness:
        run = await work.trigger()
        with caplog.at_level(logging.WARNING, "brokertask.task"):
            await harness.drain()
        (warning,) = harness[run].warnings
        assert harness[run].status == "completed"
    assert warning in caplog.text
    assert "the limit is 1024" in warning
    assert "xxx" not in caplog.text


async def test_checkpoint_retry_writes_no_checkpoint_and_forgets_nothing_in_order(
    app: App, did: Journal
) -> None:
    @app.task(checkpoint="retry", retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        await ctx.step("a", did.do, "a")
        if ctx.attempt == 1:
            raise GatewayDown
        await ctx.step("b", did.do, "b")
        await ctx.sleep("1h")
        await asyncio.gather(ctx.step("c", did.do, "c"), ctx.sleep("1h"))
        if ctx.attempt == 2:
            raise GatewayDown
        await ctx.step("d", did.do, "d")

    async with Harness(app) as harness, checkpoints(harness) as heard:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert did == list("abcd")
        assert heard == []


async def test_checkpoint_retry_is_handed_on_by_a_drain(app: App, did: Journal) -> None:
    gate = Gate()

    @app.task(checkpoint="retry", retry=Retry(max_attempts=1))
    async def work(ctx: Context) -> str:
        await ctx.step("a", did.do, "a")
        await gate()
        return "done"

    async with Harness(app) as harness:
        run = await work.trigger()
        await gate.reached.wait()
        await harness.stop_worker(grace=0)
        gate.open()
        async with app.worker():
            assert await run.result(timeout=5) == "done"
        assert did == ["a"]


# --- progress and metadata -----------------------------------------------------------------------


async def test_progress_and_metadata_reach_whoever_listens(app: App, did: Journal) -> None:
    heard: list[Event] = []

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        ctx.progress(1, 4)
        ctx.metadata["stage"] = "first"
        if ctx.attempt == 1:
            raise GatewayDown
        await ctx.sleep("1h")
        assert ctx.metadata["stage"] == "first"
        ctx.metadata["stage"] = "second"
        ctx.progress(4, 4)

    async with Harness(app) as harness, app.client.events("#.work") as events:
        run = await work.trigger()
        await harness.drain()
        record = harness[run]
        assert (record.status, record.progress) == ("completed", (4, 4))
        assert record.metadata == {"stage": "second"}
        while not heard or heard[-1].event != "completed":
            heard.append(await anext(events))
        assert [event.event for event in heard if event.event != "progress"] == [
            "retrying",
            "sleeping",
            "completed",
        ]
        told = [(e.done, e.total) for e in heard if e.event == "progress"]
        assert (told[0], told[-1]) == ((1, 4), (4, 4))
        assert all(event.metadata is not None for event in heard if event.event != "progress")


async def test_progress_is_not_told_more_often_than_it_is_read(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        for done in range(1_000):
            ctx.progress(done)
            await asyncio.sleep(0)

    async with Harness(app) as harness, app.client.events("progress.work") as events:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].progress == (999, None)
    assert len([event async for event in events]) <= 5


async def test_a_thread_that_was_left_behind_tells_nothing_more(app: App) -> None:
    go_on, told = threading.Event(), threading.Event()

    @app.task(retry=Retry(max_attempts=1), timeout=0.05)
    def work(ctx: Context) -> None:
        go_on.wait()
        ctx.progress(1, 2)
        ctx.metadata["late"] = True
        told.set()

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        go_on.set()
        await asyncio.to_thread(told.wait)
        await harness.drain()
        assert (harness[run].status, harness[run].progress) == ("failed", None)


async def test_metadata_changed_in_place_does_not_break_the_run(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        noted: list[object] = ["a"]
        ctx.metadata["noted"] = noted
        noted.append(object())
        return "done"

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "done"
        assert harness[run].metadata == {"noted": ["a"]}


# --- cuts, doubles and other workers -------------------------------------------------------------
#
# `test_programs` has them at every turn of the event loop; here is what they look like.


@pytest.mark.parametrize("late", [False, True])
async def test_a_cut_during_a_step_takes_the_message_not_the_work(
    app: App, did: Journal, late: bool
) -> None:
    gate = Gate()

    @app.task(concurrency=1, retry=Retry(max_attempts=1))
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        await ctx.step("gate", gate)
        return await ctx.step("after", did.do, "after")

    async with Harness(app) as harness:
        run = await work.trigger()
        await gate.reached.wait()
        if late:
            # What comes back to the inflight queue is too old, and goes on to the task's queue.
            harness.clock.advance_to(harness.clock.now_ms() + 60_000)
        harness.broker.drop_connections()
        gate.open()
        await harness.drain()
        assert await run.result(timeout=1) == "after"
        assert (gate.passed, did) == (1, ["before", "after"])
        assert harness[run].attempts == 1
        await assert_clean(harness)


async def test_a_cut_costs_none_of_several_runs(app: App, did: Journal) -> None:
    """One is in the inflight queue, one still in the task's, and none has a slot to spare."""
    plain, stepped = Gate(), Gate()

    @app.task(concurrency=2, retry=Retry(max_attempts=1))
    async def work(number: int, ctx: Context) -> str:
        if number % 2:
            await ctx.step("before", did.do, f"before {number}")
        await (stepped if number % 2 else plain)()
        return await ctx.step("after", did.do, f"after {number}")

    async with Harness(app) as harness:
        runs = await work.trigger_many(range(6))
        for gate in (plain, stepped):
            await gate.reached.wait()
        harness.broker.drop_connections()
        plain.open()
        assert await runs[0].result(timeout=5) == "after 0"
        stepped.open()
        await harness.drain()
        assert [harness[run].result for run in runs] == [f"after {n}" for n in range(6)]
        assert len(did) == len(set(did)) == 9
        await assert_clean(harness)


async def test_during_an_alarm_a_step_waits_and_makes_no_further_queues(did: Journal) -> None:
    app, gate = App("flow", settings=Settings(amqp_url="memory:", publish_timeout=0.01)), Gate()

    @app.task(retry=Retry(max_attempts=1))
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        await ctx.step("gate", gate)
        return await ctx.step("after", did.do, "after")

    async with Harness(app) as harness:
        run = await work.trigger()
        await gate.reached.wait()
        harness.broker.block()
        gate.open()
        with pytest.raises(DrainTimeout):
            await harness.drain(timeout=2)
        assert did == ["before"], "the next step began before this one was safe"
        harness.broker.unblock()
        await harness.drain()
        assert await run.result(timeout=1) == "after"
        assert len([name for name in harness.broker.queues if ".inflight." in name]) == 1
        await assert_clean(harness)


async def test_a_run_that_another_worker_has_taken_goes_on_there(did: Journal) -> None:
    """The first worker alone loses its connection, while it is at a step that takes its time."""
    app, gates = StagedApp(), [Gate(), Gate()]

    @app.task(concurrency=1, retry=Retry(max_attempts=2))
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        try:
            await ctx.step("gate", gates[ctx.attempt - 1])
        finally:
            did.append(f"attempt {ctx.attempt}: {ctx.cancelled}")
        return await ctx.step("after", did.do, "after")

    async with Rehearsal(app) as rehearsal:
        run, first = await work.trigger(), rehearsal.worker
        await gates[0].reached.wait()
        cut = rehearsal.transport.cut
        await rehearsal.start_worker()
        rehearsal.clock.advance_to(rehearsal.clock.now_ms() + 60_000)
        cut()
        await gates[1].reached.wait()
        gates[1].open()
        await rehearsal.until_over(run)
        assert did == ["before", "attempt 2: None", "after"]
        await first.stop(grace=0)
        assert did[3:] == ["attempt 1: drain"]
        assert await rehearsal.left() == {}


async def test_a_run_that_comes_back_further_on_takes_the_place_of_what_it_was(
    did: Journal,
) -> None:
    """Another worker had it and put it to sleep; here it is still at an earlier step."""
    app, gates = StagedApp(), [Gate(), Gate()]

    @app.task(concurrency=1, retry=Retry(max_attempts=3))
    async def work(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        try:
            await ctx.step("gate", gates[ctx.attempt - 1])
        finally:
            did.append(f"attempt {ctx.attempt}: {ctx.cancelled}")
        await ctx.sleep("1h")
        return await ctx.step("after", did.do, "after")

    async with Rehearsal(app) as rehearsal:
        run, first = await work.trigger(), rehearsal.worker
        await gates[0].reached.wait()
        cut = rehearsal.transport.cut
        await rehearsal.start_worker()
        second = rehearsal.worker
        rehearsal.clock.advance_to(rehearsal.clock.now_ms() + 60_000)
        cut()
        await gates[1].reached.wait()
        gates[1].open()
        await rehearsal.pass_turns(30)
        assert rehearsal.last(run).event == "sleeping"
        await second.stop()
        for _ in range(10):
            rehearsal.clock.advance_to(rehearsal.clock.now_ms() + HOUR_MS // 4)
            await rehearsal.pass_turns(30)
        assert await run.result(timeout=1) == "after"
        assert did == ["before", "attempt 2: None", "attempt 1: lost", "attempt 2: None", "after"]
        assert (gates[0].passed, gates[1].passed) == (0, 1)
        rehearsal.worker = first
        assert await rehearsal.left() == {}


@pytest.mark.parametrize("when", ["asleep in place", "during a step", "between steps"])
@pytest.mark.parametrize("sync", [False, True])
async def test_a_drain_hands_the_run_on_behind_its_steps(
    app: App, did: Journal, when: str, sync: bool
) -> None:
    gate, passes = Gate(), Journal()

    async def in_the_loop(ctx: Context) -> str:
        await ctx.step("before", did.do, "before")
        passes.append("pass")
        if when == "asleep in place":
            gate.reached.set()
            await ctx.sleep(5)
        elif when == "during a step":
            await ctx.step("gate", gate)
        else:
            await gate()
        return await ctx.step("after", did.do, "after")

    def in_a_thread(ctx: Context) -> str:
        ctx.step_sync("before", did.do, "before")
        passes.append("pass")
        if when == "asleep in place":
            ctx.step_sync("gate", gate.reached.set)
            ctx.sleep_sync(5)
        elif when == "during a step":
            ctx.step_sync("gate", gate)
        else:
            gate.in_a_thread()
        return ctx.step_sync("after", did.do, "after")

    function = in_a_thread if sync else in_the_loop
    work = app.task(id="work", retry=Retry(max_attempts=1))(function)

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await work.trigger()
        await gate.reached.wait()
        await harness.stop_worker(grace=5 if when == "asleep in place" else 0)
        assert did == ["before"]
        gate.open()
        async with app.worker():
            await until_heard_of(harness, run.run_id)
        assert await run.result(timeout=1) == "after"
        assert (did, len(passes)) == (["before", "after"], 2)
        if when == "asleep in place":
            assert harness.clock.now_ms() - began >= 5_000


async def until_heard_of(harness: Harness, run_id: str) -> None:
    """Let time pass until a run, which a worker of our own executes, has come to its end."""
    async with asyncio.timeout(5):
        while run_id not in harness.runs or harness[run_id].status == "sleeping":
            await harness.drain()
            await asyncio.sleep(0)


async def test_a_crash_costs_an_attempt_and_no_finished_step(did: Journal) -> None:
    app, gate = StagedApp(), Gate()

    @app.task(retry=Retry(max_attempts=2))
    async def work(ctx: Context) -> int:
        await ctx.step("before", did.do, "before")
        if ctx.attempt == 1:
            await gate()
        await ctx.step("after", did.do, "after")
        return ctx.attempt

    async with Rehearsal(app) as rehearsal:
        run = await work.trigger()
        await gate.reached.wait()
        await rehearsal.crash()
        await rehearsal.until_over(run)
        assert await run.result(timeout=1) == 2
        assert did == ["before", "after"]
        assert await rehearsal.left() == {}


async def test_a_step_that_kills_its_worker_is_buried_with_what_was_done(did: Journal) -> None:
    app, gate = StagedApp(), Gate()

    @app.task(retry=Retry(max_attempts=3))
    async def work(ctx: Context) -> None:
        await ctx.step("before", did.do, "before")
        await ctx.step("kill", gate)

    async with Rehearsal(app) as rehearsal:
        run = await work.trigger()
        for _ in range(3):
            await rehearsal.pass_turns(200)
            assert gate.reached.is_set()
            gate.reached.clear()
            await rehearsal.crash()
        await rehearsal.until_over(run)
        (dead,) = rehearsal.dead_letters("work")
        assert (dead.reason, keys(dead), did) == ("crashed", ["before"], ["before"])


@pytest.mark.parametrize("seq", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_stale_message_is_dropped_a_doubled_one_joins_a_later_one_takes_over(
    app: App, did: Journal, seq: int, count: int
) -> None:
    """The run is at its message number 2 when more of its messages come."""
    gate = Gate()

    @app.task(concurrency=5)
    async def work(ctx: Context) -> list[str]:
        did.append(f"pass {ctx.attempt}")
        texts = [await ctx.step(letter, did.do, letter) for letter in "ab"]
        await gate()
        return [*texts, await ctx.step("c", did.do, "c")]

    async with Harness(app) as harness, checkpoints(harness) as heard, connected(harness) as other:
        run = await work.trigger()
        await gate.reached.wait()
        latest = Envelope.read(heard[-1], task="work", max_bytes=1_000)
        assert latest.seq == 2
        memory = replace(latest.memory, steps=latest.memory.steps[:seq])
        doubled = replace(latest, seq=seq, memory=memory).message()
        for _ in range(count):
            await other.publish(NAMES.trigger_route("work"), doubled, timeout=1)
        with contextlib.suppress(DrainTimeout):
            await harness.drain(timeout=0.05)
        gate.open()
        await harness.drain()
        assert await run.result(timeout=1) == ["a", "b", "c"]
        if seq == 0:
            # Nothing tells it from a trigger that was repeated, once the run is over.
            assert did.count("pass 1") == 1
        else:
            assert did.count("pass 1") == (2 if seq > 2 else 1)
        assert [did.count(letter) for letter in "abc"] == [1, 1, 1]
        await assert_clean(harness)


async def test_messages_of_a_run_that_is_over_come_to_nothing(app: App, did: Journal) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        for letter in "ab":
            await ctx.step(letter, did.do, letter)
        await ctx.sleep("1h")

    async with Harness(app) as harness, checkpoints(harness) as heard, connected(harness) as other:
        await work.trigger()
        await harness.drain()
        assert [message.headers["bt-seq"] for message in heard] == [1, 2]
        for message in heard:
            await other.publish(NAMES.trigger_route("work"), message, timeout=1)
        await harness.drain()
        assert did == ["a", "b"]
        await assert_clean(harness)


async def test_a_held_message_is_renewed_before_the_broker_loses_its_patience(
    did: Journal,
) -> None:
    app = App("flow", settings=Settings(amqp_url="memory:", consumer_timeout=0.3))
    gates = {True: Gate(), False: Gate()}

    @app.task
    async def work(with_a_step: bool, ctx: Context) -> str:
        if with_a_step:
            await ctx.step("before", did.do, "before")
        return await ctx.step("gate", gates[with_a_step])

    async with Harness(app) as harness, checkpoints(harness) as heard:
        runs = await work.trigger_many([True, False])
        await heard.until(lambda: min(count_of(run, heard) for run in runs) > 4)
        for gate in gates.values():
            gate.open()
        await harness.drain()
        assert [harness[run].attempts for run in runs] == [1, 1]
        assert did == ["before"]
        await assert_clean(harness)


def count_of(run: Run[Any], messages: list[Message]) -> int:
    return sum(message.message_id == run.run_id for message in messages)


async def test_a_checkpoint_that_was_given_up_costs_no_run(
    did: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """What follows it must not look like a copy of it."""
    app = App("steps", settings=Settings(amqp_url="memory:", publish_timeout=0.1))

    @app.task(retry=AT_ONCE, timeout=0.3)
    async def work(ctx: Context) -> int:
        if ctx.attempt == 1:
            harness.broker.block()
        await ctx.step("charge", did.do, "charged")
        return ctx.attempt

    async with Harness(app) as harness:
        run = await work.trigger()
        async with asyncio.timeout(10):
            while "attempt 1 of work failed: TimeoutError" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        harness.broker.unblock()
        await harness.drain()
        assert harness[run].status == "completed"
        assert did == ["charged"], "it was remembered, though not saved"
        await assert_clean(harness)


@pytest.mark.parametrize("how", ["step", "sleep"])
async def test_what_is_not_awaited_is_not_taken_for_done(app: App, did: Journal, how: str) -> None:
    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        if how == "step":
            ctx.step("charge", did.do, "charged")  # type: ignore[unused-coroutine]
        else:
            ctx.sleep("1h")  # type: ignore[unused-coroutine]

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert (harness[run].status, harness[run].reason) == ("failed", "never_retried")
        assert "never awaited" in harness[run].errors[-1].message
        assert did == []


async def test_a_step_in_a_task_that_nobody_awaits_is_done_all_the_same(
    app: App, did: Journal
) -> None:
    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        asyncio.create_task(ctx.step("charge", did.do, "charged"))  # noqa: RUF006

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert harness[run].status == "completed"
        assert did == ["charged"]


async def test_threads_of_a_task_take_their_steps_to_its_worker(app: App, did: Journal) -> None:
    @app.task(retry=AT_ONCE)
    def work(ctx: Context) -> list[str]:
        def one(letter: str) -> str:
            return ctx.step_sync(f"step {letter}", did.do, letter)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, "abc"))

    async with Harness(app) as harness:
        run = await work.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == list("abc")
        assert sorted(did) == list("abc")
