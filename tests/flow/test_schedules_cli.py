"""`brokertask schedules`, against a server's API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from brokertask import App, Schedule, Settings
from brokertask.cli.main import app as command_line
from brokertask.server.service import Server
from brokertask.server.site import Address, Site
from tests.flow.serving import serving

pytestmark = pytest.mark.anyio


class Desk:
    """A server with a schedule, and somebody who types commands."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self._environment = {"BROKERTASK_SERVER_URL": url, "COLUMNS": "200"}

    async def say(self, *words: str, code: int = 0) -> Result:
        runner = CliRunner()
        typed = ("schedules", *words)
        result = await asyncio.to_thread(
            lambda: runner.invoke(command_line, typed, env=self._environment)
        )
        assert result.exit_code == code, result.output
        return result

    async def told(self, *words: str) -> Any:
        return json.loads((await self.say(*words, "--json")).stdout)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    app = App("desk", settings=Settings(amqp_url="memory:"))

    @app.task
    async def report(room: str) -> None: ...

    async with serving(app, f"sqlite+aiosqlite:///{tmp_path}/server.db") as server:
        site = Site(server.resources, address=Address("127.0.0.1", 0))
        running = asyncio.create_task(site.run())
        await site.listening.wait()
        nightly = Schedule(cron="0 3 * * *", tz="Europe/Berlin", payload="attic")
        await server.schedules.put("nightly", "report", nightly, sends_tick=False)
        yield Desk(server, f"http://127.0.0.1:{site.port}")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_it_is_listed_and_shown(desk: Desk) -> None:
    listed = (await desk.say("list")).stdout
    assert "0 3 * * * Europe/Berlin" in listed
    assert "never" in listed
    (schedule,) = await desk.told("list")
    assert (schedule["name"], schedule["task"], schedule["paused"]) == ("nightly", "report", False)
    assert "attic" not in json.dumps(schedule)
    assert "no tick yet" in (await desk.say("show", "nightly")).stdout
    due = (await desk.say("next", "nightly", "-n", "3")).stdout.splitlines()
    assert len(due) == 3
    assert all("T01:00" in line or "T02:00" in line for line in due)


async def test_it_is_paused_and_resumed_and_run_now(desk: Desk) -> None:
    assert (await desk.say("pause", "nightly")).stdout == "paused\n"
    assert (await desk.say("pause", "nightly")).stdout == "it was paused before\n"
    assert "paused" in (await desk.say("list")).stdout
    assert (await desk.say("resume", "nightly")).stdout == "resumed\n"
    began = await desk.told("run-now", "nightly")
    shown = await desk.told("show", "nightly")
    assert shown["run_id"] == began["run_id"]


async def test_what_is_not_there_is_an_error(desk: Desk) -> None:
    for words in (("show", "daily"), ("pause", "da/ily"), ("run-now", "daily"), ("next", "daily")):
        assert "no such schedule" in (await desk.say(*words, code=6)).stderr
