"""Each role works with the rights that `brokertask permissions` prints, and with no others."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, urlsplit

import httpx
import pytest

from brokertask import App, Context, Retry, Settings
from brokertask.errors import AccessDenied
from brokertask.permissions import Role
from brokertask.server.service import Server
from brokertask.server.settings import ServerSettings
from brokertask.topology import Queue, Topology, server
from infra.rabbitmq.node import Node
from tests.flow.commandline import Place

pytestmark = pytest.mark.anyio
Login: TypeAlias = Callable[[Role], str]


@pytest.fixture
async def login(rabbitmq_node: Node, amqp_url: str, tmp_path: Path) -> Login:
    """Returns the URL of a user with the rights of a role, as the command prints them."""
    vhost = urlsplit(amqp_url).path[1:]
    printed: dict[str, str] = {}
    for role in ("publisher", "worker", "server", "topology"):
        words = ("permissions", "--role", role, "--vhost", vhost, "--user", f"{vhost}-{role}")
        done = await Place(tmp_path, amqp_url).brokertask(*words)
        assert done.code == 0, done.err
        printed[role] = done.out

    def make(role: Role) -> str:
        user = f"{vhost}-{role}"
        command = shlex.split(printed[role])
        assert command[:5] == ["rabbitmqctl", "set_permissions", "-p", vhost, user]
        rights = dict(zip(("configure", "write", "read"), command[5:], strict=True))
        rabbitmq_node.api("PUT", f"/api/users/{user}", {"password": "secret", "tags": ""})
        rabbitmq_node.api("PUT", f"/api/permissions/{quote(vhost, safe='')}/{user}", rights)
        return f"amqp://{user}:secret@127.0.0.1:{rabbitmq_node.port}/{vhost}"

    return make


@pytest.fixture(autouse=True)
def users(rabbitmq_node: Node) -> Iterator[None]:
    yield
    for user in rabbitmq_node.api("GET", "/api/users"):
        if user["name"].startswith("test-"):
            rabbitmq_node.api("DELETE", f"/api/users/{user['name']}")


def made(url: str) -> App:
    """An app with a task that triggers another one, which remembers a step and fails once."""
    app = App("shop", settings=Settings(amqp_url=url, declare=False))

    @app.task(retry=Retry(max_attempts=2, min_delay=0.02))
    async def stock(number: int, ctx: Context) -> int:
        await ctx.step("look", asyncio.sleep, 0)
        if ctx.attempt == 1:
            raise ValueError("not yet")
        return number

    @app.task()
    async def order(number: int) -> int:
        run = await stock.trigger(number)
        return await run.result(timeout=60) + 1

    @app.task(retry=Retry(max_attempts=1))
    async def dies() -> None:
        raise ValueError("once and again")

    return app


@pytest.fixture
async def applied(login: Login) -> None:
    """The topology is there, made by a user of the role for it."""
    app = made(login("topology"))
    transport = app.connect()
    await transport.open(timeout=30)
    await transport.declare(app.topology())
    await transport.declare(server(app.settings.names))
    await transport.close()


async def test_a_publisher_and_a_worker_need_no_more(login: Login, applied: None) -> None:
    worker_app, app = made(login("worker")), made(login("publisher"))
    async with worker_app, app:
        worker = worker_app.worker()
        await worker.start()
        run = await app.client.trigger("order", 7, delay=0.05)
        assert await run.result(timeout=60) == 8
        await worker.stop()


async def test_a_publisher_takes_no_runs_and_makes_no_queues(login: Login, applied: None) -> None:
    transport = made(login("publisher")).connect()
    await transport.open(timeout=30)
    try:
        with pytest.raises(AccessDenied):
            await transport.consume("bt.q.order", lambda delivery: None, prefetch=1)
        with pytest.raises(AccessDenied):
            await transport.declare(Topology((), (Queue("bt.q.another"),), ()))
    finally:
        await transport.close()


async def test_a_worker_deletes_no_queue_of_a_task(login: Login, applied: None) -> None:
    transport = made(login("worker")).connect()
    await transport.open(timeout=30)
    try:
        with pytest.raises(AccessDenied):
            await transport.delete("bt.dead.order")
    finally:
        await transport.close()


async def test_a_server_needs_no_more(login: Login, applied: None, tmp_path: Path) -> None:
    worker_app, app = made(login("worker")), made(login("publisher"))
    owner = made(login("server"))
    settings = ServerSettings(store_url=f"sqlite+aiosqlite:///{tmp_path}/s.db", bind="127.0.0.1:0")
    serving = Server(owner.settings, settings, owner.connect())
    running = asyncio.create_task(serving.run())
    await serving.started.wait()
    assert serving.site is not None
    await serving.site.listening.wait()
    base = f"http://127.0.0.1:{serving.site.port}/api/v1"
    async with worker_app, app, httpx.AsyncClient(base_url=base, timeout=60) as client:
        worker = worker_app.worker()
        await worker.start()
        asked = await client.post("/tasks/order/runs", json={"payload": 7, "delay": 0.05})
        path = f"/runs/{asked.json()['run_id']}/result"
        assert (await client.get(path, params={"wait": 60})).json()["result"] == 8
        kept = {"payload": 1, "idempotency_key": "k"}
        assert (await client.post("/tasks/stock/runs", json=kept)).status_code == 201
        first = await app.client.trigger("stock", 1, idempotency_key="k")
        assert (await client.get(f"/runs/{first.run_id}")).status_code == 200
        dead = (await client.post("/tasks/dies/runs", json={})).json()["run_id"]
        ended = await client.get(f"/runs/{dead}/result", params={"wait": 60})
        assert ended.json()["status"] == "failed"
        assert (await client.post(f"/runs/{dead}/redrive", json={})).status_code == 200
        async with client.stream("GET", "/events") as stream:
            assert stream.status_code == 200
        queues = {each["queue"] for each in (await client.get("/queues")).json()}
        assert {"bt.q.order", "bt.dead.order", "bt.server.events"} <= queues
        await worker.stop()
    serving.stop()
    await running
