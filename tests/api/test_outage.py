"""A store or a broker that is gone is a 503 that says which; on PostgreSQL all is as on SQLite."""

from __future__ import annotations

import asyncio

import pytest

from brokertask import App, Settings
from brokertask.errors import BrokerUnavailable, StoreUnavailable
from brokertask.server.service import Server
from brokertask.server.settings import ServerSettings
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import metadata
from tests.api.stage import stage

pytestmark = pytest.mark.anyio


async def test_a_store_that_is_gone_is_a_503_that_says_so() -> None:
    async with stage() as staged, staged.client() as client:
        store = staged.resources.store
        assert isinstance(store, Database)
        async with store.begin() as connection:
            await connection.run_sync(metadata.tables["api_tokens"].drop)
        answer = await client.get("/me")
        assert (answer.status_code, answer.json()["kind"]) == (503, "store_unavailable")
        assert "retry-after" in answer.headers


async def test_a_broker_that_is_gone_is_a_503_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stage() as staged, staged.client() as client:

        async def gone(queue: str) -> None:
            raise BrokerUnavailable("no connection")

        monkeypatch.setattr(staged.resources.transport, "depth", gone)
        answer = await client.get("/queues")
        assert (answer.status_code, answer.json()["kind"]) == (503, "broker_unavailable")
        assert (await client.get("/runs")).status_code == 200


async def test_a_database_that_does_not_answer_ends_the_start_with_a_sentence() -> None:
    store = Database("postgresql+asyncpg://nobody:secret@127.0.0.1:1/none")
    with pytest.raises(StoreUnavailable, match="BROKERTASK_SERVER_STORE_URL") as told:
        await store.open()
    assert "secret" not in str(told.value)
    await store.close()


async def test_a_history_on_postgresql(postgres_url: str) -> None:
    app = App("shop", settings=Settings(amqp_url="memory:"))

    @app.task()
    async def double(number: int) -> int:
        return 2 * number

    async with stage(app, store_url=postgres_url) as staged, app, staged.client() as client:
        worker = app.worker()
        await worker.start()
        asked = [
            client.post("/tasks/double/runs", json={"payload": n, "tags": ["x%y"]})
            for n in range(5)
        ]
        ids = [answer.json()["run_id"] for answer in await asyncio.gather(*asked)]
        for run_id in ids:
            answer = await client.get(f"/runs/{run_id}/result", params={"wait": 60})
            assert answer.json()["status"] == "completed"
        listed = (await client.get("/runs", params={"tag": "x%y", "limit": 3})).json()
        rest = await client.get("/runs", params={"tag": "x%y", "cursor": listed["next"]})
        found = [run["run_id"] for run in [*listed["items"], *rest.json()["items"]]]
        assert sorted(found) == sorted(ids)
        assert (await client.get("/runs", params={"tag": "x_y"})).json()["items"] == []
        await staged.token("admin")
        assert (await client.get("/runs")).status_code == 401
        await worker.stop()


async def test_an_open_address_without_a_token_is_refused_at_the_start(tmp_path: object) -> None:
    app = App("shop", settings=Settings(amqp_url="memory:"))
    settings = ServerSettings(store_url=f"sqlite+aiosqlite:///{tmp_path}/s.db", bind="0.0.0.0:0")
    with pytest.raises(Exception, match="brokertask tokens create"):
        await Server(app.settings, settings, app.connect()).run()
