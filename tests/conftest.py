"""Fixtures for every suite: the event loop, and a RabbitMQ of this run's own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import hypothesis
import pytest

from infra.rabbitmq.installation import Installation, NodeError
from infra.rabbitmq.node import Node
from tests.postgres import cluster

NODE_VARIABLE = "BROKERTASK_TEST_NODE"

# How long an example takes tells of the machine.
hypothesis.settings.register_profile("brokertask", deadline=None)
hypothesis.settings.load_profile("brokertask")


def pytest_sessionstart() -> None:
    """Have the release that BROKERTASK_TEST_RELEASE names: making it takes more than a test may."""
    try:
        if not (release := Installation.chosen()).own:
            release.ensure()
    except NodeError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def rabbitmq_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A private node for this run; or that in the folder BROKERTASK_TEST_NODE, left running."""
    kept = os.environ.get(NODE_VARIABLE)
    try:
        folder = kept or tmp_path_factory.mktemp("rabbitmq")
        node = Node.create(folder, installation=Installation.chosen()).start()
    except (Exception, SystemExit) as error:
        pytest.fail(f"these tests need RabbitMQ, and it does not start: {error}", pytrace=False)
    yield node
    if not kept:
        node.destroy()


@pytest.fixture
def amqp_url(rabbitmq_node: Node) -> Iterator[str]:
    """The URL of a fresh virtual host, deleted after the test."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    yield rabbitmq_node.add_vhost(vhost)
    rabbitmq_node.delete_vhost(vhost)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a database in a private PostgreSQL of this run."""
    with cluster() as url:
        yield url
