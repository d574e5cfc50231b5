"""Transactions: who waits for whom, and what a cancelled one leaves."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import insert, select

from brokertask.server.store.engine import Database
from brokertask.server.store.schema import pauses

pytestmark = pytest.mark.anyio
ROW = {"task": "t", "at_ms": 1, "reason": ""}


async def test_who_reads_waits_for_nobody_who_writes(store: Database) -> None:
    async with store.begin() as writing:
        await writing.execute(insert(pauses).values(ROW))
        async with asyncio.timeout(5), store.read() as reading:
            assert (await reading.execute(select(pauses))).all() == []
    async with store.read() as reading:
        assert len((await reading.execute(select(pauses))).all()) == 1


async def test_a_store_without_a_file_survives_a_cancelled_transaction() -> None:
    store = Database("sqlite+aiosqlite://")
    await store.open()
    try:
        async with store.begin() as connection:
            await connection.execute(insert(pauses).values(ROW))
        begun = asyncio.Event()

        async def write() -> None:
            async with store.begin() as connection:
                await connection.execute(insert(pauses).values({**ROW, "task": "other"}))
                begun.set()
                await asyncio.Event().wait()

        writing = asyncio.create_task(write())
        await begun.wait()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        async with store.begin() as connection:
            assert [row.task for row in await connection.execute(select(pauses))] == ["t"]
    finally:
        await store.close()
