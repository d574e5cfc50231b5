"""Triggers with keys and schedules on RabbitMQ, with servers as they are deployed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from brokertask import App, IdempotencyConflict, Retry, Schedule, Settings, Singleton, Tick
from brokertask.server.service import Server
from brokertask.server.settings import ServerSettings
from tests.flow.deciding import eventually

pytestmark = pytest.mark.anyio

CALLERS = 100


@pytest.mark.timeout(180)
async def test_keys_and_schedules_on_rabbitmq(amqp_url: str, tmp_path: Path) -> None:
    app = App("shop", settings=Settings(amqp_url=amqp_url))
    done: list[int] = []
    ticks: list[Tick] = []

    @app.task(retry=Retry(max_attempts=1))
    async def charge(order: int) -> int:
        done.append(order)
        return order * 2

    @app.task(schedule=Schedule(every=1))
    async def tidy(tick: Tick) -> None:
        ticks.append(tick)

    store = ServerSettings(bind="127.0.0.1:0", store_url=f"sqlite+aiosqlite:///{tmp_path}/s.db")
    servers = [Server(app.settings, store, app.connect()) for _ in range(2)]
    serving = [asyncio.create_task(server.run()) for server in servers]
    for server in servers:
        await server.started.wait()
    async with app.worker():
        runs = await asyncio.gather(
            *(charge.trigger(7, idempotency_key="order-7") for _ in range(CALLERS))
        )
        assert len({run.run_id for run in runs}) == 1
        # All but one of them ask the servers for the result.
        assert await asyncio.gather(*(run.result(timeout=60) for run in runs)) == [14] * CALLERS
        with pytest.raises(IdempotencyConflict):
            await charge.trigger(8, idempotency_key="order-7")
        later = await charge.trigger(9, delay="500ms", singleton=Singleton("nine"))
        assert (await charge.trigger(9, singleton=Singleton("nine"))).run_id == later.run_id
        assert await later.result(timeout=60) == 18
        await eventually(lambda: len(ticks) >= 3)
    for server in servers:
        server.stop()
    await asyncio.gather(*serving)
    await app.client.close()
    assert done == [7, 9]
    instants = [tick.at for tick in ticks]
    assert sorted(set(instants)) == instants
    assert all(tick.at.microsecond == 0 for tick in ticks)
