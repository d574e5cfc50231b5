"""The same suite on SQLite and on PostgreSQL, each test on an empty store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from brokertask.server.store.engine import Database
from tests.flow.deciding import fresh_database


@pytest.fixture(params=["sqlite", "postgresql"])
async def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/server.db"
    return await fresh_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Database]:
    """An open store."""
    store = Database(store_url)
    await store.open()
    yield store
    await store.close()
