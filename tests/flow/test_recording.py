"""What workers tell while a server keeps history: beginnings, steps, logs, and themselves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from brokertask import App, Context, Event, Settings, Unroutable
from brokertask.events import LOG, STARTED, STEP
from brokertask.server import details, history, servers, workers
from brokertask.server.service import Server
from brokertask.values import MSGPACK, decode
from tests.flow.deciding import until as until_asked
from tests.flow.test_control import SECONDS, until
from tests.flow.test_server_control import serving, until_known

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "rabbitmq"])
def app(request: pytest.FixtureRequest) -> App:
    url = "memory:" if request.param == "memory" else request.getfixturevalue("amqp_url")
    return App("recording", settings=Settings(amqp_url=url))


@pytest.fixture
def own_app() -> App:
    return App("recording", settings=Settings(amqp_url="memory:"))


async def row_of(server: Server, run_id: str) -> Mapping[str, Any] | None:
    assert server.resources is not None
    async with server.resources.store.begin() as connection:
        return await history.shown(connection, run_id)


async def test_a_task_whose_queue_is_gone_takes_no_triggers(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "EVERY", 0.1)
    queue = app.settings.names.queue("short")

    @app.task
    async def short() -> None:
        pass

    async def copied() -> bool:
        run = await short.trigger()
        await run.result(timeout=SECONDS)
        row = await row_of(server, run.run_id)
        return row is not None and row["payload"] is not None

    async def refused() -> bool:
        try:
            await short.trigger()
        except Unroutable:
            return True
        return False

    async with app, serving(app, tmp_path) as server:
        async with app.worker() as worker:
            await until_known(server, worker)
            await until_asked(copied)
        await server.resources.transport.delete(queue)
        await until_asked(refused)
        await server.resources.transport.declare(app.topology())
        async with app.worker():
            await until_asked(copied)


async def test_a_run_shows_from_its_beginning_with_its_steps_and_log(
    app: App, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    @app.task
    async def work(order: dict[str, Any], ctx: Context) -> int:
        first = await ctx.step("fetch", fetch, 7)
        ctx.log.warning("fetched %s", first["number"])
        await ctx.step("store", fetch, 8)
        await go_on.wait()
        return int(first["number"])

    async def fetch(number: int) -> dict[str, Any]:
        return {"number": number, "password": "hunter2"}

    async with app, serving(app, tmp_path) as server, app.worker() as worker:
        resources = server.resources
        assert resources is not None
        await until_known(server, worker)
        run = await work.trigger({"number": 1, "api_key": "k"}, tags=["a", "b"])

        async def shows() -> bool:
            row = await row_of(server, run.run_id)
            async with resources.store.begin() as connection:
                steps = await details.steps_of(connection, run.run_id)
                lines = await details.log_of(connection, run.run_id)
            return row is not None and len(steps) == 2 and len(lines) == 1

        await until_asked(shows)
        row = await row_of(server, run.run_id)
        assert row is not None
        assert (row["status"], row["attempt"], row["worker"]) == ("running", 1, worker.name)
        assert row["app_id"] == "recording"
        assert decode(row["payload"], MSGPACK) == {"number": 1, "api_key": "[redacted]"}
        assert history.tags_of(row) == ["a", "b"]
        async with resources.store.begin() as connection:
            steps = await details.steps_of(connection, run.run_id)
            lines = await details.log_of(connection, run.run_id)
            (present,) = await workers.listed(connection, now_ms=app.clock.now_ms())
        assert [step["name"] for step in steps] == ["fetch", "store"]
        assert decode(steps[0]["result"], MSGPACK) == {"number": 7, "password": "[redacted]"}
        assert [line["text"] for line in lines] == ["fetched 7"]
        assert lines[0]["level"] == "WARNING"
        assert present["worker"] == worker.name
        assert present["state"] == "working"
        assert present["tasks"]["work"]["slots"] == 10
        go_on.set()
        await run.result(timeout=SECONDS)

        async def ended() -> bool:
            row = await row_of(server, run.run_id)
            return row is not None and row["status"] == "completed"

        await until_asked(ended)
        await worker.stop()

        async def stopped() -> bool:
            async with resources.store.begin() as connection:
                (present,) = await workers.listed(connection, now_ms=app.clock.now_ms())
            return bool(present["state"] == "stopped")

        await until_asked(stopped)


async def test_a_worker_that_runs_already_tells_when_a_server_comes(
    own_app: App, tmp_path: Path
) -> None:
    @own_app.task
    async def work() -> int:
        return 1

    async with own_app, own_app.worker() as worker:
        assert await (await work.trigger()).result(timeout=SECONDS) == 1
        async with serving(own_app, tmp_path) as server:
            resources = server.resources
            assert resources is not None
            await until_known(server, worker)
            await own_app.client.pause("work")

            async def paused() -> bool:
                async with resources.store.begin() as connection:
                    (one,) = await workers.listed(connection, now_ms=own_app.clock.now_ms())
                return bool(one["tasks"]["work"]["paused"])

            await until_asked(paused)
            async with resources.store.begin() as connection:
                later = own_app.clock.now_ms() + workers.SILENT_MS + 1_000
                (one,) = await workers.listed(connection, now_ms=later)
            assert one["state"] == "silent"


async def test_without_a_server_nothing_of_it_is_told(own_app: App) -> None:
    heard = list[Event]()

    @own_app.task
    async def work(ctx: Context) -> int:
        ctx.log.warning("a line")
        return await ctx.step("one", number)

    async def number() -> int:
        return 1

    async with own_app, own_app.client.events() as events:

        async def hear() -> None:
            async for event in events:
                heard.append(event)

        listening = asyncio.create_task(hear())
        async with own_app.worker():
            assert await (await work.trigger()).result(timeout=SECONDS) == 1
        await until(lambda: len(heard) > 0)
        listening.cancel()
        assert [event.event for event in heard] == ["completed"]


async def test_lines_from_threads_are_told_in_order(own_app: App, tmp_path: Path) -> None:
    heard = list[Event]()

    @own_app.task
    def work(count: int, ctx: Context) -> str:
        for number in range(count):
            ctx.log.warning("line %d", number)
        return threading.current_thread().name

    async with own_app, serving(own_app, tmp_path) as server, own_app.client.events() as events:
        resources = server.resources
        assert resources is not None

        async def hear() -> None:
            async for event in events:
                heard.append(event)

        listening = asyncio.create_task(hear())
        async with own_app.worker() as worker:
            await until_known(server, worker)
            run = await work.trigger(300)
            await run.result(timeout=SECONDS)
        listening.cancel()
        told = [event.event for event in heard if event.run_id == run.run_id]
        assert STARTED in told
        assert LOG in told
        assert STEP not in told

        async def all_lines() -> bool:
            async with resources.store.begin() as connection:
                lines = await details.log_of(connection, run.run_id)
            return [line["text"] for line in lines] == [f"line {number}" for number in range(300)]

        await until_asked(all_lines)
        async with resources.store.begin() as connection:
            first = await details.log_of(connection, run.run_id, limit=100)
            keys = tuple(first[-1][name] for name in details.LINE)
            rest = await details.log_of(connection, run.run_id, after=keys)
            assert len(rest) == 200
            await details.forget(connection, [run.run_id])
            assert await details.log_of(connection, run.run_id) == []
