"""A short history under kills; `make history` plays a long one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from infra.rabbitmq.node import Node
from tests.crash.history import Options, Play
from tests.flow.deciding import fresh_database

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_killing_servers_leaves_no_gap_in_history(
    rabbitmq_node: Node, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    store = f"sqlite+aiosqlite:///{tmp_path}/server.db"
    if kind == "postgresql":
        store = await fresh_database(request.getfixturevalue("postgres_url"))
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    url = rabbitmq_node.add_vhost(vhost)
    outcome = await Play(url, store, tmp_path, Options(runs=1_000, kills=2, seed=3)).run()
    print(outcome.table())
    assert outcome.wrong == []
    assert outcome.kills == 2
    rabbitmq_node.delete_vhost(vhost)
