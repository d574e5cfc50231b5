"""Stages: one on the broker all suites share, one on a broker that may be hurt."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from infra.rabbitmq.node import Node
from tests.crash.proxy import Proxy
from tests.crash.stage import Gate, Stage, private_node


@pytest.fixture(scope="session")
def frail_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that tests may kill, block and misconfigure; they leave it running and sound."""
    node = private_node(tmp_path_factory.mktemp("frail"))
    yield node
    node.destroy()


@pytest.fixture
async def stage(rabbitmq_node: Node, amqp_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage for faults that hurt nobody else."""
    async with Stage(rabbitmq_node, amqp_url, tmp_path) as stage:
        yield stage


@pytest.fixture
async def frail(frail_node: Node, tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage on `frail_node`."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    async with Stage(frail_node, frail_node.add_vhost(vhost), tmp_path) as stage:
        yield stage
    frail_node.delete_vhost(vhost)


@pytest.fixture(params=["direct", "aio-pika"])
def each_data_plane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all that connects in this test do so on one data plane, then on the other.

    Every other test of faults runs on that of the environment: BROKERTASK_DATA_PLANE.
    """
    monkeypatch.setenv("BROKERTASK_DATA_PLANE", request.param)


@pytest.fixture
async def proxy(stage: Stage) -> AsyncIterator[Proxy]:
    """A proxy in front of the stage's broker."""
    async with Proxy(stage.url) as proxy:
        yield proxy


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate that is shut."""
    return Gate(tmp_path / "gate")
