"""`brokertask runs cancel`, `tasks pause` and `tasks resume`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from brokertask.control import Entry, Standing
from brokertask.envelope import Envelope, Message
from brokertask.topology import Names, TaskQueue, topology
from tests.contract.conftest import Inbox
from tests.flow.commandline import Place, place

pytestmark = pytest.mark.anyio

NAMES = Names("bt")


@pytest.fixture(params=["socket", "rabbitmq"])
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    async with place(request, tmp_path) as found:
        yield found


async def test_orders_reach_the_log(here: Place) -> None:
    inbox, standing, kinds = Inbox[Message](), Standing(), list[str]()
    async with here.transport() as transport:
        await transport.declare(topology(NAMES, [TaskQueue("render")]))
        await transport.follow(NAMES.control, inbox)
        await _give(here)
        for message in await inbox.take(4):
            entry = Entry.read(message)
            assert entry is not None
            standing.apply(entry)
            kinds.append(entry.kind)
    assert kinds == ["cancel", "cancel", "pause", "resume"]
    run = Envelope(run_id="r2", task="render", payload=b"\xc0")
    child = Envelope(run_id="r3", task="render", payload=b"\xc0", parent="r1")
    found = standing.cancelled(run)
    assert found is not None
    assert found.reason == "not wanted"
    assert standing.cancelled(child)
    assert standing.paused == set()


async def _give(here: Place) -> None:
    done = await here.brokertask(
        "runs", "cancel", "r1", "r2", "--reason", "not wanted", "--children"
    )
    assert (done.code, done.out) == (0, "workers are told to cancel r1, r2\n")
    done = await here.brokertask("tasks", "pause", "render")
    assert (done.code, done.out) == (0, "workers are told to pause render\n")
    done = await here.brokertask("tasks", "resume", "render", "--json")
    assert json.loads(done.out) == {"task": "render", "said": "resume"}
    done = await here.brokertask("tasks", "pause", "two words")
    assert done.code == 2
    assert "task id" in done.err
