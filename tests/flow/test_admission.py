"""Triggers with keys: what a server makes of them, on the embedded broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from brokertask import (
    Abort,
    App,
    Debounce,
    IdempotencyConflict,
    InvalidOption,
    NoServer,
    PublishUnknown,
    Retry,
    Run,
    RunCancelled,
    RunFailed,
    Settings,
    Singleton,
    Unroutable,
)
from brokertask.admission import Admission
from brokertask.clock import VirtualClock
from brokertask.envelope import Envelope, Message
from brokertask.server import history, keys
from brokertask.server.admission import send
from brokertask.server.service import Server
from brokertask.topology import Route
from brokertask.transport.memory import MemoryBroker
from brokertask.values import pack
from tests.flow.deciding import eventually
from tests.flow.serving import serving as running

pytestmark = pytest.mark.anyio


class Shop:
    """An app on a broker of its own, and what its tasks have done."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.app = App("shop", settings=settings or Settings(amqp_url="memory:"))
        self.done: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()

        @self.app.task(retry=Retry(max_attempts=1), concurrency=100)
        async def charge(order: int) -> int:
            self.done.append(order)
            await self.gate.wait()
            if order < 0:
                raise Abort("below zero")
            return order * 2

        self.charge = charge


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def broker(clock: VirtualClock) -> Iterator[MemoryBroker]:
    broker = MemoryBroker(clock)
    yield broker
    broker.close()


@pytest.fixture
async def shop(broker: MemoryBroker) -> AsyncIterator[Shop]:
    shop = Shop()
    with shop.app.on(broker):
        yield shop
        await shop.app.client.close()


@pytest.fixture
async def server(shop: Shop, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(shop.app, tmp_path) as server:
        yield server


@asynccontextmanager
async def serving(app: App, folder: Path) -> AsyncIterator[Server]:
    async with running(app, f"sqlite+aiosqlite:///{folder}/server.db") as server:
        yield server


@asynccontextmanager
async def working(app: App) -> AsyncIterator[None]:
    async with app.worker() as worker:
        yield
        await worker.stop(grace=0)


# --- idempotency keys -----------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
async def test_one_hundred_callers_with_one_key_get_one_run(shop: Shop) -> None:
    apps = [Shop(shop.app.settings) for _ in range(4)]
    broker = shop.app._embedded
    assert broker is not None
    runs: list[Run[int]] = []
    for other in apps:
        with other.app.on(broker):
            runs += await asyncio.gather(
                *(other.charge.trigger(7, idempotency_key="order-7") for _ in range(25))
            )
            await other.app.client.close()
    assert len({run.run_id for run in runs}) == 1
    async with working(shop.app):
        run = await shop.charge.trigger(7, idempotency_key="order-7")
        assert run.run_id == runs[0].run_id
        assert await run.result(timeout=20) == 14
        eight = await shop.charge.trigger(8, idempotency_key="order-8")
        assert await eight.result(timeout=20) == 16
    assert shop.done == [7, 8]


@pytest.mark.usefixtures("server")
async def test_another_payload_is_refused_and_names_the_run(shop: Shop) -> None:
    run = await shop.charge.trigger(7, idempotency_key="order")
    with pytest.raises(IdempotencyConflict, match="another payload") as caught:
        await shop.charge.trigger(8, idempotency_key="order")
    assert caught.value.run_id == run.run_id
    assert not caught.value.unknown


@pytest.mark.usefixtures("server")
async def test_a_key_is_of_its_task(shop: Shop) -> None:
    @shop.app.task
    async def refund(order: int) -> int:
        return -order

    async with working(shop.app):
        one = await shop.charge.trigger(7, idempotency_key="order-7")
        two = await refund.trigger(7, idempotency_key="order-7")
        assert await one.result(timeout=20) == 14
        assert await two.result(timeout=20) == -7


@pytest.mark.usefixtures("server")
async def test_after_its_ttl_a_key_is_new(shop: Shop, clock: VirtualClock) -> None:
    first = await shop.charge.trigger(7, idempotency_key="k", idempotency_ttl="1h")
    clock.advance_to(clock.now_ms() + 3_599_000)
    assert (await shop.charge.trigger(7, idempotency_key="k")).run_id == first.run_id
    clock.advance_to(clock.now_ms() + 1_000)
    later = await shop.charge.trigger(8, idempotency_key="k")
    assert later.run_id != first.run_id
    assert (await shop.charge.trigger(8, idempotency_key="k")).run_id == later.run_id


@pytest.mark.usefixtures("server")
async def test_a_run_that_failed_frees_its_key_and_one_that_completed_does_not(
    shop: Shop,
) -> None:
    async with working(shop.app):
        failed = await shop.charge.trigger(-1, idempotency_key="bad")
        with pytest.raises(RunFailed):
            await failed.result(timeout=20)
        completed = await shop.charge.trigger(1, idempotency_key="good")
        await completed.result(timeout=20)
        again = failed
        async with asyncio.timeout(20):  # until its end is recorded
            while again.run_id == failed.run_id:
                again = await shop.charge.trigger(-1, idempotency_key="bad")
        same = await shop.charge.trigger(1, idempotency_key="good")
        assert same.run_id == completed.run_id
        assert await same.result(timeout=20) == 2


@pytest.mark.usefixtures("server")
async def test_a_delayed_run_with_a_key_waits_for_its_delay(
    shop: Shop, clock: VirtualClock
) -> None:
    async with working(shop.app):
        run = await shop.charge.trigger(7, idempotency_key="k", delay="1h")
        clock.advance_to(clock.now_ms() + 3_500_000)
        await shop.charge.trigger(1)
        await eventually(lambda: shop.done)
        assert shop.done == [1]
        while not (result := asyncio.ensure_future(run.result(timeout=20))).done():
            clock.advance_to(clock.now_ms() + 100_000)
            await asyncio.sleep(0.05)
            if shop.done == [1, 7]:
                break
        assert await result == 14


def test_a_sync_caller_has_keys_too(broker: MemoryBroker, tmp_path: Path) -> None:
    shop_done: list[int] = []

    async def main() -> None:
        shop = Shop()
        with shop.app.on(broker):
            async with serving(shop.app, tmp_path), working(shop.app):
                runs = [
                    await asyncio.to_thread(
                        lambda: shop.charge.trigger_sync(7, idempotency_key="order-7")
                    )
                    for _ in range(2)
                ]
                assert runs[0].run_id == runs[1].run_id
                assert await asyncio.to_thread(lambda: runs[1].result_sync(timeout=20)) == 14
                shop_done.extend(shop.done)
            await shop.app.client.close()

    asyncio.run(main())
    assert shop_done == [7]


async def test_its_history_begins_with_the_decision(shop: Shop, server: Server) -> None:
    run = await shop.charge.trigger(7, idempotency_key="k", delay="1h", tags=["web"])
    async with server.resources.store.begin() as connection:
        (row,) = await history.listed(connection, history.RunFilter(tags=("web",)))
    assert (row["run_id"], row["status"]) == (run.run_id, "delayed")


# --- what may be in the way -----------------------------------------------------------------------


async def test_without_a_server_ever_it_is_said_at_once(shop: Shop) -> None:
    async with working(shop.app):
        with pytest.raises(NoServer, match="brokertask server"):
            await shop.charge.trigger(7, idempotency_key="order-7")


@pytest.mark.usefixtures("server")
async def test_a_task_that_nobody_has_is_refused_at_once(shop: Shop) -> None:
    with pytest.raises(Unroutable, match="no queue"):
        await shop.app.client.trigger("unheard-of", 1, idempotency_key="k")


async def test_a_server_that_is_away_decides_when_it_is_back(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    shop, hasty = Shop(), Shop(Settings(amqp_url="memory:", publish_timeout=0.2))
    with hasty.app.on(broker), shop.app.on(broker):
        async with serving(shop.app, tmp_path):
            pass
        with pytest.raises(PublishUnknown, match="ask again"):
            await hasty.charge.trigger(7, idempotency_key="order-7")
        await hasty.app.client.close()
        async with serving(shop.app, tmp_path), working(shop.app):
            run = await shop.charge.trigger(7, idempotency_key="order-7")
            assert await run.result(timeout=20) == 14
        await shop.app.client.close()
    assert shop.done == [7]


async def test_what_is_no_such_trigger_is_buried_and_the_next_is_decided(
    shop: Shop, server: Server
) -> None:
    route = Route(f"{server.resources.names.server}", "admit")
    for message in (
        Message(body=b"", type="charge"),
        Message(body=pack(7), type="charge", headers={"bt-admit": "idempotency", "bt-key": "\0"}),
        Message(body=pack(7), type="no task!", headers={"bt-admit": "singleton"}),
        Message(body=pack(7), headers={"bt-version": 9}),
    ):
        await server.resources.publish(route, message)
    async with working(shop.app):
        run = await shop.charge.trigger(7, idempotency_key="order-7")
        assert await run.result(timeout=20) == 14
    broker = shop.app._embedded
    assert broker is not None
    assert len(broker.messages("bt.dead.charge")) == 2
    assert len(broker.messages("bt.unrouted")) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"idempotency_key": ""},
        {"idempotency_key": "a\0b"},
        {"idempotency_key": "x" * 513},
        {"idempotency_key": "k", "idempotency_ttl": 0},
        {"idempotency_key": "k", "singleton": Singleton("k")},
        {"debounce": Debounce("k", 0)},
        {"debounce": Debounce("k", "10s", max_delay="5s")},
        {"debounce": Debounce("k", "10s", mode="middle")},  # type: ignore[arg-type]
        {"debounce": "k"},
        {"singleton": True},
        {"singleton": Singleton("k", mode="last")},  # type: ignore[arg-type]
    ],
)
async def test_what_makes_no_sense_is_refused_before_it_is_sent(
    shop: Shop, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidOption):
        await shop.charge.trigger(7, **options)


# --- debounce -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
async def test_a_debounced_run_starts_when_it_is_quiet_with_the_last_payload(
    shop: Shop, clock: VirtualClock
) -> None:
    quiet = Debounce("index", "10s")
    async with working(shop.app):
        runs = []
        for number in range(5):
            runs.append(await shop.charge.trigger(number, debounce=quiet))
            clock.advance_to(clock.now_ms() + 9_000)
        assert len({run.run_id for run in runs}) == 1
        assert shop.done == []
        clock.advance_to(clock.now_ms() + 1_000)
        assert await runs[0].result(timeout=20) == 8
        assert await runs[-1].result(timeout=20) == 8
        again = await shop.charge.trigger(9, debounce=quiet)
        assert again.run_id != runs[0].run_id
        clock.advance_to(clock.now_ms() + 10_000)
        assert await again.result(timeout=20) == 18
    assert shop.done == [4, 9]


@pytest.mark.usefixtures("server")
async def test_max_delay_ends_a_debounce_that_is_never_quiet(
    shop: Shop, clock: VirtualClock
) -> None:
    busy = Debounce("index", "10s", max_delay="25s")
    async with working(shop.app):
        runs = []
        for number in range(4):
            runs.append(await shop.charge.trigger(number, debounce=busy))
            clock.advance_to(clock.now_ms() + 8_000)
            if number == 3:
                break
        assert len({run.run_id for run in runs}) == 1
        assert await runs[0].result(timeout=20) == 6
    assert shop.done == [3]


@pytest.mark.usefixtures("server")
async def test_a_leading_debounce_starts_at_once_and_takes_the_rest_in(
    shop: Shop, clock: VirtualClock
) -> None:
    leading = Debounce("index", "10s", mode="leading", max_delay="25s")
    async with working(shop.app):
        first = await shop.charge.trigger(1, debounce=leading)
        assert await first.result(timeout=20) == 2
        for number in (2, 3):
            clock.advance_to(clock.now_ms() + 9_000)
            same = await shop.charge.trigger(number, debounce=leading)
            assert same.run_id == first.run_id
        clock.advance_to(clock.now_ms() + 9_000)  # quiet for 9 s only, but 27 s after the first
        other = await shop.charge.trigger(4, debounce=leading)
        assert await other.result(timeout=20) == 8
        clock.advance_to(clock.now_ms() + 10_000)
        third = await shop.charge.trigger(5, debounce=leading)
        assert await third.result(timeout=20) == 10
    assert shop.done == [1, 4, 5]


# --- singletons -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
async def test_a_singleton_gives_back_the_run_that_goes_on(shop: Shop) -> None:
    only = Singleton("customer-7")
    shop.gate.clear()
    async with working(shop.app):
        first = await shop.charge.trigger(1, singleton=only)
        await eventually(lambda: shop.done)
        second = await shop.charge.trigger(2, singleton=only)
        other = await shop.charge.trigger(3, singleton=Singleton("customer-8"))
        assert second.run_id == first.run_id
        shop.gate.set()
        assert await second.result(timeout=20) == 2
        assert await other.result(timeout=20) == 6
        third = second
        async with asyncio.timeout(20):  # until its end is recorded
            while third.run_id == first.run_id:
                third = await shop.charge.trigger(4, singleton=only)
        assert await third.result(timeout=20) == 8
    assert shop.done == [1, 3, 4]


async def test_a_singleton_that_replaces_cancels_the_run_that_goes_on(
    shop: Shop, server: Server
) -> None:
    only = Singleton("customer-7", mode="replace")
    shop.gate.clear()
    async with working(shop.app):
        first = await shop.charge.trigger(1, singleton=only)
        await eventually(lambda: shop.done == [1])
        second = await shop.charge.trigger(2, singleton=only)
        assert second.run_id != first.run_id
        with pytest.raises(RunCancelled, match=f"replaced by run {second.run_id}"):
            await first.result(timeout=20)
        shop.gate.set()
        assert await second.result(timeout=20) == 4
    assert shop.done == [1, 2]


async def test_a_trigger_that_comes_again_replaces_nothing(shop: Shop, server: Server) -> None:
    """Its server died after it had decided, and before it had said so."""
    asked = Admission.of(None, "1h", None, Singleton("k", mode="replace"))
    assert asked is not None
    envelopes = [
        Envelope(run_id=f"run-{number}", task="charge", payload=pack(number)) for number in (1, 2)
    ]
    first, second = (keys.Request(envelope=envelope, admission=asked) for envelope in envelopes)
    resources, decided = server.resources, []
    async with resources.store.begin() as connection:
        for request in (first, second, first, second):
            decision = await keys.decide(connection, request, now_ms=1_000)
            begun = [request.envelope] if decision.begins else []
            await send(resources, connection, begun, now_ms=1_000)
            decided.append((decision.run_id, decision.begins, decision.replaces))
    assert decided == [
        ("run-1", True, None),
        ("run-2", True, "run-1"),
        ("run-1", False, None),
        ("run-2", False, None),
    ]


@pytest.mark.usefixtures("server")
async def test_a_singleton_without_an_end_holds_its_key_for_its_ttl(
    shop: Shop, clock: VirtualClock
) -> None:
    first = await shop.charge.trigger(1, singleton=Singleton("k", ttl="1h"))
    clock.advance_to(clock.now_ms() + 3_600_000)
    second = await shop.charge.trigger(2, singleton=Singleton("k", ttl="1h"))
    assert second.run_id != first.run_id
