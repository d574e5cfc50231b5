"""What a server does about cancelled runs and paused tasks: those that wait, and those below."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from brokertask import App, Context, Run, Settings, Worker
from brokertask.control import Entry
from brokertask.server import cancels, control, history, workers
from brokertask.server.service import Server
from brokertask.server.settings import ServerSettings
from brokertask.server.store.schema import parked
from brokertask.steering import Steering
from tests.flow.deciding import until as until_asked
from tests.flow.test_control import SECONDS, hearing, is_cancelled, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "rabbitmq"])
def app(request: pytest.FixtureRequest) -> App:
    url = "memory:" if request.param == "memory" else request.getfixturevalue("amqp_url")
    return App("control", settings=Settings(amqp_url=url))


@pytest.fixture
def own_app() -> App:
    return App("control", settings=Settings(amqp_url="memory:"))


@asynccontextmanager
async def serving(app: App, folder: Path) -> AsyncIterator[Server]:
    settings = ServerSettings(store_url=f"sqlite+aiosqlite:///{folder}/s.db", bind="127.0.0.1:0")
    server = Server(app.settings, settings, app.connect())
    running = asyncio.create_task(server.run())
    starting = asyncio.create_task(server.started.wait())
    await asyncio.wait({running, starting}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield server
    finally:
        starting.cancel()
        server.stop()
        await running


async def until_known(server: Server, worker: Worker) -> None:
    """Return when a server knows of a worker, which then knows that it is to tell of its runs."""

    async def known() -> bool:
        assert server.resources is not None
        async with server.resources.store.begin() as connection:
            found = await workers.listed(connection, now_ms=0)
        return worker.name in [one["worker"] for one in found]

    await until_asked(known)


async def is_waiting(server: Server, run: Run[Any]) -> bool:
    assert server.resources is not None
    async with server.resources.store.begin() as connection:
        mine = parked.c.run_id == run.run_id
        return await connection.scalar(select(parked.c.state).where(mine)) == "parked"


async def test_a_run_that_waits_is_cancelled_with_its_hooks(app: App, tmp_path: Path) -> None:
    hooked = list[str]()

    @app.task
    async def asks(ctx: Context) -> None:
        await ctx.wait_for(ctx.token("approval"))

    @asks.on_cancel
    async def clean(ctx: Context, reason: str) -> None:
        hooked.append(reason)

    async with app, serving(app, tmp_path) as server, app.worker(), hearing(app) as ends:
        run = await asks.trigger()
        await until_asked(lambda: is_waiting(server, run))
        await app.client.cancel(run.run_id, reason="never mind")
        assert await is_cancelled(run, "never mind")
        await until(lambda: run.run_id in ends.by_run)
        assert (hooked, ends.by_run) == (["never mind"], {run.run_id: ["cancelled"]})
        # And from elsewhere, later.
        later = await app.client.run(run.run_id, "asks")
        assert await is_cancelled(later, "never mind")


async def test_cancelled_on_its_way_into_a_wait(own_app: App, tmp_path: Path) -> None:
    @own_app.task
    async def asks(ctx: Context) -> None:
        await ctx.wait_for(ctx.token("approval"))

    names = own_app.settings.names
    async with own_app, hearing(own_app) as ends:
        async with serving(own_app, tmp_path):
            pass
        async with own_app.worker():
            run = await asks.trigger()
            broker = own_app._embedded
            assert broker is not None
            await until(lambda: len(broker.messages(f"{names.server}.waits")) == 1)
            await own_app.client.cancel(run.run_id)
            async with serving(own_app, tmp_path):
                assert await is_cancelled(run)
                await until(lambda: run.run_id in ends.by_run)
        assert ends.by_run == {run.run_id: ["cancelled"]}


async def test_everything_below_a_run_ends_with_it(app: App, tmp_path: Path) -> None:
    begun = list[str]()

    @app.task
    async def leaf(name: str) -> None:
        begun.append(name)
        await asyncio.Event().wait()

    @app.task
    async def branch(name: str, ctx: Context) -> None:
        begun.append(name)
        await ctx.wait_for(leaf.call(f"{name}.leaf"))

    @app.task
    async def root(name: str, ctx: Context) -> None:
        begun.append(name)
        await ctx.wait_for(branch.map([f"{name}.1", f"{name}.2"]))

    async with app, serving(app, tmp_path) as server, app.worker(), hearing(app) as ends:
        run = await root.trigger("a")
        await until(lambda: sum(name.endswith("leaf") for name in begun) == 2)
        await until_asked(lambda: is_waiting(server, run))
        await app.client.cancel(run.run_id, children=True)
        assert await is_cancelled(run)
        await until(lambda: len(ends.by_run) == 5)
        assert set(map(tuple, ends.by_run.values())) == {("cancelled",)}


async def test_below_a_run_in_the_middle_of_a_tree(own_app: App, tmp_path: Path) -> None:
    begun, runs = list[str](), dict[str, Run[None]]()

    @own_app.task
    async def chain(depth: int, ctx: Context) -> None:
        runs[f"{depth}"] = await own_app.client.run(ctx.run_id, "chain")
        if depth < 4:
            await ctx.step("below", below, depth + 1)
        begun.append(ctx.run_id)
        await asyncio.Event().wait()

    async def below(depth: int) -> None:
        await chain.trigger(depth)

    async with (
        own_app,
        serving(own_app, tmp_path) as server,
        own_app.worker() as worker,
        hearing(own_app) as ends,
    ):
        await until_known(server, worker)
        await chain.trigger(1)
        await until(lambda: len(begun) == 4)
        resources = server.resources
        assert resources is not None

        async def recorded() -> bool:
            async with resources.store.begin() as connection:
                rows = [await history.shown(connection, run_id) for run_id in begun]
            return all(row is not None for row in rows)

        await until_asked(recorded)
        await own_app.client.cancel(runs["2"].run_id, children=True)
        await until(lambda: len(ends.by_run) == 3)
        assert set(ends.by_run) == {runs[depth].run_id for depth in "234"}
        await own_app.client.cancel(runs["1"].run_id)
        await until(lambda: len(ends.by_run) == 4)

        async def known() -> set[str]:
            async with resources.store.begin() as connection:
                return await cancels.among(connection, begun)

        await until_asked(lambda: _equal(known(), set(begun)))


async def test_a_pause_is_known_and_said_again(own_app: App, tmp_path: Path) -> None:
    heard = list[Entry]()

    @own_app.task
    async def work() -> int:
        return 1

    async def paused_tasks(server: Server) -> set[str]:
        assert server.resources is not None
        async with server.resources.store.begin() as connection:
            return set(await control.paused(connection))

    async with own_app:
        async with serving(own_app, tmp_path) as server:
            await own_app.client.pause("work", reason="it hurts")
            await own_app.client.pause("other")
            await own_app.client.resume("other")
            await until_asked(lambda: _equal(paused_tasks(server), {"work"}))
        transport = own_app.connect()
        await transport.open(timeout=1)
        # The broker forgets the log; a server that starts says again what holds.
        await transport.delete(own_app.settings.names.control)
        await transport.declare(own_app.topology())
        async with serving(own_app, tmp_path) as server:
            steering = Steering(
                worker="test", settings=own_app.settings, clock=own_app.clock, obey=heard.append
            )
            await steering.start(transport)
            await until(lambda: any(entry.kind == "pause" for entry in heard))
            assert steering.standing.paused == {"work"}
            await until(lambda: steering.standing.recording)
            async with own_app.worker() as worker:
                assert worker.paused == {"work"}
                await own_app.client.resume("work")
                assert await (await work.trigger()).result(timeout=SECONDS) == 1
            await until_asked(lambda: _equal(paused_tasks(server), set()))
            await steering.stop()
        await transport.close()


async def _equal(found: Any, wanted: set[str]) -> bool:
    return bool(await found == wanted)
