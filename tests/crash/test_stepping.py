"""Runs of five steps under faults, a little of them: `python -m tests.crash.stepping` is more."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.rabbitmq.node import Node
from tests.crash.stepping import Options, play

pytestmark = pytest.mark.anyio


@pytest.mark.timeout(240)
async def test_safe_steps_are_not_repeated_by_faults(frail_node: Node, tmp_path: Path) -> None:
    options = Options(runs=150, worker_kills=6, broker_kills=1)
    url = frail_node.add_vhost("stepping")
    try:
        outcome = await play(frail_node, url, tmp_path, options)
    finally:
        frail_node.delete_vhost("stepping")
    print(outcome.table())
    assert list(outcome.violations()) == []
