"""A server that records: what comes twice, what no database takes, and how far behind it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from brokertask import App, Settings
from brokertask.envelope import Message
from brokertask.events import Event
from brokertask.outcome import AttemptError
from brokertask.server import history
from brokertask.topology import Route
from tests.api.stage import Stage, stage
from tests.flow.deciding import until

pytestmark = pytest.mark.anyio


async def publish(staged: Stage, message: Message, key: str) -> None:
    resources = staged.resources
    await resources.publish(Route(resources.names.events, key), message)


async def status(staged: Stage, run_id: str) -> str | None:
    async with staged.resources.store.read() as connection:
        row = await history.shown(connection, run_id)
    return None if row is None else str(row["status"])


async def test_what_no_database_takes_keeps_nothing_else_from_being_written(store_url: str) -> None:
    app = App("shop", settings=Settings(amqp_url="memory:"))
    fine = Event(event="completed", run_id="r", task="t", attempt=1, at_ms=5, worker="w")
    odd: list[dict[str, Any]] = [
        {"at_ms": 2**64 - 1},
        {"attempt": 2**64 - 1},
        {"done": 2**64 - 1, "event": "progress"},
        {"error": AttemptError(1, "E", "a\x00b", 1, "w"), "event": "failed"},
        {"delay_ms": -(2**63), "event": "sleeping"},
        {"event": "step", "step": "s", "number": 2**64 - 1},
        {"event": "log", "lines": [[2**64 - 1, "INFO", "\x00"]]},
    ]
    async with stage(app, store_url=store_url) as staged:
        for number, values in enumerate(odd):
            event = replace(fine, run_id=f"odd-{number}", **values)
            await publish(staged, event.message(), "completed.t")
        for body in (b"", b"\xc1", b"\x93\x01", bytes(100)):
            broken = Message(body=body, type="completed", correlation_id="b")
            await publish(staged, broken, "completed.t")
        await publish(staged, fine.message(), "completed.t")

        async def written() -> bool:
            return await status(staged, "r") == "completed"

        await until(written)
        assert await status(staged, "odd-3") == "failed"
        resources = staged.resources
        queue = f"{resources.names.server}.events"

        async def taken() -> bool:
            depth = await resources.transport.depth(queue)
            return depth is not None and depth.ready == 0

        await until(taken)


async def test_servers_say_that_they_are_there_and_how_far_behind(store_url: str) -> None:
    async with stage(store_url=store_url) as staged, staged.client() as client:

        async def told() -> bool:
            return len((await client.get("/servers")).json()) == 1

        await until(told)
        (server,) = (await client.get("/servers")).json()
        assert server["lag_ms"] >= 0
        assert server["seen_ms"] >= server["started_ms"]
