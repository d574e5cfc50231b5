"""The life of a run, on the embedded broker and virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from brokertask import (
    Abort,
    App,
    CallNext,
    Context,
    Queue,
    QueueFull,
    Retry,
    RetryAfter,
    RunExpired,
    RunFailed,
    Settings,
)
from brokertask.control import Entry
from brokertask.envelope import Message
from brokertask.testing import DrainTimeout, Harness
from brokertask.topology import Route, topology
from brokertask.transport.base import Delivery
from brokertask.transport.memory import MemoryTransport

pytestmark = pytest.mark.anyio

SECONDS = 10.0


class Order(BaseModel):
    number: int
    item: str = "book"


@pytest.fixture
def app() -> App:
    return App("flow", settings=Settings(amqp_url="memory:"))


async def test_a_run_completes_with_its_result_as_its_type(app: App) -> None:
    @app.task
    async def double(order: Order) -> Order:
        return Order(number=order.number * 2, item=order.item)

    async with Harness(app) as harness:
        run = await double.trigger(Order(number=21))
        await harness.drain()
        assert await run.result(timeout=1) == Order(number=42)
        assert harness[run].status == "completed"
        assert harness[run].attempts == 1


async def test_calling_a_task_is_a_plain_call(app: App) -> None:
    @app.task
    async def double(number: int) -> int:
        return number * 2

    assert await double(4) == 8


async def test_a_failing_task_is_retried_with_exponential_backoff(app: App) -> None:
    @app.task(retry=Retry(max_attempts=5, factor=2, min_delay=1, max_delay=60, jitter=False))
    async def flaky(ctx: Context) -> int:
        if ctx.attempt < 5:
            raise ConnectionError(f"attempt {ctx.attempt}")
        return ctx.attempt

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        run = await flaky.trigger()
        await harness.drain()
        assert harness[run].delays == [1, 2, 4, 8]
        assert await run.result(timeout=1) == 5
        assert harness.clock.now_ms() - began == 15_000


async def test_out_of_attempts_is_buried_with_every_error(app: App) -> None:
    @app.task(retry=Retry(max_attempts=3))
    async def hopeless(order: Order, ctx: Context) -> None:
        raise ConnectionError(f"attempt {ctx.attempt}")

    async with Harness(app) as harness:
        run = await hopeless.trigger(Order(number=7), tags=["a", "b"])
        await harness.drain()
        (dead,) = harness.dead_letters("hopeless")
        assert (dead.run_id, dead.reason, dead.attempts) == (run.run_id, "max_attempts", 3)
        assert [error.message for error in dead.errors] == ["attempt 1", "attempt 2", "attempt 3"]
        assert "raise ConnectionError" in dead.errors[0].traceback
        assert "brokertask/attempt.py" not in dead.errors[0].traceback
        assert dead.tags == ("a", "b")
        with pytest.raises(RunFailed, match="attempt 3") as failure:
            await run.result(timeout=1)
        assert failure.value.reason == "max_attempts"


@pytest.mark.parametrize(
    ("error", "retry", "reason", "attempts"),
    [
        (Abort("no use"), Retry(), "aborted", 1),
        (KeyError("k"), Retry(never_on=LookupError), "never_retried", 1),
        (ValueError("v"), Retry(on=OSError), "never_retried", 1),
        (OSError("o"), Retry(on=OSError, max_attempts=2), "max_attempts", 2),
        (SystemExit(3), Retry(), "never_retried", 1),
        (KeyboardInterrupt(), Retry(), "never_retried", 1),
        (asyncio.CancelledError(), Retry(max_attempts=2), "max_attempts", 2),
    ],
)
async def test_the_error_decides_whether_it_is_retried(
    app: App, error: BaseException, retry: Retry, reason: str, attempts: int
) -> None:
    @app.task(retry=retry)
    async def fails() -> None:
        raise error

    async with Harness(app) as harness:
        run = await fails.trigger()
        await harness.drain()
        assert (harness[run].reason, harness[run].attempts) == (reason, attempts)
        # Whatever a task raises, the worker goes on.
        again = await fails.trigger()
        await harness.drain()
        assert harness[again].status == "failed"


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error", [Unprintable(), ValueError("half a pair \ud800"), ValueError("\0")]
)
async def test_an_error_whose_text_cannot_be_sent_is_an_error_like_any_other(
    app: App, error: Exception
) -> None:
    @app.task(retry=Retry(max_attempts=2))
    async def fails() -> None:
        raise error

    async with Harness(app) as harness:
        await fails.trigger()
        await harness.drain()
        (dead,) = harness.dead_letters("fails")
        assert (dead.reason, dead.attempts) == ("max_attempts", 2)


async def test_values_that_a_validation_refused_are_not_in_the_dead_letter(app: App) -> None:
    @app.task(retry=Retry(max_attempts=1))
    async def checks() -> None:
        try:
            Order.model_validate({"number": "-".join(["hunter", "2"])})
        except ValueError as error:
            raise ConnectionError("refused") from error

    async with Harness(app) as harness:
        await checks.trigger()
        await harness.drain()
        (dead,) = harness.dead_letters("checks")
        assert "ConnectionError: refused" in dead.errors[0].traceback
        assert "ValidationError: number: int_parsing" in dead.errors[0].traceback
        assert "hunter-2" not in repr(dead)


async def test_an_async_function_behind_a_plain_wrapper_is_awaited(app: App) -> None:
    def logged(function: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[int]]:
        @functools.wraps(function)
        def wrapper(number: int) -> Awaitable[int]:
            return function(number)

        return wrapper

    @app.task
    @logged
    async def double(number: int) -> int:
        return number * 2

    async with Harness(app) as harness:
        run = await double.trigger(4)
        await harness.drain()
        assert await run.result(timeout=1) == 8


async def test_code_that_ignores_the_end_of_the_drain_is_handed_back_uncounted(app: App) -> None:
    attempts: list[int] = []
    begun, end = asyncio.Event(), asyncio.Event()

    @app.task(retry=Retry(max_attempts=1))
    async def stubborn(ctx: Context) -> str:
        attempts.append(ctx.attempt)
        begun.set()
        while len(attempts) == 1 and not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()
        return "done"

    async with Harness(app) as harness:
        run = await stubborn.trigger()
        await begun.wait()
        await harness.stop_worker(grace=0)
        async with app.worker():
            assert await run.result(timeout=5) == "done"
        end.set()
        assert attempts == [1, 1]


async def test_events_are_heard_until_the_block_is_left(app: App) -> None:
    @app.task
    async def quick(number: int) -> int:
        return number

    async with Harness(app) as harness:
        async with app.client.events("completed.quick") as events:
            await quick.trigger_many([1, 2])
            await harness.drain()
            heard = [await anext(events), await anext(events)]
        assert [event.event for event in heard] == ["completed", "completed"]
        assert [event async for event in events] == []


async def test_retry_after_chooses_the_delay(app: App) -> None:
    @app.task(retry=Retry(max_attempts=2))
    async def limited(ctx: Context) -> None:
        if ctx.attempt == 1:
            raise RetryAfter(90)

    async with Harness(app) as harness:
        run = await limited.trigger()
        await harness.drain()
        assert harness[run].delays == [90]
        assert harness[run].status == "completed"


async def test_a_message_that_comes_back_before_its_confirm_is_not_taken_for_a_double(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short hop of a delay may be over before the broker has confirmed that it has begun."""
    came = asyncio.Event()
    deliveries = 0
    consume, publish = MemoryTransport.consume, MemoryTransport.publish

    async def counted(self: MemoryTransport, queue: str, receive: Any, **options: Any) -> Any:
        def count(delivery: Delivery) -> None:
            nonlocal deliveries
            deliveries += 1
            receive(delivery)
            if deliveries == 2:
                came.set()

        return await consume(self, queue, count, **options)

    async def confirmed_late(
        self: MemoryTransport, route: Route, *rest: Any, **options: Any
    ) -> None:
        await publish(self, route, *rest, **options)
        if route.exchange == app.settings.names.delay and deliveries == 1:
            await came.wait()

    monkeypatch.setattr(MemoryTransport, "consume", counted)
    monkeypatch.setattr(MemoryTransport, "publish", confirmed_late)

    @app.task
    async def late() -> str:
        return "done"

    async with app, app.worker():
        # A hop of 600 ms, and one for what is left.
        run = await late.trigger(delay=0.65)
        assert await run.result(timeout=10) == "done"
        assert deliveries >= 2


@pytest.mark.parametrize("relied_on", ["by nobody", "by its caller", "by servers"])
async def test_a_run_waits_for_the_confirm_of_its_event_if_somebody_relies_on_it(
    relied_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App("flow", settings=Settings(amqp_url="memory:", results=relied_on == "by its caller"))
    confirmed, begun, published = asyncio.Event(), asyncio.Semaphore(0), asyncio.Semaphore(0)
    publish = MemoryTransport.publish

    async def confirmed_late(
        self: MemoryTransport, route: Route, message: Message, **options: Any
    ) -> None:
        await publish(self, route, message, **options)
        if route.exchange == app.settings.names.events and message.type == "completed":
            published.release()
            await confirmed.wait()

    monkeypatch.setattr(MemoryTransport, "publish", confirmed_late)

    @app.task(concurrency=1)
    async def short() -> None:
        begun.release()

    async with app:
        if relied_on == "by servers":
            transport = app.connect()
            await transport.open(timeout=SECONDS)
            await transport.declare(topology(app.settings.names))
            entry = Entry(kind="recording", subject="server", at_ms=1)
            route = app.settings.names.control_route()
            await transport.publish(route, entry.message(), timeout=SECONDS)
            await transport.close()
        async with app.worker():
            runs = await short.trigger_many([None, None])
            await asyncio.wait_for(published.acquire(), SECONDS)
            if relied_on == "by nobody":
                for _ in runs:
                    await asyncio.wait_for(begun.acquire(), SECONDS)
            else:
                await begun.acquire()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(begun.acquire(), 0.3)
            confirmed.set()


async def test_a_delay_of_any_length_is_met_and_never_early(app: App) -> None:
    started: dict[str, int] = {}

    @app.task
    async def note(ctx: Context) -> None:
        started[ctx.run_id] = harness.clock.now_ms()

    async with Harness(app) as harness:
        began = harness.clock.now_ms()
        delays = [0.015, 0.1, 0.123, 1, 7.77, 3_600, 86_400 * 40]
        runs = [await note.trigger(delay=delay) for delay in delays]
        await harness.drain()
        lateness = [
            started[run.run_id] - began - delay * 1000
            for run, delay in zip(runs, delays, strict=True)
        ]
        # A delay below the shortest rung of the ladder is not worth a round trip.
        assert all(-20 <= late <= 20 for late in lateness[:1])
        assert all(-1 <= late <= 30 for late in lateness[1:]), lateness


async def test_a_run_that_comes_too_late_expires(app: App) -> None:
    ran = []

    @app.task(concurrency=1)
    async def slow(number: int) -> None:
        ran.append(number)

    async with Harness(app) as harness:
        run = await slow.trigger(1, delay="10m", expires="1m")
        await harness.drain()
        assert harness[run].status == "expired"
        assert ran == []
        with pytest.raises(RunExpired):
            await run.result(timeout=1)


async def test_an_attempt_past_its_timeout_is_cancelled_and_told_why(app: App) -> None:
    causes: list[str | None] = []

    @app.task(timeout=0.05, retry=Retry(max_attempts=2, min_delay=0))
    async def stuck(ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            causes.append(ctx.cancelled)

    async with Harness(app) as harness:
        run = await stuck.trigger()
        await harness.drain()
        assert harness[run].status == "failed"
        assert [error.type for error in harness[run].errors] == ["TimeoutError", "TimeoutError"]
        assert causes == ["timeout", "timeout"]


async def test_sync_tasks_run_in_threads_side_by_side(app: App) -> None:
    together = threading.Barrier(3)

    @app.task(concurrency=3)
    def meet(number: int) -> int:
        together.wait(timeout=5)
        assert threading.current_thread() is not threading.main_thread()
        return number

    async with Harness(app) as harness:
        runs = await meet.trigger_many([1, 2, 3])
        await harness.drain()
        assert [await run.result(timeout=1) for run in runs] == [1, 2, 3]


async def test_concurrency_is_never_exceeded(app: App) -> None:
    running = most = 0

    @app.task(concurrency=4)
    async def work(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    async with Harness(app) as harness:
        await work.trigger_many(range(60))
        for _ in range(5):
            await asyncio.sleep(0.002)
            harness.broker.drop_connections()
        await harness.drain()
        assert most == 4


async def test_a_lost_connection_takes_the_lease_not_the_work(app: App) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    starts = 0

    @app.task(retry=Retry(max_attempts=1))
    async def slow() -> str:
        nonlocal starts
        starts += 1
        begun.set()
        await go_on.wait()
        return "done"

    async with Harness(app) as harness:
        run = await slow.trigger()
        await begun.wait()
        harness.broker.drop_connections()
        go_on.set()
        await harness.drain()
        assert await run.result(timeout=1) == "done"
        assert starts == 1
        assert harness.dead_letters("slow") == []


async def test_what_was_done_while_the_broker_was_away_is_settled_not_done_again(app: App) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    starts = 0

    @app.task
    async def slow() -> str:
        nonlocal starts
        starts += 1
        begun.set()
        await go_on.wait()
        return "done"

    async with Harness(app) as harness:
        run = await slow.trigger()
        await begun.wait()
        harness.broker.stop()
        go_on.set()
        await asyncio.sleep(0.01)
        harness.broker.start()
        await harness.drain()
        assert await run.result(timeout=1) == "done"
        assert starts == 1


async def test_a_doubled_message_is_run_once_while_it_runs(app: App) -> None:
    go_on = asyncio.Event()
    starts = 0

    @app.task
    async def slow() -> None:
        nonlocal starts
        starts += 1
        await go_on.wait()

    async with Harness(app) as harness:
        for _ in range(3):
            await slow.trigger(run_id="order-7")
        await asyncio.sleep(0.01)
        go_on.set()
        await harness.drain()
        assert starts == 1
        assert harness.runs["order-7"].status == "completed"


async def test_an_interrupted_run_is_handed_back_uncounted(app: App) -> None:
    attempts: list[int] = []
    begun = asyncio.Event()

    @app.task(retry=Retry(max_attempts=1))
    async def slow(ctx: Context) -> str:
        attempts.append(ctx.attempt)
        begun.set()
        if len(attempts) == 1:
            await asyncio.Event().wait()
        return "done"

    async with Harness(app) as harness:
        run = await slow.trigger()
        await begun.wait()
        async with app.worker():
            await harness.stop_worker(grace=0)
            assert await run.result(timeout=5) == "done"
        assert attempts == [1, 1]


async def test_middleware_wraps_in_order_and_may_change_the_result(app: App) -> None:
    calls: list[str] = []

    @app.middleware
    async def outer(context: Context, call_next: CallNext) -> Any:
        calls.append(f"outer {context.task} {context.payload}")
        return await call_next(context) + 1

    async def inner(context: Context, call_next: CallNext) -> Any:
        calls.append("inner")
        return await call_next(context) * 10

    @app.task(middleware=[inner])
    async def number(value: int) -> int:
        calls.append("task")
        return value

    async with Harness(app) as harness:
        run = await number.trigger(4)
        await harness.drain()
        assert await run.result(timeout=1) == 41
        assert calls == ["outer number 4", "inner", "task"]


async def test_hooks_are_called_and_cannot_change_the_outcome(app: App) -> None:
    heard: list[str] = []

    @app.task(retry=Retry(max_attempts=2))
    async def perhaps(succeed: bool) -> str:
        if not succeed:
            raise ValueError("no")
        return "yes"

    @perhaps.on_success
    async def cheer(ctx: Context, result: str) -> None:
        heard.append(f"{ctx.payload} {result}")
        raise RuntimeError("a broken hook")

    @perhaps.on_failure
    async def mourn(ctx: Context, error: BaseException) -> None:
        heard.append(f"{ctx.payload} {error} after {ctx.attempt}")

    async with Harness(app) as harness:
        good, bad = await perhaps.trigger(True), await perhaps.trigger(False)
        await harness.drain()
        assert sorted(heard) == ["False no after 2", "True yes"]
        assert (harness[good].status, harness[bad].status) == ("completed", "failed")


async def test_a_slow_hook_does_not_count_against_the_timeout(app: App) -> None:
    @app.task(timeout=0.05)
    async def quick() -> str:
        return "done"

    @quick.on_success
    async def dawdle(ctx: Context, result: str) -> None:
        await asyncio.sleep(0.1)

    async with Harness(app) as harness:
        run = await quick.trigger()
        await harness.drain()
        assert harness[run].status == "completed"


async def test_a_watcher_hears_what_was_told_before_it_watched(app: App) -> None:
    heard: list[str] = []

    @app.task(retry=Retry(max_attempts=2, min_delay=1))
    async def flaky(ctx: Context) -> None:
        if ctx.attempt == 1:
            raise ConnectionError("once")

    async with Harness(app) as harness:
        run = await flaky.trigger()
        await harness.drain()
        run.watch(lambda event: heard.append(event.event))
        assert heard == ["retrying", "completed"]


async def test_a_run_that_was_started_in_time_is_retried_after_it_expires(app: App) -> None:
    @app.task(retry=Retry(max_attempts=2, min_delay=60, jitter=False))
    async def flaky(ctx: Context) -> str:
        if ctx.attempt == 1:
            raise ConnectionError("once")
        return "done"

    async with Harness(app) as harness:
        run = await flaky.trigger(expires=30)
        await harness.drain()
        assert await run.result(timeout=1) == "done"


async def test_the_lifespan_surrounds_the_worker_and_gives_the_state(app: App) -> None:
    life: list[str] = []

    @app.lifespan
    async def lifespan(app: App) -> AsyncIterator[dict[str, str]]:
        life.append("up")
        yield {"pool": "a pool"}
        life.append("down")

    @app.task
    async def ask(ctx: Context) -> str:
        state: dict[str, str] = ctx.state
        return state["pool"]

    async with Harness(app) as harness:
        run = await ask.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == "a pool"
        assert life == ["up"]
    assert life == ["up", "down"]


async def test_children_know_their_parent_and_root(app: App) -> None:
    family: list[tuple[str, str | None, str | None]] = []

    @app.task
    async def leaf(ctx: Context) -> None:
        family.append((ctx.run_id, ctx.parent, ctx.root))

    @app.task
    async def branch(ctx: Context) -> None:
        family.append((ctx.run_id, ctx.parent, ctx.root))
        await leaf.trigger()

    @app.task
    async def trunk() -> None:
        await branch.trigger()

    async with Harness(app) as harness:
        run = await trunk.trigger()
        await harness.drain()
        (branch_id, branch_parent, branch_root), (_, leaf_parent, leaf_root) = family
        assert (branch_parent, branch_root) == (run.run_id, run.run_id)
        assert (leaf_parent, leaf_root) == (branch_id, run.run_id)


async def test_a_task_in_a_thread_fans_out_over_its_workers_connection(app: App) -> None:
    parents: list[str | None] = []

    @app.task
    def leaf(number: int, ctx: Context) -> int:
        parents.append(ctx.parent)
        return number

    @app.task
    def trunk(count: int) -> int:
        runs = [leaf.trigger_sync(number) for number in range(count)]
        return sum(run.result_sync(timeout=5) for run in runs)

    async with Harness(app) as harness:
        run = await trunk.trigger(4)
        await harness.drain()
        assert await run.result(timeout=1) == 6
        assert parents == [run.run_id] * 4


async def test_a_result_that_cannot_be_sent_is_buried_as_such(app: App) -> None:
    @app.task
    async def opaque() -> Any:
        return object()

    async with Harness(app) as harness:
        run = await opaque.trigger()
        await harness.drain()
        assert harness[run].reason == "bad_result"


async def test_a_full_queue_refuses_triggers_but_never_retries(app: App) -> None:
    @app.task(queue=Queue(max_length=5), retry=Retry(max_attempts=2, min_delay=1), concurrency=1)
    async def bounded(number: int, ctx: Context) -> int:
        if ctx.attempt == 1:
            raise ValueError("once")
        return number

    async with Harness(app) as harness:
        await harness.stop_worker()
        runs = [await bounded.trigger(number) for number in range(5)]
        with pytest.raises(QueueFull) as refusal:
            await bounded.trigger(99)
        assert refusal.value.unknown is False
        async with app.worker():
            for _ in range(40):
                await asyncio.sleep(0.002)
                await harness.advance(1)
        assert {harness[run].status for run in runs} == {"completed"}


async def test_drain_gives_up_on_a_task_that_waits_for_the_test(app: App) -> None:
    @app.task
    async def waits() -> None:
        await asyncio.Event().wait()

    async with Harness(app) as harness:
        await waits.trigger()
        with pytest.raises(DrainTimeout, match="1 run"):
            await harness.drain(timeout=0.05)


async def test_waiting_for_a_thread_does_not_count_against_the_timeout() -> None:
    app = App("flow", settings=Settings(amqp_url="memory:", thread_limit=1))

    @app.task(concurrency=4, timeout=0.15, retry=Retry(max_attempts=1))
    def work(number: int) -> int:
        threading.Event().wait(0.06)
        return number

    async with Harness(app) as harness:
        runs = await work.trigger_many(range(4))
        await harness.drain()
        assert [harness[run].status for run in runs] == ["completed"] * 4


async def test_a_view_under_test_triggers_in_the_harness_whatever_was_used_before(app: App) -> None:
    @app.task
    async def echo(text: str) -> str:
        return text

    for _ in range(2):
        async with Harness(app) as harness:
            run = await asyncio.to_thread(echo.trigger_sync, "x")
            await harness.drain()
            assert harness[run].status == "completed"
            # From another event loop than the one it was triggered in.
            assert await run.result(timeout=5) == "x"


async def test_a_hook_of_a_crashed_run_is_given_its_payload(app: App) -> None:
    heard: list[Order] = []

    @app.task(retry=Retry(max_attempts=1))
    async def slow(order: Order) -> None: ...

    @slow.on_failure
    async def tell(ctx: Context, error: BaseException) -> None:
        heard.append(ctx.payload)

    async with Harness(app) as harness:
        await harness.stop_worker()
        await slow.trigger(Order(number=7))
        # Somebody takes the message and is gone.
        taken: asyncio.Queue[Delivery] = asyncio.Queue()
        transport = MemoryTransport(harness.broker)
        await transport.open(timeout=1)
        await transport.consume("bt.q.slow", taken.put_nowait, prefetch=1)
        await taken.get()
        await transport.close()
        async with app.worker():
            await harness.drain()
        assert heard == [Order(number=7)]
        assert [dead.reason for dead in harness.dead_letters("slow")] == ["crashed"]
