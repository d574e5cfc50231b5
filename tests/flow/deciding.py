"""What tests of a server that decides on triggers and schedules share."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

SECONDS = 20.0


async def eventually(condition: Callable[[], Any]) -> None:
    """Return when a condition holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when a condition holds that has to be asked for."""
    async with asyncio.timeout(SECONDS):
        while not await condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


async def fresh_database(url: str) -> str:
    """Return the URL of a new database beside another one of PostgreSQL."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"create database {name}"))
    await engine.dispose()
    return make_url(url).set(database=name).render_as_string(hide_password=False)
