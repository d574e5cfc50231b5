"""A short day of chaos; `make chaos` plays a long one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from infra.rabbitmq.node import Node
from tests.crash.chaos import Options, play

pytestmark = pytest.mark.anyio


async def test_killing_workers_and_the_broker_under_load_loses_nothing(
    frail_node: Node, tmp_path: Path
) -> None:
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    options = Options(runs=1_500, worker_kills=3, broker_kills=1, seed=5)
    outcome = await play(frail_node, frail_node.add_vhost(vhost), tmp_path, options, say=print)
    print(outcome.table())
    assert list(outcome.violations()) == []
    assert outcome.triggered - outcome.probes == 1_500
    frail_node.delete_vhost(vhost)
