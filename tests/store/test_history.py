"""Listing and counting runs by filters, page by page, on both databases."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from brokertask.server.history import RunFilter, counted, listed, shown
from brokertask.server.runs import record
from brokertask.server.store.engine import Database
from tests.bench.history import DAY_MS, fact, filters

pytestmark = pytest.mark.anyio
RUNS = 1_500


@pytest.fixture
async def full(store: Database) -> Database:
    numbers = list(range(RUNS))
    random.Random(1).shuffle(numbers)
    async with store.begin() as connection:
        await record(connection, [fact(number, RUNS) for number in numbers])
    return store


async def every_page(store: Database, wanted: RunFilter, limit: int) -> list[str]:
    found: list[str] = []
    before: tuple[int, str] | None = None
    async with store.read() as connection:
        while rows := await listed(connection, wanted, before=before, limit=limit):
            assert len(rows) <= limit
            found += [row["run_id"] for row in rows]
            before = rows[-1]["triggered_ms"], rows[-1]["run_id"]
    return found


def takes(wanted: RunFilter, row: dict[str, Any]) -> bool:
    """What a filter says, in plain words."""
    told = f"{row['error_type']}: {row['error_message']}" if row["error_type"] else ""
    tags = row["tags"].split("\x1f")
    return (
        (not wanted.statuses or row["status"] in wanted.statuses)
        and (wanted.since_ms is None or row["triggered_ms"] >= wanted.since_ms)
        and (wanted.until_ms is None or row["triggered_ms"] < wanted.until_ms)
        and all(tag in tags for tag in wanted.tags)
        and (wanted.error is None or wanted.error.lower() in told.lower())
        and all(
            getattr(wanted, name) in (None, row.get(name))
            for name in ("task", "parent", "root", "trace_id", "worker")
        )
    )


async def test_pages_and_counts_are_what_a_filter_says(full: Database) -> None:
    facts = [fact(number, RUNS) for number in range(RUNS)]
    rows = [{**one.latest, **one.asked, "run_id": one.run_id, "task": one.task} for one in facts]
    rows.sort(key=lambda row: (row["triggered_ms"], row["run_id"]), reverse=True)
    chance = random.Random(2)
    wanted = [*filters(RUNS, chance).values(), *filters(RUNS, chance).values()]
    wanted += [RunFilter(parent=row["parent"]) for row in rows if row["parent"]][:1]
    wanted += [RunFilter(trace_id=rows[7]["trace_id"]), RunFilter(tags=("web", "no such"))]
    for each in wanted:
        expected = [row for row in rows if takes(each, row)]
        assert await every_page(full, each, 97) == [row["run_id"] for row in expected], each
        async with full.read() as connection:
            counts = await counted(connection, each)
        assert counts.by_status == Counter(row["status"] for row in expected), each
        assert not counts.capped


async def test_runs_of_one_instant_are_all_listed(store: Database) -> None:
    facts = [fact(number, 10**9 * DAY_MS) for number in range(20)]
    assert len({one.asked["triggered_ms"] for one in facts}) == 1
    async with store.begin() as connection:
        await record(connection, facts)
    pages = await every_page(store, RunFilter(), 3)
    assert pages == sorted((one.run_id for one in facts), reverse=True)


async def test_what_no_database_takes_in_a_text_is_replaced(store: Database) -> None:
    one = fact(1, RUNS)
    told = {**one.latest, "error_type": "E", "error_message": "a\x00b\udc00c"}
    odd = type(one)(**{**{n: getattr(one, n) for n in one.__slots__}, "latest": told})
    async with store.begin() as connection:
        await record(connection, [odd])
        row = await shown(connection, one.run_id)
    assert row is not None
    assert row["error_message"] == "a\ufffdb?c"
