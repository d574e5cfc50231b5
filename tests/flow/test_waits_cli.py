"""`brokertask waits`, against a server's API: what people type to decide what a run waits for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner, Result

from brokertask import App, Context, Settings
from brokertask.cli.main import app as command_line
from brokertask.server.service import Server
from brokertask.server.site import Address, Site
from tests.flow.serving import serving
from tests.flow.test_waits import SECONDS, open_tokens, working

pytestmark = pytest.mark.anyio
Say: TypeAlias = Callable[..., Awaitable[Result]]


@pytest.fixture
def app() -> App:
    app = App("waits", settings=Settings(amqp_url="memory:"))

    @app.task
    async def ask(ctx: Context) -> str:
        return repr(await ctx.wait_for(ctx.token("approval", timeout="1h")))

    return app


@pytest.fixture
async def server(app: App, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(app, f"sqlite+aiosqlite:///{tmp_path}/server.db") as server:
        yield server
    await app.client.close()


@pytest.fixture
async def say(server: Server) -> AsyncIterator[Say]:
    """Type a command, in a thread, and get what it printed."""
    site = Site(server.resources, address=Address("127.0.0.1", 0))
    running = asyncio.create_task(site.run())
    await site.listening.wait()
    environment = {"BROKERTASK_SERVER_URL": f"http://127.0.0.1:{site.port}", "COLUMNS": "200"}

    async def type_it(*words: str) -> Result:
        runner = CliRunner()
        return await asyncio.to_thread(lambda: runner.invoke(command_line, words, env=environment))

    yield type_it
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def in_json(say: Say, *words: str) -> Any:
    result = await say(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def test_a_token_is_listed_and_completed(app: App, server: Server, say: Say) -> None:
    async with working(app):
        run = await app.tasks["ask"].trigger()
        await open_tokens(server)
        (token,) = await in_json(say, "waits", "list")
        assert (token["run_id"], token["name"], token["state"]) == (
            run.run_id,
            "approval",
            "waiting",
        )
        assert "approval" in (await say("waits", "list")).stdout
        told = await say("waits", "complete", token["id"], "--value", '{"ok": true}')
        assert told.stdout == "done\n"
        assert await run.result(timeout=SECONDS) == "{'ok': True}"
        (wait,) = await in_json(say, "waits", "show", run.run_id)
        assert (wait["state"], wait["what"]) == ("over", ["token:approval"])
        late = await say("waits", "reject", token["id"])
        assert late.exit_code != 0
        assert await in_json(say, "waits", "list") == []
        assert len(await in_json(say, "waits", "list", "--all")) == 1


async def test_a_token_is_rejected_with_a_reason(app: App, server: Server, say: Say) -> None:
    async with working(app):
        run = await app.tasks["ask"].trigger()
        (token,) = await open_tokens(server)
        extended = await in_json(say, "waits", "extend", token["id"], "2d")
        assert extended["answer"] == "done"
        assert (await say("waits", "reject", token["id"], "--reason", "no")).stdout == "done\n"
        assert await run.result(timeout=SECONDS) == "Rejected(reason='no')"


async def test_without_a_server_the_command_says_where_it_looked() -> None:
    environment = {"BROKERTASK_SERVER_URL": "http://127.0.0.1:9"}
    result = await asyncio.to_thread(
        lambda: CliRunner().invoke(command_line, ["waits", "list"], env=environment)
    )
    assert result.exit_code != 0
    assert "http://127.0.0.1:9" in result.stderr
