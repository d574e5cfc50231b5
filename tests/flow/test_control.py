"""Cancelled runs and paused tasks, on the embedded broker and on RabbitMQ."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from brokertask import (
    App,
    Context,
    Event,
    InvalidOption,
    Retry,
    Run,
    RunCancelled,
    Settings,
    Worker,
)
from brokertask.events import ENDS
from brokertask.testing import Harness
from brokertask.transport.memory import MemoryBroker

pytestmark = pytest.mark.anyio

SECONDS = 30.0
"""How long a test waits for what must happen; only a failing test takes that long."""


@pytest.fixture(params=["memory", "rabbitmq"])
def app(request: pytest.FixtureRequest) -> App:
    url = "memory:" if request.param == "memory" else request.getfixturevalue("amqp_url")
    return App("control", settings=Settings(amqp_url=url))


@pytest.fixture
def own_app() -> App:
    return App("control", settings=Settings(amqp_url="memory:"))


@asynccontextmanager
async def working(app: App, *, grace: float = 5, **options: Any) -> AsyncIterator[Worker]:
    """A worker, and the client connected: an app's embedded broker lives as long as they do."""
    async with app:
        worker = app.worker(**options)
        await worker.start()
        try:
            yield worker
        finally:
            await worker.stop(grace=grace)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what is looked at sets no event
            await asyncio.sleep(0.005)


class Ends:
    """The terminal events of all runs, by run id."""

    def __init__(self) -> None:
        self.by_run: dict[str, list[str]] = {}
        self.reasons: dict[str, str | None] = {}

    def add(self, event: Event) -> None:
        if event.event in ENDS:
            self.by_run.setdefault(event.run_id, []).append(event.event)
            self.reasons[event.run_id] = event.reason


@asynccontextmanager
async def hearing(app: App) -> AsyncIterator[Ends]:
    ends = Ends()
    async with app.client.events() as events:

        async def hear() -> None:
            async for event in events:
                ends.add(event)

        listening = asyncio.create_task(hear())
        try:
            yield ends
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def is_cancelled(run: Run[Any], reason: str = "") -> bool:
    with pytest.raises(RunCancelled) as told:
        await run.result(timeout=SECONDS)
    return told.value.reason == reason


async def test_a_running_run_is_cancelled_and_told_why(app: App) -> None:
    begun, causes, hooked = asyncio.Event(), list[str | None](), list[tuple[str, str, Any]]()

    @app.task
    async def stuck(number: int, ctx: Context) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            causes.append(ctx.cancelled)

    @stuck.on_cancel
    async def clean(ctx: Context, reason: str) -> None:
        hooked.append((ctx.run_id, reason, ctx.payload))

    async with working(app), hearing(app) as ends:
        run = await stuck.trigger(7)
        await begun.wait()
        await app.client.cancel(run.run_id, reason="no longer wanted")
        assert await is_cancelled(run, "no longer wanted")
        await until(lambda: run.run_id in ends.by_run)
        assert causes == ["cancelled"]
        assert hooked == [(run.run_id, "no longer wanted", 7)]
        assert ends.by_run == {run.run_id: ["cancelled"]}


async def test_a_queued_run_is_cancelled_before_it_starts(app: App) -> None:
    started = list[int]()

    @app.task(concurrency=1)
    async def work(number: int) -> int:
        started.append(number)
        return number

    async with app:
        # No worker yet: the order is older than the worker.
        runs = await work.trigger_many([1, 2, 3])
        await app.client.cancel(runs[1].run_id, reason="too late")
        await app.client.cancel(runs[1].run_id, reason="said twice")
        async with working(app), hearing(app):
            assert await runs[2].result(timeout=SECONDS) == 3
            assert await is_cancelled(runs[1], "too late")
        assert started == [1, 3]


async def test_a_retry_that_waits_is_cancelled_when_it_comes_up(own_app: App) -> None:
    attempts = list[int]()

    @own_app.task(retry=Retry(max_attempts=5, min_delay=3600, max_delay=3600))
    async def flaky(ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ConnectionError

    @own_app.task
    async def later() -> None:
        attempts.append(99)

    @own_app.task
    async def sleeper(ctx: Context) -> None:
        attempts.append(50)
        await ctx.sleep("2h")
        attempts.append(51)

    async with Harness(own_app) as harness:
        runs = [
            await flaky.trigger(),
            await later.trigger(delay="3h"),
            await sleeper.trigger(),
        ]
        await harness.advance("1m")
        for run in runs:
            await own_app.client.cancel(run.run_id)
        await harness.drain()
        assert sorted(attempts) == [1, 50]
        assert [harness[run].status for run in runs] == ["cancelled"] * 3
        assert harness.dead_letters("flaky") == []


async def test_a_run_that_has_ended_stays_as_it_is(app: App) -> None:
    @app.task
    async def quick() -> int:
        return 1

    async with working(app), hearing(app) as ends:
        run = await quick.trigger()
        assert await run.result(timeout=SECONDS) == 1
        await app.client.cancel(run.run_id)
        other = await quick.trigger()
        assert await other.result(timeout=SECONDS) == 1
        await until(lambda: other.run_id in ends.by_run)
        assert ends.by_run[run.run_id] == ["completed"]


async def test_of_a_cancellation_and_a_completion_one_counts(app: App) -> None:
    @app.task(concurrency=20)
    async def short(number: int, ctx: Context) -> int:
        return await ctx.step("count", count, number)

    async def count(number: int) -> int:
        await asyncio.sleep(0.001 * (number % 7))
        return number

    async with working(app), hearing(app) as ends:
        runs = await short.trigger_many(range(60))
        await asyncio.gather(*(app.client.cancel(run.run_id) for run in runs))
        for run in runs:
            with suppress(RunCancelled):
                assert await run.result(timeout=SECONDS) >= 0
        last = await short.trigger(0)
        await last.result(timeout=SECONDS)
        await until(lambda: len(ends.by_run) == len(runs) + 1)
        assert {len(each) for each in ends.by_run.values()} == {1}


async def test_what_fails_as_it_is_cancelled_is_not_retried(app: App) -> None:
    begun, failed = asyncio.Event(), list[int]()

    @app.task(retry=Retry(max_attempts=3, min_delay=0))
    async def unwilling(ctx: Context) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("instead") from None

    @unwilling.on_failure
    async def hook(ctx: Context, error: BaseException) -> None:
        failed.append(1)

    async with working(app):
        run = await unwilling.trigger()
        await begun.wait()
        await app.client.cancel(run.run_id)
        assert await is_cancelled(run)
        assert failed == []


async def test_a_result_that_came_all_the_same_counts(app: App) -> None:
    begun = asyncio.Event()

    @app.task
    async def finishes(ctx: Context) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done anyway"
        return "never"

    async with working(app), hearing(app) as ends:
        run = await finishes.trigger()
        await begun.wait()
        await app.client.cancel(run.run_id)
        assert await run.result(timeout=SECONDS) == "done anyway"
        await until(lambda: run.run_id in ends.by_run)
        assert ends.by_run[run.run_id] == ["completed"]


async def test_cancelled_in_the_middle_of_its_checkpoints(app: App) -> None:
    saved = asyncio.Event()

    @app.task
    async def steps(ctx: Context) -> None:
        for number in range(1_000):
            await ctx.step(f"step {number}", step, number)
            if number == 5:
                saved.set()

    async def step(number: int) -> int:
        return number

    async with working(app) as worker, hearing(app) as ends:
        run = await steps.trigger()
        await saved.wait()
        await app.client.cancel(run.run_id)
        assert await is_cancelled(run)
        await until(lambda: worker.busy == 0 and run.run_id in ends.by_run)
        assert ends.by_run[run.run_id] == ["cancelled"]
        depth = await worker_depth(worker, app, "steps")
        assert depth == 0


async def worker_depth(worker: Worker, app: App, task: str) -> int:
    transport = app.connect()
    await transport.open(timeout=SECONDS)
    try:
        depth = await transport.depth(app.settings.names.queue(task))
    finally:
        await transport.close()
    assert depth is not None
    return depth.ready


async def test_cancelled_while_its_worker_drains(app: App) -> None:
    begun = asyncio.Event()

    @app.task
    async def stuck() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with working(app) as worker, hearing(app) as ends:
        run = await stuck.trigger()
        await begun.wait()
        stopping = asyncio.create_task(worker.stop(grace=SECONDS))
        await until(lambda: not worker.ready)
        await app.client.cancel(run.run_id)
        await stopping
        assert await is_cancelled(run)
        await until(lambda: run.run_id in ends.by_run)
        assert ends.by_run[run.run_id] == ["cancelled"]


async def test_a_worker_that_starts_later_knows(app: App) -> None:
    begun, again = asyncio.Event(), list[int]()

    @app.task
    async def stuck() -> None:
        again.append(1)
        begun.set()
        await asyncio.Event().wait()

    async with app, hearing(app) as ends:
        first = app.worker()
        await first.start()
        run = await stuck.trigger()
        await begun.wait()
        await first.stop(grace=0)
        # Handed back by the first worker, cancelled while there is none.
        await app.client.cancel(run.run_id)
        assert ends.by_run == {}
        async with app.worker():
            assert await is_cancelled(run)
        assert again == [1]


async def test_children_end_with_the_run_that_triggered_them(app: App) -> None:
    begun = list[str]()

    @app.task
    async def leaf(name: str) -> None:
        begun.append(name)
        await asyncio.Event().wait()

    @app.task
    async def branch(name: str) -> None:
        begun.append(name)
        await leaf.trigger(f"{name}.leaf")
        await asyncio.Event().wait()

    @app.task
    async def root(name: str) -> None:
        begun.append(name)
        await branch.trigger(f"{name}.branch")
        await asyncio.Event().wait()

    async with working(app), hearing(app) as ends:
        ended, spared = await root.trigger("a"), await root.trigger("b")
        await until(lambda: len(begun) == 6)
        await app.client.cancel(ended.run_id, children=True)
        await until(lambda: len(ends.by_run) == 3)
        await app.client.cancel(spared.run_id)
        assert await is_cancelled(spared)
        await until(lambda: len(ends.by_run) == 4)
        assert {each for some in ends.by_run.values() for each in some} == {"cancelled"}


async def test_who_ignores_its_cancellation_keeps_its_slot_until_it_ends(
    own_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokertask.executor.CALLED_OFF_GRACE", 0.05)
    let_go, begun, ran = threading.Event(), threading.Event(), list[int]()

    @own_app.task(concurrency=2)
    def deaf(number: int) -> int:
        ran.append(number)
        if number == 0:
            begun.set()
            let_go.wait(SECONDS)
        return number

    async with working(own_app) as worker, hearing(own_app) as ends:
        run = await deaf.trigger(0)
        await until(begun.is_set)
        await own_app.client.cancel(run.run_id)
        assert await is_cancelled(run)
        await until(lambda: worker.busy == 0)
        # One slot is left for the others, one after the other.
        runs = await deaf.trigger_many([1, 2, 3])
        assert [await each.result(timeout=SECONDS) for each in runs] == [1, 2, 3]
        let_go.set()
        await until(lambda: len(ends.by_run) == 4)
        assert ends.by_run[run.run_id] == ["cancelled"]
        assert ran == [0, 1, 2, 3]


async def test_a_paused_task_begins_nothing_until_it_is_resumed(app: App) -> None:
    began, go_on = list[int](), asyncio.Event()

    @app.task(concurrency=5)
    async def work(number: int) -> int:
        began.append(number)
        if number == 0:
            await go_on.wait()
        return number

    @app.task
    async def other() -> int:
        return 7

    async with working(app) as worker:
        first = await work.trigger(0)
        await until(lambda: began == [0])
        await app.client.pause("work")
        await until(lambda: "work" in worker.paused)
        waiting = await work.trigger(1)
        # What has begun goes on, and so do other tasks.
        assert await (await other.trigger()).result(timeout=SECONDS) == 7
        go_on.set()
        assert await first.result(timeout=SECONDS) == 0
        assert began == [0]
        assert worker.ready
        # A worker that starts now starts paused.
        async with app.worker() as late:
            assert late.ready
            assert late.paused == {"work"}
            assert await (await other.trigger()).result(timeout=SECONDS) == 7
            assert began == [0]
            await app.client.resume("work")
            assert await waiting.result(timeout=SECONDS) == 1


async def test_a_pause_survives_a_lost_connection(own_app: App) -> None:
    broker, began = MemoryBroker(), list[int]()

    @own_app.task
    async def work(number: int) -> int:
        began.append(number)
        return number

    with own_app.on(broker):
        async with working(own_app) as worker:
            await own_app.client.pause("work")
            await until(lambda: "work" in worker.paused)
            run = await work.trigger(1)
            broker.drop_connections()
            broker.stop()
            broker.start()
            for _ in range(3):
                await own_app.client.pause("work")
            await own_app.client.resume("nothing")
            assert began == []
            await own_app.client.resume("work")
            assert await run.result(timeout=SECONDS) == 1


async def test_pausing_again_and_again_leaves_it_as_it_was_said_last(app: App) -> None:
    @app.task
    async def work(number: int) -> int:
        return number

    async with working(app) as worker:
        for _ in range(10):
            await app.client.pause("work")
            await app.client.resume("work")
        assert await (await work.trigger(1)).result(timeout=SECONDS) == 1
        for _ in range(3):
            await app.client.resume("work")
            await app.client.pause("work")
        await until(lambda: "work" in worker.paused)
        run = await work.trigger(2)
        await app.client.resume("work")
        assert await run.result(timeout=SECONDS) == 2


async def test_orders_are_given_from_threads_too(own_app: App) -> None:
    @own_app.task
    async def work() -> int:
        return 1

    def order(run_id: str) -> None:
        own_app.client.cancel_sync(run_id, reason="from a thread")
        own_app.client.pause_sync("work")
        own_app.client.resume_sync("work")

    async with working(own_app) as worker:
        await own_app.client.pause("work")
        await until(lambda: "work" in worker.paused)
        run = await work.trigger()
        await asyncio.to_thread(order, run.run_id)
        assert await is_cancelled(run, "from a thread")


async def test_orders_that_make_no_sense_are_refused(own_app: App) -> None:
    async with own_app:
        with pytest.raises(InvalidOption, match="run id"):
            await own_app.client.cancel("")
        with pytest.raises(InvalidOption, match="task id"):
            await own_app.client.pause("two words")
        with pytest.raises(InvalidOption, match="500"):
            await own_app.client.cancel("r", reason="x" * 501)


async def test_without_a_log_a_worker_works_as_before(
    own_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = App("control", settings=Settings(amqp_url="memory:", declare=False))

    @quiet.task
    async def work() -> int:
        return 1

    broker = MemoryBroker()
    with quiet.on(broker):
        transport = quiet.connect()
        await transport.open(timeout=1)
        await transport.declare(quiet.topology())
        await transport.delete(quiet.settings.names.control)
        async with working(quiet):
            assert await (await work.trigger()).result(timeout=SECONDS) == 1
        await transport.close()
    assert "hears of no cancelled run" in caplog.text
