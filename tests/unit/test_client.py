from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import textwrap
import threading
import tracemalloc
import uuid
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from brokertask import (
    App,
    BatchError,
    BrokerUnavailable,
    ConfigurationError,
    Context,
    InvalidOption,
    InvalidPayload,
    PayloadTooLarge,
    Queue,
    QueueFull,
    ResultTimeout,
    ResultUnavailable,
    Retry,
    Run,
    RunExpired,
    RunFailed,
    Settings,
    Unroutable,
)
from brokertask.clock import VirtualClock
from brokertask.envelope import Envelope
from brokertask.events import EXPIRED, Event
from brokertask.identity import uuid7
from brokertask.portal import portal
from brokertask.testing import Harness
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.socket import serve

pytestmark = pytest.mark.anyio
MEMORY = Settings(amqp_url="memory:")


class Order(BaseModel):
    number: int


def shop(settings: Settings = MEMORY) -> App:
    app = App("shop", settings=settings)

    @app.task(retry=Retry(max_attempts=1))
    async def double(number: int) -> int:
        if number < 0:
            raise ValueError("below zero")
        return number * 2

    @app.task(queue=Queue(max_length=2))
    async def bounded(number: int) -> int:
        return number

    return app


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    """A broker on a clock that stands still."""
    broker = MemoryBroker(VirtualClock())
    yield broker
    broker.close()


@pytest.fixture
async def app(broker: MemoryBroker) -> AsyncIterator[App]:
    """An app on that broker, without a worker."""
    app = shop()
    with app.on(broker):
        async with app:
            yield app
            await asyncio.to_thread(portal.close)


def sent(broker: MemoryBroker, task: str = "double") -> list[Envelope]:
    """Return what waits in the queues of a task and on every rung of the delay ladder."""
    names = MEMORY.names
    return [
        Envelope.read(message, task=task, max_bytes=1 << 20)
        for queue in broker.queues
        if queue in (names.intake(task), names.queue(task)) or queue.startswith("bt.delay.")
        for message in broker.messages(queue)
    ]


# --- what is sent --------------------------------------------------------------------------------


async def test_a_trigger_is_one_message(app: App, broker: MemoryBroker) -> None:
    run = await app.client.trigger("double", 21, tags=["a", "b"], expires="1m", run_id="order-7")
    now = broker.clock.now_ms()
    (envelope,) = sent(broker)
    assert (run.run_id, run.task) == ("order-7", "double")
    assert (envelope.run_id, envelope.task, envelope.value()) == ("order-7", "double", 21)
    assert (envelope.tags, envelope.app_id, envelope.attempt) == (("a", "b"), "shop", 1)
    assert (envelope.triggered_ms, envelope.expires_ms) == (now, now + 60_000)
    assert (envelope.due_ms, envelope.left_ms, envelope.parent) == (None, 0, None)
    assert envelope.reply_to is not None


async def test_a_delay_says_when_it_is_due_and_what_is_left(app: App, broker: MemoryBroker) -> None:
    await app.tasks["double"].trigger(1, delay="1m 7s")
    (envelope,) = sent(broker)
    assert envelope.due_ms == broker.clock.now_ms() + 67_000
    assert envelope.left_ms == 7_000
    (rung,) = [name for name in broker.queues if broker.messages(name)]
    assert rung == "bt.delay.60000"


async def test_a_delay_too_short_for_a_hop_is_none(app: App, broker: MemoryBroker) -> None:
    await app.client.trigger("double", 1, delay=0.02)
    (envelope,) = sent(broker)
    assert (envelope.due_ms, envelope.left_ms) == (None, 0)


async def test_a_run_asked_for_by_a_run_names_parent_and_root() -> None:
    app = App("family", settings=MEMORY)
    seen: list[tuple[str | None, str | None]] = []

    @app.task
    async def generation(depth: int, ctx: Context) -> None:
        seen.append((ctx.parent, ctx.root))
        if depth:
            await generation.trigger(depth - 1, run_id=f"run-{depth - 1}")

    async with Harness(app) as harness:
        await generation.trigger(2, run_id="run-2")
        await harness.drain()
    assert seen == [(None, None), ("run-2", "run-2"), ("run-1", "run-2")]


@pytest.mark.parametrize(
    "options",
    [
        {"tags": "one"},
        {"tags": [""]},
        {"tags": ["x" * 129]},
        {"tags": ["ä" * 65]},
        {"tags": ["a\nb"]},
        {"tags": ["\ud800"]},
        {"tags": [5]},
        {"tags": ["t"] * 33},
        {"run_id": ""},
        {"run_id": "x" * 129},
        {"run_id": "ä" * 65},
        {"run_id": "a\nb"},
        {"run_id": 5},
        {"delay": -1},
        {"delay": "soon"},
        {"delay": 1e300},
        {"expires": -1},
    ],
)
async def test_options_that_cannot_be_sent_are_refused(
    app: App, broker: MemoryBroker, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidOption):
        await app.client.trigger("double", 1, **options)
    assert not sent(broker)


async def test_the_most_that_may_be_sent_is_sent(app: App, broker: MemoryBroker) -> None:
    tags = [f"{n:02}" + "ä" * 63 for n in range(32)]
    await app.client.trigger("double", 1, tags=tags, run_id="ä" * 64)
    (envelope,) = sent(broker)
    assert (list(envelope.tags), envelope.run_id) == (tags, "ä" * 64)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"x" * 2_000_000, PayloadTooLarge),
        (object(), InvalidPayload),
        ({(1, 2): 3}, InvalidPayload),
    ],
)
async def test_payloads_that_cannot_be_sent_are_refused(
    app: App, broker: MemoryBroker, payload: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await app.client.trigger("double", payload)
    with pytest.raises(error):
        await app.client.trigger_many("double", [1, payload])
    assert not sent(broker)


async def test_a_payload_of_the_wrong_type_is_refused(app: App, broker: MemoryBroker) -> None:
    with pytest.raises(InvalidPayload, match="payload of 'double': value: int_parsing"):
        await app.tasks["double"].trigger("many")
    with pytest.raises(InvalidPayload):
        await app.tasks["double"].trigger_many([1, "many"])
    assert not sent(broker)


async def test_nobody_takes_an_unknown_task(app: App) -> None:
    with pytest.raises(Unroutable) as caught:
        await app.client.trigger("unknown", 1, run_id="lost")
    assert (caught.value.run_id, caught.value.unknown) == ("lost", False)
    with pytest.raises(InvalidOption, match="task id"):
        await app.client.trigger("no such id", 1)


async def test_a_stopped_broker_takes_nothing(app: App, broker: MemoryBroker) -> None:
    hasty = App("hasty", settings=MEMORY.model_copy(update={"connect_timeout": 0.01}))
    broker.stop()
    with hasty.on(broker):
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                await hasty.client.trigger("double", 1)
        broker.start()
        await hasty.client.trigger("double", 1)
        await hasty.client.close()
    assert len(sent(broker)) == 1


# --- many ----------------------------------------------------------------------------------------


async def test_many_runs_in_the_order_of_their_payloads(app: App, broker: MemoryBroker) -> None:
    runs = await app.tasks["double"].trigger_many(range(1_000), tags=["many"])
    envelopes = {envelope.run_id: envelope for envelope in sent(broker)}
    assert [envelopes[run.run_id].value() for run in runs] == list(range(1_000))
    assert {envelope.tags for envelope in envelopes.values()} == {("many",)}
    assert await app.tasks["double"].trigger_many([]) == []


async def test_a_batch_tells_of_each_item(app: App, broker: MemoryBroker) -> None:
    with pytest.raises(BatchError, match="3 of 5 runs were not taken; the first: ") as caught:
        await app.tasks["bounded"].trigger_many([1, 2, 3, 4, 5])
    kinds = [type(result) for result in caught.value.results]
    assert kinds == [Run, Run, QueueFull, QueueFull, QueueFull]
    assert not caught.value.unknown
    waiting = {envelope.run_id for envelope in sent(broker, "bounded")}
    assert waiting == {run.run_id for run in caught.value.results if isinstance(run, Run)}
    assert all(
        error.run_id not in {None, *waiting}
        for error in caught.value.results
        if isinstance(error, QueueFull)
    )


async def numbers(count: int, read: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        read.append(number)
        yield number


async def note(runs: AsyncIterator[Run[Any]], ids: list[str]) -> None:
    async for run in runs:
        ids.append(run.run_id)  # noqa: PERF401 - it may raise half-way


async def test_a_stream_is_read_no_further_than_it_is_sent(app: App, broker: MemoryBroker) -> None:
    read: list[int] = []
    runs: list[str] = []
    async for run in app.tasks["double"].trigger_stream(numbers(2_500, read), tags=["many"]):
        assert len(read) - len(runs) <= 1_000
        runs.append(run.run_id)
    envelopes = {envelope.run_id: envelope for envelope in sent(broker)}
    assert [envelopes[run_id].value() for run_id in runs] == list(range(2_500))
    assert {envelope.tags for envelope in envelopes.values()} == {("many",)}


async def test_a_stream_of_anything_iterable(app: App, broker: MemoryBroker) -> None:
    runs = [run async for run in app.client.trigger_stream("double", iter([1, 2]))]
    assert [run.run_id for run in runs] == [envelope.run_id for envelope in sent(broker)]
    assert [run async for run in app.tasks["double"].trigger_stream([])] == []
    with pytest.raises(InvalidOption, match="no option 'run_id'"):
        app.tasks["double"].trigger_stream([1], run_id="a")  # type: ignore[call-arg]


async def test_a_stream_ends_with_the_first_payload_that_is_wrong(
    app: App, broker: MemoryBroker
) -> None:
    taken: list[str] = []
    with pytest.raises(InvalidPayload):
        await note(app.tasks["double"].trigger_stream([*range(1_500), "many", 1]), taken)
    assert len(taken) == 1_000
    assert [envelope.run_id for envelope in sent(broker)] == taken


async def test_a_stream_ends_where_runs_are_not_taken(app: App, broker: MemoryBroker) -> None:
    read: list[int] = []
    yielded: list[str] = []
    with pytest.raises(BatchError, match="998 of 1000 runs were not taken") as caught:
        await note(app.tasks["bounded"].trigger_stream(numbers(5_000, read)), yielded)
    assert not yielded
    taken = {result.run_id for result in caught.value.results if isinstance(result, Run)}
    assert {envelope.run_id for envelope in sent(broker, "bounded")} == taken
    assert len(read) == 1_000


async def test_a_stream_takes_no_more_memory_the_longer_it_is(
    app: App, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def vanish(*_: object, **__: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(MemoryTransport, "publish", vanish)
    peaks: list[int] = []
    for count in (5_000, 20_000):
        tracemalloc.start()
        async for _ in app.tasks["double"].trigger_stream(range(count)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# --- ids -----------------------------------------------------------------------------------------


def test_run_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    ids = [uuid7(1_700_000_000_000 + n) for n in range(1_000)]
    assert ids == sorted(ids)
    for n, text in enumerate(ids):
        value = uuid.UUID(text)
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        assert str(value) == text
        assert value.int >> 80 == 1_700_000_000_000 + n


def test_run_ids_of_one_millisecond_differ() -> None:
    ids = [uuid.UUID(uuid7(5)) for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    spread = 0
    for one in ids:
        spread |= one.int ^ ids[0].int
    # All 74 random bits vary; none is stuck, and none of the fixed ones moves.
    assert spread == (0xFFF << 64) | ((1 << 62) - 1)


# --- results -------------------------------------------------------------------------------------


async def test_a_result_is_heard_as_its_type() -> None:
    app = App("typed", settings=MEMORY)

    @app.task
    async def echo(order: Order) -> Order:
        return order

    async with Harness(app) as harness:
        run = await echo.trigger(Order(number=1))
        plain = await app.client.trigger("echo", {"number": 2})
        typed = await app.client.trigger("echo", {"number": 3}, result=TypeAdapter(Order))
        wrong = await app.client.trigger("echo", {"number": 4}, result=TypeAdapter(int))
        await harness.drain()
        assert await run.result() == await run.result() == Order(number=1)
        assert await plain.result() == {"number": 2}
        assert await typed.result() == Order(number=3)
        with pytest.raises(ResultUnavailable, match="of another type here: value: int_type"):
            await wrong.result()


async def test_a_failure_is_heard_with_its_reason() -> None:
    app = shop()
    async with Harness(app) as harness:
        run = await app.tasks["double"].trigger(-1)
        await harness.drain()
        with pytest.raises(RunFailed, match="ValueError: below zero") as caught:
            await run.result()
    assert caught.value.reason == "max_attempts"
    assert caught.value.error == {"type": "ValueError", "message": "below zero"}
    assert (caught.value.run_id, caught.value.task) == (run.run_id, "double")


async def test_an_expiry_is_heard() -> None:
    app = shop()
    async with Harness(app) as harness:
        run = await app.tasks["double"].trigger(1, delay=10, expires=5)
        await harness.drain()
        with pytest.raises(RunExpired):
            await run.result()


async def test_every_event_of_a_run_can_be_watched() -> None:
    app = shop()
    heard: list[Event] = []
    async with Harness(app) as harness:
        run = await app.tasks["double"].trigger(1, delay=10, expires=5)
        run.watch(heard.append)
        await harness.drain()
    assert [event.event for event in heard] == [EXPIRED]


async def test_a_result_that_does_not_come_is_a_timeout_and_can_be_asked_for_again(
    app: App,
) -> None:
    run = await app.tasks["double"].trigger(21)
    with pytest.raises(ResultTimeout, match="within 10 ms; it goes on") as caught:
        await run.result(timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    async with app.worker():
        assert await run.result(timeout=10) == 42


async def test_without_a_reply_queue_there_are_no_results(broker: MemoryBroker) -> None:
    app = shop(Settings(amqp_url="memory:", results=False))
    with app.on(broker):
        async with app:
            run = await app.tasks["double"].trigger(1)
    (envelope,) = sent(broker)
    assert envelope.reply_to is None
    with pytest.raises(ResultUnavailable, match="BROKERTASK_RESULTS=false"):
        await run.result()


async def test_a_run_that_nobody_holds_is_forgotten(app: App) -> None:
    run = await app.tasks["double"].trigger(1)
    await app.tasks["double"].trigger(2)
    gc.collect()
    session = await app.client._sessions.get()
    assert list(session._hearings) == [run.run_id]


async def test_the_reply_queue_goes_with_the_client(app: App, broker: MemoryBroker) -> None:
    assert any(queue.startswith("bt.reply.") for queue in broker.queues)
    await app.client.close()
    assert not any(queue.startswith("bt.reply.") for queue in broker.queues)


# --- without an event loop -----------------------------------------------------------------------


async def test_blocking_calls_are_refused_in_an_event_loop(app: App, broker: MemoryBroker) -> None:
    with pytest.raises(ConfigurationError, match=r"trigger_sync .* use await trigger\(\.\.\.\)"):
        app.tasks["double"].trigger_sync(1)
    run = await app.tasks["double"].trigger(1)
    with pytest.raises(ConfigurationError, match=r"result_sync .* use await run\.result\(\.\.\.\)"):
        run.result_sync()
    assert len(sent(broker)) == 1


async def test_threads_share_one_connection(app: App, broker: MemoryBroker) -> None:
    def trigger_all() -> list[Run[Any]]:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(app.tasks["double"].trigger_sync, range(50)))

    runs = await asyncio.to_thread(trigger_all)
    assert sorted(str(envelope.value()) for envelope in sent(broker)) == sorted(map(str, range(50)))
    assert len({run.run_id for run in runs}) == 50
    assert len({envelope.reply_to for envelope in sent(broker)}) == 1
    assert [thread.name for thread in threading.enumerate()].count("brokertask portal") == 1


async def test_a_thread_can_wait_for_a_result(app: App) -> None:
    def trigger_and_wait(number: int) -> int:
        result: int = app.tasks["double"].trigger_sync(number).result_sync(timeout=10)
        return result

    async with app.worker():
        assert await asyncio.to_thread(trigger_and_wait, 21) == 42
        with pytest.raises(RunFailed):
            await asyncio.to_thread(trigger_and_wait, -1)


async def test_one_client_serves_several_event_loops(app: App, broker: MemoryBroker) -> None:
    async def once(number: int) -> None:
        await app.client.trigger("double", number)
        await app.client.close()

    for number in (1, 2):
        await asyncio.to_thread(asyncio.run, once(number))
    await once(3)
    await once(4)
    assert [envelope.value() for envelope in sent(broker)] == [1, 2, 3, 4]


async def test_a_forked_child_begins_anew(tmp_path: Path) -> None:
    program = """
        import os, sys
        from brokertask import App, Settings
        app = App("forking", settings=Settings(amqp_url=sys.argv[1]))
        @app.task
        async def double(number: int) -> int: return number * 2
        double.trigger_sync(1)
        child = os.fork()
        double.trigger_sync(2 if child else 3)
        if child:
            _, status = os.waitpid(child, 0)
            double.trigger_sync(4)
            print(os.waitstatus_to_exitcode(status))
    """
    broker = MemoryBroker()
    path = tmp_path / "broker" / "dev.sock"
    server = await serve(broker, path)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", textwrap.dedent(program), f"unix:{path}"),
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(60):
                out, problems = await process.communicate()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        await server.close()
    assert (out, problems) == (b"0\n", b"")
    replies = {one.value(): one.reply_to for one in sent(broker)}
    assert replies.keys() == {1, 2, 3, 4}
    assert replies[1] == replies[2] == replies[4] != replies[3]
    assert len({one.run_id for one in sent(broker)}) == 4
    broker.close()


async def test_times_are_told_by_the_clock_of_the_broker(app: App, broker: MemoryBroker) -> None:
    await app.client.trigger("double", 1)
    (envelope,) = sent(broker)
    assert envelope.triggered_ms is not None
    at = datetime.fromtimestamp(envelope.triggered_ms / 1000, UTC)
    assert at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


async def test_a_delayed_run_of_an_unknown_task_is_refused_before_the_delay(
    broker: MemoryBroker,
) -> None:
    app = shop(Settings(amqp_url="memory:"))
    with app.on(broker):
        async with app:
            with pytest.raises(Unroutable, match="nobody"):
                await app.client.trigger("nobody", 1, delay=60)
            with pytest.raises(Unroutable, match="nobody"):
                await app.client.trigger_many("nobody", [1, 2], delay=60)


async def test_every_holder_of_a_run_hears_its_result(broker: MemoryBroker) -> None:
    app = shop(Settings(amqp_url="memory:"))
    with app.on(broker):
        async with app, app.worker():
            first = await app.tasks["double"].trigger(4, run_id="order-9")
            second = await app.tasks["double"].trigger(4, run_id="order-9")
            assert await first.result(timeout=5) == await second.result(timeout=5) == 8


async def test_a_watcher_that_fails_harms_nobody(broker: MemoryBroker) -> None:
    app = shop(Settings(amqp_url="memory:"))

    def fail(event: object) -> None:
        raise RuntimeError("a broken watcher")

    with app.on(broker):
        async with app:
            run = await app.tasks["double"].trigger(4)
            run.watch(fail)
            async with app.worker():
                assert await run.result(timeout=5) == 8
