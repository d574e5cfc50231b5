"""A run over HTTP: triggered, followed, its token completed, its result read; and redriven."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from brokertask import Abort, App, Context, Retry, Settings
from brokertask.server.site import Address, Site
from tests.api.stage import Stage, stage

pytestmark = pytest.mark.anyio
LONG = 60.0


def shop() -> App:
    app = App("shop", settings=Settings(amqp_url="memory:"))
    broken = [True]

    @app.task()
    async def double(number: int) -> int:
        return 2 * number

    @app.task()
    async def approve(amount: int, ctx: Context) -> Any:
        return await ctx.wait_for(ctx.token("approval"))

    @app.task()
    async def sign_up(name: str) -> dict[str, str]:
        return {"name": name, "password": "hush"}

    @app.task()
    async def endless() -> None:
        await asyncio.Event().wait()

    @app.task(retry=Retry(max_attempts=2, min_delay=0.01))
    async def flaky(order: dict[str, Any], ctx: Context) -> int:
        if ctx.attempt == 1:
            raise ValueError("not yet")
        return 1

    @app.task()
    async def mended(number: int) -> int:
        if broken:
            broken.clear()
            raise Abort("not today")
        return number

    return app


@asynccontextmanager
async def working() -> AsyncIterator[tuple[Stage, httpx.AsyncClient]]:
    """An API over real HTTP, and a worker."""
    app = shop()
    async with stage(app) as staged, app:
        worker = app.worker()
        await worker.start()
        assert staged.server.site is not None
        base = f"http://127.0.0.1:{staged.server.site.port}/api/v1"
        try:
            async with httpx.AsyncClient(base_url=base, timeout=LONG) as client:
                yield staged, client
        finally:
            await worker.stop()


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


async def test_a_run_is_triggered_and_its_result_is_read() -> None:
    async with working() as (_, client):
        asked = await client.post("/tasks/double/runs", json={"payload": 21, "tags": ["a"]})
        assert asked.status_code == 201
        run_id = asked.json()["run_id"]
        answer = await client.get(f"/runs/{run_id}/result", params={"wait": 60})
        ended = answer.json()
        assert (ended["status"], ended["result"], ended["task"]) == ("completed", 42, "double")


async def test_a_result_is_shown_without_secrets() -> None:
    async with working() as (_, client):
        asked = await client.post("/tasks/sign_up/runs", json={"payload": "Ada"})
        path = f"/runs/{asked.json()['run_id']}/result"
        ended = (await client.get(path, params={"wait": 60})).json()
        assert ended["result"] == {"name": "Ada", "password": "[redacted]"}


async def test_a_run_is_followed_to_its_end_and_goes_on_with_its_token() -> None:
    async with working() as (_, client):
        asked = await client.post("/tasks/approve/runs", json={"payload": 1, "delay": "200ms"})
        run_id = asked.json()["run_id"]
        heard = []
        async with client.stream("GET", f"/runs/{run_id}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            async for name, event in events(response):
                heard.append(name)
                assert event["run_id"] == run_id
                assert "result" not in event
                if name == "waiting":
                    # The worker says so before a server has taken it in.
                    while not (tokens := (await client.get("/waits/tokens")).json()["items"]):
                        pass
                    (token,) = [one["id"] for one in tokens if one["run_id"] == run_id]
                    body = {"value": {"by": "Ada"}}
                    done = await client.post(f"/waits/tokens/{token}/complete", json=body)
                    assert done.json()["answer"] == "done"
        told = ("waiting", "completed")
        assert [name for name in heard if name in told] == list(told)
        ended = (await client.get(f"/runs/{run_id}/result", params={"wait": 60})).json()
        assert ended["result"] == {"by": "Ada"}
        async with client.stream("GET", f"/runs/{run_id}/events") as response:
            assert [name async for name, _ in events(response)] == ["completed"]


async def test_a_dead_run_is_redriven_once() -> None:
    async with working() as (_, client):
        asked = await client.post("/tasks/mended/runs", json={"payload": 5})
        run_id = asked.json()["run_id"]
        ended = (await client.get(f"/runs/{run_id}/result", params={"wait": 60})).json()
        assert (ended["status"], ended["reason"]) == ("failed", "aborted")
        assert (await client.post(f"/runs/{run_id}/redrive", json={})).status_code == 200
        run = await eventually(client, f"/runs/{run_id}", "completed")
        assert (run["redrives"], run["error_type"]) == (1, None)
        ended = (await client.get(f"/runs/{run_id}/result")).json()
        assert (ended["status"], ended["result"]) == ("completed", 5)
        assert (await client.post(f"/runs/{run_id}/redrive", json={})).status_code == 409


async def eventually(client: httpx.AsyncClient, path: str, status: str) -> dict[str, Any]:
    """Return the run at a path once the history has it in a status."""
    async with asyncio.timeout(LONG):
        while True:
            answer = await client.get(path)
            if answer.status_code == 200 and answer.json()["status"] == status:
                found: dict[str, Any] = answer.json()
                return found
            await asyncio.sleep(0.01)


async def told(client: httpx.AsyncClient, count: int) -> None:
    """Return once so many tasks are known with what they take."""
    async with asyncio.timeout(LONG):
        while True:
            tasks = [task["task"] for task in (await client.get("/tasks")).json()]
            details = [(await client.get(f"/tasks/{task}")).json() for task in tasks]
            if sum("result_schema" in each and bool(each["result_schema"]) for each in details) >= (
                count - 1  # That of `Any` is empty.
            ):
                return
            await asyncio.sleep(0.01)


async def test_the_history_has_each_run_with_its_attempts_and_payload() -> None:
    async with working() as (_, client):
        secret = {"number": 1, "password": "swordfish"}
        body = {"payload": secret, "tags": ["a", "b"]}
        run_id = (await client.post("/tasks/flaky/runs", json=body)).json()["run_id"]
        run = await eventually(client, f"/runs/{run_id}", "completed")
        assert (run["task"], run["attempt"], run["tags"]) == ("flaky", 2, ["a", "b"])
        assert run["payload_state"] == "redacted"
        assert "payload" not in run
        first, second = (await client.get(f"/runs/{run_id}/attempts")).json()
        assert (first["outcome"], first["error_message"]) == ("retrying", "not yet")
        assert second["outcome"] == "completed"
        shown = (await client.get(f"/runs/{run_id}/payload")).json()
        assert shown["payload"] == {"number": 1, "password": "[redacted]"}
        refused = await client.post(f"/runs/{run_id}/replay", json={})
        assert refused.status_code == 409
        again = {"replace": True, "payload": {"number": 2}}
        replayed = (await client.post(f"/runs/{run_id}/replay", json=again)).json()
        other = await eventually(client, f"/runs/{replayed['run_id']}", "completed")
        assert other["tags"] == ["a", "b", f"replay:{run_id}"]


async def test_lists_are_filtered_counted_and_paged() -> None:
    async with working() as (_, client):
        ids = [
            (
                await client.post("/tasks/double/runs", json={"payload": n, "tags": [f"n{n % 2}"]})
            ).json()["run_id"]
            for n in range(6)
        ]
        dead = (await client.post("/tasks/mended/runs", json={"payload": 1})).json()["run_id"]
        await eventually(client, f"/runs/{dead}", "failed")
        for run_id in ids:
            await eventually(client, f"/runs/{run_id}", "completed")
        query: dict[str, Any] = {"status": "completed", "tag": "n1", "limit": 2}
        first = (await client.get("/runs", params=query)).json()
        rest = (await client.get("/runs", params={**query, "cursor": first["next"]})).json()
        found = [run["run_id"] for run in [*first["items"], *rest["items"]]]
        assert found == [ids[5], ids[3], ids[1]]
        assert rest["next"] is None
        counts = (await client.get("/counts", params={"tag": "n1"})).json()
        assert counts == {"total": 3, "by_status": {"completed": 3}, "capped": False}
        await told(client, 5)
        failed = (await client.get("/runs", params={"error": "NOT TODAY"})).json()["items"]
        assert [run["run_id"] for run in failed] == [dead]
        assert (await client.get("/runs", params={"error": "%"})).json()["items"] == []
        assert (await client.get("/runs", params={"status": "done"})).status_code == 422
        tasks = [each["task"] for each in (await client.get("/tasks")).json()]
        assert tasks == ["approve", "double", "endless", "flaky", "mended", "sign_up"]
        queues = {each["queue"]: each for each in (await client.get("/queues")).json()}
        assert queues["bt.dead.mended"]["ready"] == 1
        assert queues["bt.q.double"]["consumers"] >= 1


async def test_running_waiting_and_delayed_runs_are_cancelled() -> None:
    async with working() as (_, client):
        for task, body in (
            ("endless", {}),
            ("approve", {"payload": 1}),
            ("double", {"payload": 1, "delay": 1.0}),
        ):
            run_id = (await client.post(f"/tasks/{task}/runs", json=body)).json()["run_id"]
            if task == "approve":
                await eventually(client, f"/runs/{run_id}", "waiting")
            said = await client.post(f"/runs/{run_id}/cancel", json={"reason": "no more"})
            assert said.status_code == 202
            await eventually(client, f"/runs/{run_id}", "cancelled")
            again = await client.post(f"/runs/{run_id}/cancel", json={})
            assert again.status_code == 409


async def test_a_task_is_paused_and_resumed() -> None:
    async with working() as (_, client):
        assert (await client.post("/tasks/double/pause", json={})).status_code == 202
        # A run of another task that comes after it: by then its worker has read the pause.
        other = (await client.post("/tasks/mended/runs", json={"payload": 1})).json()["run_id"]
        await eventually(client, f"/runs/{other}", "failed")
        run_id = (await client.post("/tasks/double/runs", json={"payload": 2})).json()["run_id"]
        waited = await client.get(f"/runs/{run_id}/result", params={"wait": 0.3})
        assert waited.status_code == 404
        assert (await client.get("/tasks/double")).json()["paused"]
        await client.post("/tasks/double/resume", json={})
        await eventually(client, f"/runs/{run_id}", "completed")


async def test_a_payload_is_checked_by_what_workers_say_the_task_takes() -> None:
    async with working() as (_, client):
        await told(client, 5)
        described = (await client.get("/tasks/double")).json()
        assert described["payload_schema"] == {"type": "integer"}
        assert described["result_schema"] == {"type": "integer"}
        refused = await client.post("/tasks/double/runs", json={"payload": "secret-7"})
        assert refused.status_code == 422
        assert refused.json()["invalid"][0]["where"] == "body.payload"
        assert "secret-7" not in refused.text


async def test_a_task_that_nobody_has_is_not_found() -> None:
    async with working() as (_, client):
        refused = await client.post("/tasks/nobody/runs", json={})
        assert (refused.status_code, refused.json()["kind"]) == (404, "not_found")
        unknown = await client.get("/runs/nothing/result")
        assert unknown.status_code == 404


async def test_a_key_makes_one_run_of_a_hundred_triggers() -> None:
    async with working() as (_, client):
        body = {"payload": 3, "idempotency_key": "k"}
        asked = await asyncio.gather(
            *(client.post("/tasks/double/runs", json=body) for _ in range(20))
        )
        assert len({each.json()["run_id"] for each in asked}) == 1
        assert sum(each.json()["own"] for each in asked) == 1
        other = await client.post("/tasks/double/runs", json={**body, "payload": 4})
        assert other.status_code == 409


async def test_a_stop_ends_streams() -> None:
    app = shop()
    async with stage(app) as staged:
        site = Site(staged.resources, address=Address("127.0.0.1", 0))
        serving = asyncio.create_task(site.run())
        await site.listening.wait()
        async with (
            httpx.AsyncClient(timeout=LONG) as client,
            client.stream("GET", f"http://127.0.0.1:{site.port}/api/v1/events") as response,
        ):
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith(":")
            serving.cancel()
            assert [line async for line in lines if line] == []
        await asyncio.gather(serving, return_exceptions=True)
