"""The rows of jobs, on both databases: frozen, claimed by one, moved once, forgotten."""

from __future__ import annotations

import asyncio

import pytest

from brokertask.events import Event
from brokertask.outcome import AttemptError
from brokertask.server import bulk
from brokertask.server.bulk import Item, Job
from brokertask.server.history import RunFilter
from brokertask.server.runs import event_fact, record
from brokertask.server.store.engine import Database

pytestmark = pytest.mark.anyio
NOW_MS = 1_800_000_000_000
JOB = Job(id="job", action="redrive", reason="", rate=None, options={})


async def write(store: Database, first: int, last: int, *, status: str = "failed") -> None:
    facts = [
        event_fact(
            Event(
                event=status,
                run_id=f"run-{number:03}",
                task=f"task-{number % 2}",
                attempt=1,
                at_ms=NOW_MS + number,
                worker="w",
                error=AttemptError(1, "E", "m", NOW_MS, "") if status == "failed" else None,
            )
        )
        for number in range(first, last)
    ]
    async with store.begin() as connection:
        await record(connection, facts)


async def create(store: Database, job: Job = JOB, wanted: RunFilter | None = None) -> int:
    async with store.begin() as connection:
        return await bulk.create(connection, job, wanted or RunFilter(), now_ms=NOW_MS, by="ada")


async def test_a_selection_is_what_was_previewed_and_stays_so(store: Database) -> None:
    await write(store, 0, 10)
    await write(store, 10, 15, status="completed")
    async with store.read() as connection:
        preview = await bulk.previewed(connection, "redrive", RunFilter(), limit=3)
        nothing = await bulk.previewed(connection, "cancel", RunFilter(statuses=("failed",)))
    assert (preview.count, preview.by_task) == (10, {"task-0": 5, "task-1": 5})
    assert (list(preview.first), preview.capped) == (["run-000", "run-001", "run-002"], False)
    assert nothing.count == 0
    assert await create(store) == 10
    await write(store, 20, 25)
    async with store.read() as connection:
        rows = await bulk.items_of(connection, "job", limit=100)
    assert [row["run_id"] for row in rows] == [f"run-{number:03}" for number in range(10)]


async def test_a_large_selection_is_the_newest(
    store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "MAX_SELECTED", 4)
    await write(store, 0, 10)
    async with store.read() as connection:
        preview = await bulk.previewed(connection, "replay", RunFilter())
    assert (preview.count, preview.capped) == (4, True)
    assert await create(store) == 4
    async with store.read() as connection:
        rows = await bulk.items_of(connection, "job")
    assert [row["run_id"] for row in rows] == list(preview.first)
    assert preview.first[0] == "run-006"


async def test_a_job_is_one_servers_until_that_is_silent(store: Database) -> None:
    await write(store, 0, 2)
    await create(store)

    async def take(server: str, at_ms: int) -> Job | None:
        async with store.begin() as connection:
            return await bulk.take(connection, server=server, now_ms=at_ms)

    taken = await asyncio.gather(*(take(f"server-{n}", NOW_MS) for n in range(5)))
    (mine,) = [server for server, job in enumerate(taken) if job is not None]
    async with store.begin() as connection:
        kept = NOW_MS + bulk.CLAIM_MS
        assert await bulk.keep(connection, "job", server=f"server-{mine}", now_ms=kept) == "running"
        assert await bulk.keep(connection, "job", server="other", now_ms=kept) is None
    assert await take("other", kept + bulk.CLAIM_MS - 1) is None
    assert await take("other", kept + bulk.CLAIM_MS) is not None
    async with store.begin() as connection:
        assert await bulk.keep(connection, "job", server=f"server-{mine}", now_ms=kept) is None
        await bulk.leave(connection, "job", server="other")
    assert await take("third", kept) is not None


async def test_an_item_is_moved_once_however_many_try(store: Database) -> None:
    await write(store, 0, 1)
    await create(store)
    item = Item("job", 1, "run-000", "task-0", "waiting")

    async def move() -> bool:
        async with store.begin() as connection:
            return await bulk.move(
                connection, item, "sent", now_ms=NOW_MS, before=["waiting"], redrives=2
            )

    assert sorted(await asyncio.gather(*(move() for _ in range(8)))) == [False] * 7 + [True]
    async with store.begin() as connection:
        assert await bulk.sent(connection, item) == 2
        assert await bulk.move(connection, item, "done", now_ms=NOW_MS)
        assert not await bulk.move(connection, item, "failed", now_ms=NOW_MS)
        assert await bulk.sent(connection, item) == 2


async def test_items_of_dead_letters_come_task_by_task(store: Database) -> None:
    await write(store, 0, 6)
    await create(store)
    async with store.begin() as connection:
        some = await bulk.next_items(connection, JOB, states=bulk.OPEN, limit=10)
        for item in some:
            await bulk.move(connection, item, "done", now_ms=NOW_MS)
        others = await bulk.next_items(connection, JOB, states=bulk.OPEN, limit=10)
    assert [item.task for item in some] == ["task-0"] * 3
    assert [item.run_id for item in others] == ["run-001", "run-003", "run-005"]


async def test_jobs_end_are_aborted_and_forgotten(store: Database) -> None:
    await write(store, 0, 2)
    await create(store)
    async with store.begin() as connection:
        await bulk.forget(connection, before_ms=NOW_MS + 10)
        assert await bulk.abort(connection, "job")
        taken = await bulk.take(connection, server="s", now_ms=NOW_MS)
        assert taken is not None
        assert taken.aborting
        await bulk.finish(connection, "job", now_ms=NOW_MS)
        assert not await bulk.abort(connection, "job")
        (row,) = await bulk.listed(connection)
        assert (row["state"], row["counts"]["waiting"], row["total"]) == ("aborted", 2, 2)
        await bulk.forget(connection, before_ms=NOW_MS + 10)
        assert await bulk.listed(connection) == []
        assert await bulk.items_of(connection, "job") == []
