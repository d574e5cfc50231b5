"""Callbacks that come before their token: few, small, and not for long."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from brokertask.server import tokens
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import tokens as table
from brokertask.wait import token_id

pytestmark = pytest.mark.anyio


async def call_back(store: Database, secret: str, value: object, *, now_ms: int) -> str:
    async with store.begin() as connection:
        token = token_id(secret)
        return await tokens.complete(connection, token, value, by=tokens.CALLBACK, now_ms=now_ms)


async def test_a_callback_with_an_unknown_secret_is_kept_if_it_is_small(store: Database) -> None:
    assert await call_back(store, "one", "a" * 100, now_ms=1) == "done"
    assert await call_back(store, "one", "a" * 100, now_ms=2) == "repeated"
    assert await call_back(store, "two", "a" * 5_000, now_ms=1) == "unknown"
    async with store.read() as connection:
        assert await connection.scalar(select(func.count()).select_from(table)) == 1


async def test_callbacks_with_unknown_secrets_are_few_and_go(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_EARLY", 3)
    answers = [await call_back(store, f"s{n}", n, now_ms=n) for n in range(5)]
    assert answers == ["done", "done", "done", "unknown", "unknown"]
    later_ms = tokens.EARLY_MS + 3
    assert await call_back(store, "later", 1, now_ms=later_ms) == "done"
    async with store.read() as connection:
        assert await connection.scalar(select(func.count()).select_from(table)) == 1
