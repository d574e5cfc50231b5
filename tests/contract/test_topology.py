"""Declaring and comparing: idempotent, complete, and clear about what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from brokertask.errors import TopologyMismatch
from brokertask.topology import Exchange, QueueOptions, TaskQueue
from brokertask.transport.base import Transport
from tests.contract.conftest import NAMES, WORK, limited, ready, send, small

pytestmark = pytest.mark.anyio


async def test_declaring_twice_changes_nothing(transport: Transport) -> None:
    wanted = small(rungs=(100, 200))
    await transport.declare(wanted)
    await send(transport, b"1")
    await transport.declare(wanted)
    assert await ready(transport) == 1
    assert await transport.compare(wanted) == []


async def test_another_argument_is_named_and_the_rest_is_made(transport: Transport) -> None:
    await transport.declare(small(limited("a", 5)))
    with pytest.raises(TopologyMismatch) as caught:
        await transport.declare(small(limited("a", 6), TaskQueue("b")))
    for part in (WORK, "x-delivery-limit", "5", "6"):
        assert part in str(caught.value)
    assert await ready(transport, NAMES.queue("b")) == 0
    await send(transport, b"1")
    assert await ready(transport) == 1


async def test_another_kind_of_exchange_is_named(transport: Transport) -> None:
    await transport.declare(small())
    changed = replace(small(), exchanges=(Exchange(NAMES.events, "fanout"),))
    with pytest.raises(TopologyMismatch) as caught:
        await transport.declare(changed)
    for part in (NAMES.events, "topic", "fanout"):
        assert part in str(caught.value)


async def test_every_mismatch_is_told_at_once(transport: Transport) -> None:
    await transport.declare(small(limited("a", 5), limited("b", 5)))
    with pytest.raises(TopologyMismatch) as caught:
        await transport.declare(small(limited("a", 6), limited("b", 7)))
    for part in (WORK, NAMES.queue("b"), "6", "7"):
        assert part in str(caught.value)


async def test_compare_finds_what_is_missing_and_makes_nothing(transport: Transport) -> None:
    wanted = small()
    found = await transport.compare(wanted)
    names = {one.name for one in wanted.exchanges} | {one.name for one in wanted.queues}
    assert {one.item.name for one in found if one.missing} == names
    assert await transport.depth(WORK) is None


async def test_compare_finds_what_differs_and_leaves_it(transport: Transport) -> None:
    await transport.declare(small(limited("a", 5)))
    await send(transport, b"1")
    wanted = small(limited("a", 6), TaskQueue("b"))
    for _ in range(2):
        found = {one.item.name: one for one in await transport.compare(wanted)}
        assert set(found) == {WORK, NAMES.queue("b"), NAMES.dead_queue("b")}
        assert found[WORK].missing is False
        for part in ("x-delivery-limit", "5", "6"):
            assert part in found[WORK].detail
        assert found[NAMES.queue("b")].missing
    assert await ready(transport) == 1


async def test_bindings_of_earlier_options_are_removed(transport: Transport) -> None:
    await transport.declare(small())
    await send(transport, b"straight")
    await transport.declare(small(TaskQueue("a", QueueOptions(max_length=10))))
    await send(transport, b"bounded")
    assert await ready(transport, NAMES.intake("a")) == 1
    assert await ready(transport) == 1
    await transport.declare(small())
    await send(transport, b"straight again")
    assert await ready(transport, NAMES.intake("a")) == 1
    assert await ready(transport) == 2
