"""Jobs over many runs: what is previewed is what is done, once to each, and told of each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from brokertask import Abort, App, Context, Settings
from brokertask.deadletter import Filter
from brokertask.deadletters import Selection
from brokertask.server import bulk
from brokertask.server.bulk import Action, Job
from brokertask.server.history import RunFilter
from tests.api.stage import Stage, stage
from tests.api.test_cli import Say, say
from tests.api.test_runs import LONG
from tests.flow.deciding import until

__all__ = ["say"]  # A fixture.

pytestmark = pytest.mark.anyio


class Shop:
    """An app whose runs fail until it is mended."""

    def __init__(self) -> None:
        self.app = App("shop", settings=Settings(amqp_url="memory:"))
        self.mended = False
        self.done: list[tuple[str, Any]] = []

        @self.app.task()
        async def charge(number: int, ctx: Context) -> int:
            if not self.mended:
                raise Abort(f"no bank for order {number}")
            self.done.append((ctx.run_id, number))
            return number

        @self.app.task()
        async def endless(number: int) -> None:
            await asyncio.Event().wait()

        self.charge = charge
        self.endless = endless


@asynccontextmanager
async def working(shop: Shop) -> AsyncIterator[tuple[Stage, httpx.AsyncClient]]:
    async with stage(shop.app) as staged, shop.app, staged.client() as client:
        worker = shop.app.worker()
        await worker.start()
        try:
            async with asyncio.timeout(2 * LONG):

                async def heard() -> bool:
                    return bool((await client.get("/workers")).json())

                # From then on it tells of what begins.
                await until(heard)
                yield staged, client
        finally:
            await worker.stop(grace=0)


async def dead(shop: Shop, client: httpx.AsyncClient, count: int) -> list[str]:
    """Have so many runs die, and return their ids."""
    runs = await shop.charge.trigger_many(range(count))
    await until_counted(client, "failed", count)
    return [run.run_id for run in runs]


async def until_counted(client: httpx.AsyncClient, status: str, count: int) -> None:
    async def counted() -> bool:
        answer = await client.get("/counts", params={"status": status})
        return bool(answer.json()["total"] == count)

    await until(counted)


async def start(client: httpx.AsyncClient, action: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/bulk/start/{action}", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def ended(client: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    found = job

    async def over() -> bool:
        nonlocal found
        found = (await client.get(f"/bulk/jobs/{job['id']}")).json()
        return found["ended_ms"] is not None

    await until(over)
    return found


async def items(client: httpx.AsyncClient, job: dict[str, Any]) -> Sequence[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        given = {"limit": 7} if cursor is None else {"limit": 7, "cursor": cursor}
        page = (await client.get(f"/bulk/jobs/{job['id']}/items", params=given)).json()
        found += page["items"]
        if (cursor := page["next"]) is None:
            return found


def counts(**some: int) -> dict[str, int]:
    return dict.fromkeys(("waiting", "sent", "done", "skipped", "failed"), 0) | some


async def test_dead_runs_are_previewed_redriven_and_end_once() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        run_ids = await dead(shop, client, 20)
        (group,) = (await client.get("/dead")).json()["groups"]
        select = {"task": "charge", "fingerprint": group["fingerprint"]}
        preview = (await client.get("/bulk/preview/redrive", params=select)).json()
        assert (preview["count"], preview["by_task"]) == (20, {"charge": 20})
        wrong = await client.post(
            "/bulk/start/redrive", json={"select": select, "expected": 19, "reason": "mended"}
        )
        assert wrong.status_code == 409
        assert (await client.get("/bulk/jobs")).json()["items"] == []
        shop.mended = True
        # That one may have gone on by itself since the preview stops nothing.
        job = await start(client, "redrive", select=select, expected=21, reason="mended")
        found = await ended(client, job)
        assert (found["state"], found["counts"]) == ("done", counts(done=20))
        await until_counted(client, "completed", 20)
        assert Counter(run_id for run_id, _ in shop.done) == Counter(run_ids)
        told = await items(client, job)
        assert [one["number"] for one in told] == list(range(1, 21))
        assert {one["run_id"] for one in told} == set(run_ids)
        assert [one["run_id"] for one in told[:10]] == preview["first"]
        assert (await client.get("/dead")).json()["groups"] == []
        (entry, refused) = [
            one
            for one in (await client.get("/audit")).json()["items"]
            if one["action"] == "start_bulk"
        ]
        assert (entry["target"], entry["reason"], entry["status"]) == ("redrive", "mended", 201)
        assert refused["status"] == 409


async def test_what_died_again_counts_as_such() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        (run_id,) = await dead(shop, client, 1)
        job = await start(client, "redrive", select={"run_id": [run_id]}, expected=1)
        assert (await ended(client, job))["counts"] == counts(done=1)

        async def again() -> bool:
            groups = (await client.get("/dead")).json()["groups"]
            return bool(groups and groups[0]["again"] == 1)

        await until(again)


async def test_dead_runs_are_discarded_with_a_reason() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        run_ids = await dead(shop, client, 6)
        select = {"run_id": run_ids[:4]}
        job = await start(client, "discard", select=select, expected=4, reason="refunded")
        assert (await ended(client, job))["counts"] == counts(done=4)
        queues = {one["queue"]: one for one in (await client.get("/queues")).json()}
        assert queues["bt.dead.charge"]["ready"] == 2
        (group,) = (await client.get("/dead")).json()["groups"]
        assert group["count"] == 2
        gone = (await client.get("/runs", params={"discarded": True})).json()["items"]
        assert {one["run_id"] for one in gone} == set(run_ids[:4])
        rest = (await client.get("/bulk/preview/redrive")).json()
        assert rest["count"] == 2


async def test_a_run_that_is_not_dead_any_more_is_skipped_and_says_why() -> None:
    shop = Shop()
    async with working(shop) as (staged, client):
        run_ids = await dead(shop, client, 2)
        # Without a server, so that history does not know.
        selection = Selection.open(
            staged.resources.transport,
            staged.resources.broker_settings,
            ["charge"],
            Filter(run_ids=run_ids[:1]),
        )
        async with selection as found:
            assert [each.status async for each in found.discard()] == ["discarded"]
        shop.mended = True
        job = await start(client, "redrive", select={}, expected=2)
        assert (await ended(client, job))["counts"] == counts(done=1, skipped=1)
        (skipped,) = [one for one in await items(client, job) if one["state"] == "skipped"]
        assert skipped["run_id"] == run_ids[0]
        assert "not in the dead-letter queue" in skipped["detail"]


async def test_runs_are_cancelled_and_those_that_ended_meanwhile_are_skipped() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        runs = await shop.endless.trigger_many(range(5))
        await until_counted(client, "running", 5)
        select = {"task": "endless"}
        job = await start(client, "cancel", select=select, expected=5, reason="closing")
        assert (await ended(client, job))["counts"] == counts(done=5)
        await until_counted(client, "cancelled", 5)
        row = (await client.get(f"/runs/{runs[0].run_id}")).json()
        assert row["reason"] == "closing"
        nothing = await client.get("/bulk/preview/cancel", params=select)
        assert nothing.json()["count"] == 0


async def test_runs_are_replayed_with_their_payload_or_another_one() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        await dead(shop, client, 3)
        shop.mended = True
        select = {"task": "charge", "status": ["failed"]}
        job = await start(client, "replay", select=select, expected=3, rate=50)
        assert (await ended(client, job))["counts"] == counts(done=3)
        await until_counted(client, "completed", 3)
        assert sorted(number for _, number in shop.done) == [0, 1, 2]
        assert {one["detail"] for one in await items(client, job)} == {run for run, _ in shop.done}
        body = {"select": select, "expected": 3, "replace": True}
        refused = await client.post("/bulk/start/replay", json={**body, "payload": "seven"})
        assert refused.status_code == 422
        job = await start(client, "replay", **body, payload=7)
        assert (await ended(client, job))["counts"] == counts(done=3)
        await until_counted(client, "completed", 6)
        assert [number for _, number in shop.done[3:]] == [7, 7, 7]
        tagged = await client.get("/runs", params={"tag": f"bulk:{job['id']}"})
        assert len(tagged.json()["items"]) == 3


async def test_an_aborted_job_leaves_what_it_has_not_begun() -> None:
    shop = Shop()
    async with working(shop) as (_, client):
        await dead(shop, client, 30)
        shop.mended = True
        job = await start(client, "redrive", select={}, expected=30, rate=4)

        async def begun() -> bool:
            return bool((await client.get(f"/bulk/jobs/{job['id']}")).json()["counts"]["done"])

        await until(begun)
        said = await client.post(f"/bulk/jobs/{job['id']}/abort", json={"reason": "wrong"})
        assert (said.status_code, said.json()["state"]) == (202, "aborting")
        found = await ended(client, job)
        assert found["state"] == "aborted"
        done, left = found["counts"]["done"], found["counts"]["waiting"]
        assert done + left == 30
        assert left > 0
        await until_counted(client, "completed", done)
        rest = (await client.get("/bulk/preview/redrive")).json()
        assert rest["count"] == left
        again = await client.post(f"/bulk/jobs/{job['id']}/abort", json={})
        assert again.status_code == 409


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("redrive", {"children": True}),
        ("cancel", {"forget": True}),
        ("discard", {"replace": True}),
        ("replay", {"payload": 3}),
        ("replay", {"payload": 3, "replace": True}),
        ("redrive", {"rate": 0}),
        ("erase", {}),
    ],
)
async def test_what_would_be_passed_over_is_refused(action: str, body: dict[str, Any]) -> None:
    async with stage() as staged, staged.client() as client:
        answer = await client.post(
            f"/bulk/start/{action}", json={"select": {}, "expected": 1, **body}
        )
        assert answer.status_code == 422


async def test_a_viewer_may_look_and_not_act() -> None:
    async with stage() as staged, staged.client(await staged.token("viewer")) as client:
        assert (await client.get("/bulk/preview/discard")).status_code == 200
        body = {"select": {}, "expected": 1}
        assert (await client.post("/bulk/start/discard", json=body)).status_code == 403
        assert (await client.post("/bulk/jobs/x/abort", json={})).status_code == 403


async def test_a_job_is_started_followed_and_explained_on_the_command_line(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop()
    async with working(shop) as (staged, client):
        assert staged.server.site is not None
        url = f"http://127.0.0.1:{staged.server.site.port}"
        monkeypatch.setenv("BROKERTASK_SERVER_URL", url)
        run_ids = await dead(shop, client, 3)
        explained = (await say("why", run_ids[0])).output
        assert "somebody who redrives or discards it: it is dead (aborted), by Abort" in explained
        filters = ("--task", "charge", "--error", "no bank", "--since", "1h")
        tried = await say("bulk", "start", "redrive", *filters, "--dry-run")
        assert (tried.exit_code, tried.output.split()[-2:]) == (0, ["charge", "3"])
        assert (await say("bulk", "start", "redrive", *filters)).exit_code == 2
        assert (await say("bulk", "list")).output.strip() == "no jobs"
        shop.mended = True
        began = await say("bulk", "start", "redrive", *filters, "--rate", "50/s", "--yes")
        assert began.exit_code == 0, began.output
        identity = began.output.strip()
        await ended(client, {"id": identity})
        shown = json.loads((await say("bulk", "show", identity, "--json")).output)
        assert (shown["counts"]["done"], shown["rate"], shown["items"]) == (3, 50, [])
        assert identity in (await say("bulk", "list")).output
        assert (await say("bulk", "abort", identity)).exit_code == 6
        none = await say("bulk", "start", "discard", "--yes")
        assert "cannot be done" in none.output
        (worker,) = json.loads((await say("workers", "list", "--json")).output)
        assert worker["worker"] in (await say("workers", "list")).output
        assert (await say("workers", "drain", worker["worker"])).exit_code == 0
        await until_counted(client, "completed", 3)
        assert "it has completed" in (await say("why", run_ids[0])).output
        assert (await say("runs", "logs", run_ids[0])).output == ""
        assert (await say("why", "nothing")).exit_code == 6


async def begun_before(
    staged: Stage, action: Action, *, redrives: int | None = None, aborted: bool = False
) -> dict[str, Any]:
    """Leave a job as a server does that dies in the middle of its only run."""
    job = Job(id="left", action=action, reason="", rate=None, options={})
    async with staged.resources.store.begin() as connection:
        assert await bulk.create(connection, job, RunFilter(), now_ms=1, by="ada") == 1
        (item,) = await bulk.next_items(connection, job, states=bulk.OPEN, limit=2)
        await bulk.move(connection, item, "sent", now_ms=1, redrives=redrives)
        if aborted:
            await bulk.abort(connection, job.id)
    return {"id": job.id}


async def letters(client: httpx.AsyncClient) -> int:
    queues = {one["queue"]: one for one in (await client.get("/queues")).json()}
    return int(queues["bt.dead.charge"]["ready"])


@pytest.mark.parametrize("aborted", [False, True])
async def test_what_was_sent_before_a_crash_is_not_sent_again(aborted: bool) -> None:
    shop = Shop()
    async with working(shop) as (staged, client):
        await dead(shop, client, 1)
        shop.mended = True
        job = await begun_before(staged, "redrive", redrives=0, aborted=aborted)
        found = await ended(client, job)
        assert found["counts"] == counts(done=1)
        assert found["state"] == ("aborted" if aborted else "done")
        # A run that comes after it: by then, one that was sent again would have been done.
        assert await (await shop.charge.trigger(7)).result(timeout=LONG) == 7
        assert [number for _, number in shop.done] == [7]
        assert await letters(client) == 0


async def test_what_died_again_after_a_crash_stays_among_the_dead() -> None:
    shop = Shop()
    async with working(shop) as (staged, client):
        (run_id,) = await dead(shop, client, 1)
        await client.post(f"/runs/{run_id}/redrive", json={})

        async def again() -> bool:
            row = (await client.get(f"/runs/{run_id}")).json()
            return bool((row["status"], row["redrives"]) == ("failed", 1))

        await until(again)
        shop.mended = True
        job = await begun_before(staged, "redrive", redrives=0)
        assert (await ended(client, job))["counts"] == counts(done=1)
        assert await letters(client) == 1
        assert shop.done == []


async def test_a_discard_that_was_begun_is_finished_or_called_off() -> None:
    shop = Shop()
    async with working(shop) as (staged, client):
        await dead(shop, client, 1)
        job = await begun_before(staged, "discard", aborted=True)
        found = await ended(client, job)
        assert (found["state"], found["counts"]) == ("aborted", counts(waiting=1))
        assert await letters(client) == 1
        async with staged.resources.store.begin() as connection:
            await bulk.forget(connection, before_ms=2**53)
        job = await begun_before(staged, "discard")
        assert (await ended(client, job))["counts"] == counts(done=1)
        assert await letters(client) == 0
        assert (await client.get("/dead")).json()["groups"] == []
