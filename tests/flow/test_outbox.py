"""The outbox: what the broker refuses by itself keeps nothing else, and a dead server's claims."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from brokertask import App, Settings
from brokertask.envelope import Message
from brokertask.server import outbox as sending
from brokertask.server.messages import pack_message
from brokertask.server.store.schema import outbox
from brokertask.topology import Route
from brokertask.values import pack
from tests.flow.deciding import until
from tests.flow.serving import serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/server.db"


def an_app() -> App:
    app = App("shop", settings=Settings(amqp_url="memory:"))

    @app.task
    def pay(amount: int) -> int:
        return amount

    return app


async def test_messages_that_are_refused_keep_no_others_waiting(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "BATCH", 5)
    app = an_app()
    async with app, serving(app, store_url) as server:
        resources = server.resources
        names = resources.names
        message = Message(body=b"\x01", type="pay", message_id="m", correlation_id="m")
        async with resources.store.begin() as connection:
            for _ in range(10):
                await resources.outbox.add(connection, Route(names.tasks, "nobody"), message)
            await resources.outbox.add(connection, Route(names.tasks, "pay"), message)
        resources.outbox.poke()

        async def taken() -> bool:
            depth = await resources.transport.depth(names.queue("pay"))
            return depth is not None and depth.ready == 1

        async def only_refused_ones_left() -> bool:
            async with resources.store.read() as connection:
                return await connection.scalar(select(func.count()).select_from(outbox)) == 10

        await until(taken)
        await until(only_refused_ones_left)


async def test_what_a_dead_server_has_claimed_is_published_by_another(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "CLAIM_MS", 300)
    app = an_app()
    async with app, serving(app, store_url) as server:
        resources = server.resources
        names = resources.names
        message = Message(body=b"\x01", type="pay", message_id="m", correlation_id="m")
        row = {
            "exchange": names.tasks,
            "key": "pay",
            "also": pack([]),
            "message": pack_message(message),
            "claimed_ms": resources.clock.now_ms(),
        }
        async with resources.store.begin() as connection:
            await connection.execute(insert(outbox).values(row))

        async def taken() -> bool:
            depth = await resources.transport.depth(names.queue("pay"))
            return depth is not None and depth.ready == 1

        await until(taken)
