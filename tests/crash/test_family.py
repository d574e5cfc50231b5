"""Parents that wait for children under kills, a little of it: `python -m tests.crash.family`."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.rabbitmq.node import Node
from tests.crash.family import Options, play

pytestmark = pytest.mark.anyio


@pytest.mark.timeout(240)
async def test_each_parent_goes_on_once_for_each_child(
    rabbitmq_node: Node, amqp_url: str, tmp_path: Path
) -> None:
    options = Options(parents=100, worker_kills=3, server_kills=4)
    outcome = await play(amqp_url, tmp_path, options)
    print(outcome.table())
    assert list(outcome.violations()) == []
