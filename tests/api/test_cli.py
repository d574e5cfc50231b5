"""`brokertask runs`, `queues` and `tokens`: what people type, against a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from typer.testing import CliRunner, Result

from brokertask.cli.main import app as command_line
from tests.api.test_runs import eventually, working

pytestmark = pytest.mark.anyio
Say: TypeAlias = Callable[..., Awaitable[Result]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs a command beside this event loop."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("BROKERTASK_TOKEN", raising=False)

    async def run(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, command_line, list(words))

    return run


async def test_runs_are_listed_shown_followed_and_replayed(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working() as (_, client):
        monkeypatch.setenv("BROKERTASK_SERVER_URL", str(client.base_url).removesuffix("/api/v1/"))
        body = {"payload": 21, "tags": ["blue"]}
        run_id = (await client.post("/tasks/double/runs", json=body)).json()["run_id"]
        await eventually(client, f"/runs/{run_id}", "completed")
        listed = await say("runs", "list", "--tag", "blue", "--since", "1h")
        assert listed.exit_code == 0, listed.output
        assert run_id in listed.output
        assert (await say("runs", "list", "--tag", "red")).output.strip() == "no such run"
        shown = await say("runs", "show", run_id)
        assert "completed" in shown.output
        assert "blue" in shown.output
        assert (await say("runs", "result", run_id)).output.strip() == "42"
        assert (await say("runs", "watch", run_id)).exit_code == 0
        replayed = await say("runs", "replay", run_id, "--payload", "5", "--json")
        again = json.loads(replayed.output)["run_id"]
        await eventually(client, f"/runs/{again}", "completed")
        exported = (await say("runs", "export")).output.splitlines()
        assert {json.loads(line)["run_id"] for line in exported} == {run_id, again}
        assert "bt.q.double" in (await say("queues", "list")).output
        missing = await say("runs", "show", "nothing")
        assert missing.exit_code == 6
        assert "There is no such thing" in missing.output


async def test_without_a_server_a_sentence_says_so(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKERTASK_SERVER_URL", "http://127.0.0.1:1")
    refused = await say("runs", "list")
    assert refused.exit_code == 4
    assert "BROKERTASK_SERVER_URL" in refused.output


async def test_tokens_are_made_listed_and_revoked(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BROKERTASK_SERVER_STORE_URL", f"sqlite+aiosqlite:///{tmp_path}/s.db")
    made = await say("tokens", "create", "deploys", "--role", "operator", "--ttl", "1d")
    assert made.exit_code == 0, made.output
    identity, secret = made.output.strip().removeprefix("bt_").split("_", 1)
    listed = (await say("tokens", "list")).output
    assert "deploys" in listed
    assert secret not in listed
    assert (await say("tokens", "revoke", identity)).exit_code == 0
    assert (await say("tokens", "revoke", identity)).exit_code == 6
