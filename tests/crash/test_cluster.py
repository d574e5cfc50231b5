"""Three nodes, and the one dies that leads what a worker holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from infra.rabbitmq.node import Node, cluster
from tests.crash.proxy import Proxy
from tests.crash.stage import Gate, Stage, eventually, kill

pytestmark = pytest.mark.anyio


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    nodes = cluster(tmp_path / "cluster")
    yield nodes
    for node in reversed(nodes):
        node.destroy()


@pytest.mark.timeout(180)
async def test_a_run_goes_on_when_the_leader_of_its_checkpoints_dies(
    nodes: list[Node], tmp_path: Path, gate: Gate
) -> None:
    leader, other, third = nodes
    async with Stage(third, third.url(), tmp_path) as stage, Proxy(leader.url()) as proxy:
        worker = await stage.worker(url=proxy.url)
        run = await stage.trigger("stepping_held", str(gate))
        await stage.until_told(run.run_id, "began:second")
        assert list(inflight_queues(third).values()) == [leader.name]

        leader.kill()
        proxy.lead_to(other.url())
        await worker.said("consumer of bt.q.stepping_held resumed", timeout=60)
        gate.open()
        await run.result(timeout=60)
        for step in ("first", "second"):
            assert len(stage.journal.of(run.run_id, f"did:{step}")) == 1

        # The queue has another leader now: what is checkpointed there survives its worker.
        shut = Gate(tmp_path / "another gate")
        run = await stage.trigger("stepping_held", str(shut))
        (began,) = await stage.until_told(run.run_id, "began:second")
        kill(began.pid)
        await stage.until_told(run.run_id, "began:second", times=2)
        shut.open()
        await run.result(timeout=60)
        assert len(stage.journal.of(run.run_id, "did:first")) == 1
        assert await worker.stop() == 0
        stage.workers.clear()
        # That of the process which was killed goes an hour later.
        await eventually(
            lambda: all(f"-{began.pid}-" in name for name in inflight_queues(third)),
            "end of the queue of the process that stopped",
        )


def inflight_queues(node: Node) -> dict[str, str]:
    """Return the names of the inflight queues, and who leads them."""
    queues = node.api("GET", f"/api/queues/{quote('/', safe='')}?columns=name,leader")
    return {q["name"]: q["leader"] for q in queues if q["name"].startswith("bt.inflight.")}
