"""`Harness(app, server=True)`: what users test of runs that wait, of keys and of schedules."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from brokertask import (
    App,
    ChildFailed,
    Context,
    Debounce,
    IdempotencyConflict,
    Rejected,
    Schedule,
    Settings,
    Tick,
)
from brokertask.errors import ConfigurationError, NoServer
from brokertask.retry import Retry
from brokertask.testing import Harness

pytestmark = pytest.mark.anyio


@pytest.fixture
def app() -> App:
    app = App("harness", settings=Settings(amqp_url="memory:"))

    @app.task(retry=Retry(max_attempts=2, min_delay=60, jitter=False))
    async def double(number: int, ctx: Context) -> int:
        if number == 13 or ctx.attempt == 1:
            raise ValueError(f"{number}")
        return number * 2

    @app.task
    async def total(numbers: list[int], ctx: Context) -> int:
        return sum(result or 0 for result in await ctx.wait_for(double.map(numbers)))

    @app.task
    async def approve(amount: int, ctx: Context) -> str:
        answer = await ctx.wait_for(ctx.token("approval", timeout="7d"))
        return f"{amount}: {answer!r}"

    return app


async def test_children_that_are_retried_give_their_results(app: App) -> None:
    async with Harness(app, server=True) as harness:
        began_ms = harness.clock.now_ms()
        run = await app.tasks["total"].trigger([1, 2, 3])
        await harness.advance(30)
        assert harness[run].status == "waiting"
        await harness.drain()
        assert await run.result() == 12
        assert harness.clock.now_ms() - began_ms < 3_600_000


async def test_a_token_is_completed_rejected_or_times_out(app: App) -> None:
    approve = app.tasks["approve"]
    async with Harness(app, server=True) as harness:
        yes, no, never = [await approve.trigger(amount) for amount in (1, 2, 3)]
        await harness.complete(yes, "approval", "yes")
        await harness.reject(no, "approval", "too dear")
        assert harness[never].status == "waiting"
        await harness.advance("6d")
        assert await yes.result() == "1: 'yes'"
        assert await no.result() == f"2: {Rejected('too dear')!r}"
        assert harness[never].status == "waiting"
        await harness.drain()
        assert "TimedOut" in await never.result()
        with pytest.raises(LookupError, match="waits for no token 'approval' now"):
            await harness.complete(yes, "approval", "yes")


async def test_an_event_is_heard_by_those_that_wait_for_it(app: App) -> None:
    @app.task
    async def ship(number: int, ctx: Context) -> Any:
        paid: Any = await ctx.wait_for(ctx.event("order.paid", where={"number": number}))
        return paid["amount"]

    async with Harness(app, server=True) as harness:
        run = await ship.trigger(7)
        await harness.drain()
        await harness.publish("order.paid", {"number": 8, "amount": 1})
        await harness.drain()
        assert harness[run].status == "waiting"
        await harness.publish("order.paid", {"number": 7, "amount": 2})
        await harness.drain()
        assert await run.result() == 2


async def test_a_failed_child_fails_its_parent(app: App) -> None:
    double = app.tasks["double"]

    @app.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.wait_for(double.call(13))
        except ChildFailed as failed:
            return failed.reason
        return "fine"

    async with Harness(app, server=True) as harness:
        run = await parent.trigger()
        await harness.drain()
        assert await run.result() == "max_attempts"


async def test_a_key_has_one_run_for_its_time(app: App) -> None:
    approve = app.tasks["approve"]
    async with Harness(app, server=True) as harness:
        first = await approve.trigger(1, idempotency_key="k", idempotency_ttl="1h")
        again = await approve.trigger(1, idempotency_key="k", idempotency_ttl="1h")
        assert again.run_id == first.run_id
        with pytest.raises(IdempotencyConflict):
            await approve.trigger(2, idempotency_key="k", idempotency_ttl="1h")
        await harness.advance("2h")
        later = await approve.trigger(2, idempotency_key="k", idempotency_ttl="1h")
        assert later.run_id != first.run_id
        await harness.advance(0)
        assert set(harness.runs) == {first.run_id, later.run_id}


async def test_a_debounced_run_begins_when_it_is_quiet(app: App) -> None:
    seen: list[int] = []

    @app.task
    async def index(number: int) -> None:
        seen.append(number)

    async with Harness(app, server=True) as harness:
        for number in range(3):
            await index.trigger(number, debounce=Debounce("page", delay="10m"))
            await harness.advance("5m")
        assert seen == []
        await harness.drain()
        assert seen == [2]


async def test_schedules_run_by_the_virtual_clock(app: App) -> None:
    ticks: list[Tick] = []

    @app.task(schedule=Schedule(cron="0 3 * * *"))
    async def report(tick: Tick) -> None:
        ticks.append(tick)

    async with Harness(app, server=True) as harness:
        await harness.drain()
        assert ticks == []
        await harness.advance("10d")
        assert [tick.at.hour for tick in ticks] == [3] * 10
        days = [tick.at.toordinal() for tick in ticks]
        assert days == list(range(days[0], days[0] + 10))


async def test_a_task_that_waits_needs_a_server_and_so_does_a_decision(app: App) -> None:
    async with Harness(app) as harness:
        with pytest.raises(NoServer):
            await app.tasks["approve"].trigger(1, idempotency_key="k")
        run = await app.tasks["double"].trigger(1)
        with pytest.raises(ConfigurationError, match="server=True"):
            await harness.complete(run, "approval")


def test_who_tests_without_a_server_imports_none_of_it() -> None:
    program = (
        "import brokertask.testing, sys; "
        "print({'sqlalchemy', 'starlette', 'brokertask.server'} & {*sys.modules})"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert said.stdout == "set()\n"
