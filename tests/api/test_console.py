"""What a console asks for: the inside of a run, its tree, workers, dead runs and figures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokertask import Abort, App, Context, Settings
from tests.api.stage import stage
from tests.api.test_runs import LONG, eventually
from tests.flow.deciding import until

pytestmark = pytest.mark.anyio


def shop() -> App:
    app = App("shop", settings=Settings(amqp_url="memory:"))

    async def price(number: int) -> dict[str, Any]:
        return {"total": number, "api_key": "hidden-7"}

    @app.task()
    async def order(number: int, ctx: Context) -> int:
        for step in range(3):
            await ctx.step(f"price {step}", price, number)
        ctx.log.warning("order %d priced", number)
        await refuse.trigger(number)
        return number

    @app.task()
    async def refuse(number: int) -> None:
        raise Abort(f"no order {number}")

    return app


async def test_a_console_finds_what_a_run_did_and_what_died_below_it() -> None:
    app = shop()
    async with stage(app) as staged, app, staged.client() as client:
        worker = app.worker()
        await worker.start()

        async def heard() -> bool:
            return bool((await client.get("/workers")).json())

        async with asyncio.timeout(LONG):
            await until(heard)
            run_id = (await client.post("/tasks/order/runs", json={"payload": 7})).json()["run_id"]
            await eventually(client, f"/runs/{run_id}", "completed")

            async def told() -> bool:
                steps = (await client.get(f"/runs/{run_id}/steps")).json()["items"]
                lines = (await client.get(f"/runs/{run_id}/logs")).json()["items"]
                dead = (await client.get("/dead")).json()["groups"]
                return bool(len(steps) == 3 and lines and dead)

            await until(told)
        first = (await client.get(f"/runs/{run_id}/steps", params={"limit": 2})).json()
        assert [step["name"] for step in first["items"]] == ["price 0", "price 1"]
        rest = {"limit": 2, "cursor": first["next"]}
        last = (await client.get(f"/runs/{run_id}/steps", params=rest)).json()
        assert ([step["name"] for step in last["items"]], last["next"]) == (["price 2"], None)
        results = (await client.get(f"/runs/{run_id}/steps/results")).json()["items"]
        assert results[0]["result"] == {"total": 7, "api_key": "[redacted]"}
        (line,) = (await client.get(f"/runs/{run_id}/logs")).json()["items"]
        assert (line["text"], line["level"]) == ("order 7 priced", "WARNING")
        (group,) = (await client.get("/dead")).json()["groups"]
        assert (group["task"], group["count"], group["again"]) == ("refuse", 1, 0)
        assert group["error_message"] == "no order 7"
        tree = (await client.get(f"/runs/{group['sample']}/tree")).json()
        assert [(one["run_id"], one["parent"]) for one in tree["runs"]] == [
            (run_id, None),
            (group["sample"], run_id),
        ]
        overview = (await client.get("/overview")).json()
        assert (overview["workers"], overview["dead"]["count"]) == (1, 1)
        ended = {one["task"]: one["by_status"] for one in (await client.get("/figures")).json()}
        assert ended == {"order": {"completed": 1}, "refuse": {"failed": 1}}
        assert (await client.get("/tasks/none/figures")).json()["ended"] == 0
        assert (await client.get("/runs/none/tree")).status_code == 404
        await worker.stop()


async def test_a_drained_worker_takes_no_more_work_and_another_one_does() -> None:
    app = App("shop", settings=Settings(amqp_url="memory:"))
    begun, release, by = asyncio.Event(), asyncio.Event(), list[str]()

    @app.task()
    async def work(number: int, ctx: Context) -> int:
        by.append(ctx.worker)
        if number == 0:
            begun.set()
            await release.wait()
        return number

    async with stage(app) as staged, app, staged.client() as client:
        old = app.worker()
        await old.start()

        async def state(name: str) -> bool:
            rows = (await client.get("/workers")).json()
            return any((row["worker"], row["state"]) == (old.name, name) for row in rows)

        async with asyncio.timeout(LONG):
            await until(lambda: state("working"))
            first = await work.trigger(0)
            await begun.wait()
            said = await client.post(f"/workers/{old.name}/drain", json={"reason": "new kernel"})
            assert (said.status_code, said.json()["state"]) == (202, "working")
            await until(lambda: state("draining"))
            # Resumed or not: a drained worker does not begin again.
            await client.post("/tasks/work/resume", json={})
            new = app.worker()
            await new.start()
            runs = [await work.trigger(number) for number in range(1, 6)]
            assert [await run.result(timeout=LONG) for run in runs] == [1, 2, 3, 4, 5]
            release.set()
            assert await first.result(timeout=LONG) == 0
        assert by == [old.name, *[new.name] * 5]
        assert (await client.post("/workers/none/drain", json={})).status_code == 404
        await old.stop()
        await until(lambda: state("stopped"))
        assert (await client.post(f"/workers/{old.name}/drain", json={})).status_code == 409
        await new.stop()
