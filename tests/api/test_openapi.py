"""The API does what its OpenAPI document says, whatever it is asked, over real HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from brokertask.server.api.app import OPERATIONS, openapi
from brokertask.server.api.openapi import PREFIX
from brokertask.server.api.operations import Operation
from brokertask.server.api.stream import EVENT_STREAM
from brokertask.server.site import Address, Site
from tests.api.stage import stage

EXAMPLES = 20
"""Of each operation."""
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
NOT_SAID: list[Callable[..., bool | None]] = [positive_data_acceptance]
"""A schema says nothing of what a cron line, a duration or a printable text is."""
ENDING = [each for each in OPERATIONS if each.media != EVENT_STREAM]
"""All but the streams, which go on."""


@contextmanager
def served() -> Iterator[str]:
    """An API on a port of its own, in a thread of its own."""
    told = threading.Event()
    found: list[str] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with stage(rate=1_000_000) as staged:
            site = Site(staged.resources, address=Address("127.0.0.1", 0), rate=1_000_000)
            serving = asyncio.create_task(site.run())
            await site.listening.wait()
            found.append(f"http://127.0.0.1:{site.port}")
            told.set()
            await stop.wait()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert told.wait(30)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def described(url: str) -> BaseSchema:
    schema = schemathesis.openapi.from_dict(openapi())
    schema.config.update(base_url=url)
    return schema


@pytest.mark.parametrize("operation", ENDING, ids=[each.name for each in ENDING])
def test_the_api_is_what_its_document_says(described: BaseSchema, operation: Operation) -> None:
    @settings(max_examples=EXAMPLES, derandomize=True, suppress_health_check=SLOW)
    @given(case=described[PREFIX + operation.path][operation.method].as_strategy())
    def ask(case: schemathesis.Case[Any]) -> None:
        if isinstance(case.query.get("wait"), int | float):
            case.query["wait"] = min(case.query["wait"], 0)  # Nothing is going to happen.
        case.call_and_validate(timeout=30, excluded_checks=NOT_SAID)

    ask()


def test_the_document_is_served_and_complete(url: str) -> None:
    served_document = httpx.get(f"{url}{PREFIX}/openapi.json").json()
    assert served_document == openapi()
    ids = [
        operation["operationId"]
        for path in served_document["paths"].values()
        for operation in path.values()
    ]
    assert sorted(ids) == sorted(operation.name for operation in OPERATIONS)
    assert len(set(ids)) == len(ids)
