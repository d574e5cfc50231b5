"""Delays, dead letters and events follow from the topology alone."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from brokertask.envelope import Message
from brokertask.errors import Unroutable
from brokertask.topology import Argument, Binding, Queue, Route
from brokertask.transport.base import Delivery, Transport
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    WORK,
    Inbox,
    consume,
    limited,
    own_queue,
    ready,
    send,
    small,
    subscribe,
    until_ready,
)

pytestmark = pytest.mark.anyio

RUN = Message(body=b"\xc0", message_id="r-1", headers={"bt-attempt": 2, "bt-tags": ["x"]})


def broker_headers(delivery: Delivery) -> dict[str, Any]:
    return {k: v for k, v in delivery.message.headers.items() if k not in RUN.headers}


async def lose(transport: Transport, times: int) -> None:
    """Take a message of task a and let go of it, so many times."""
    for lost in range(times):
        inbox = Inbox[Delivery]()
        consumer = await transport.consume(WORK, inbox, prefetch=1)
        assert (await inbox.next()).lost == lost
        await consumer.close()


async def test_a_delay_is_one_hop_and_never_early(transport: Transport) -> None:
    await transport.declare(small(rungs=(100,)))
    work = await consume(transport)
    route, left = NAMES.delay_route("a", 100)
    assert left == 0
    started = time.monotonic()
    await transport.publish(route, RUN, timeout=SECONDS)
    delivery = await work.next()
    # Brokers count in whole milliseconds, so up to one can be missing.
    assert time.monotonic() - started >= 0.099
    own = {k: v for k, v in delivery.message.headers.items() if k in RUN.headers}
    assert replace(delivery.message, headers=own) == RUN
    assert not delivery.redelivered
    assert delivery.lost == 0


async def test_a_delay_says_where_it_waited(transport: Transport) -> None:
    await transport.declare(small(rungs=(100,)))
    work = await consume(transport)
    before_ms = time.time() * 1000
    await transport.publish(NAMES.delay_route("a", 100)[0], RUN, timeout=SECONDS)
    added = broker_headers(await work.next())
    (death,) = added.pop("x-death")
    at = death.pop("time")
    assert isinstance(at, int)
    assert abs(at - before_ms) < 60_000
    assert death == {
        "count": 1,
        "reason": "expired",
        "queue": NAMES.rung(100),
        "exchange": NAMES.delay,
        "routing-keys": ["a", NAMES.rung(100)],
    }
    first = {name: value for name, value in added.items() if name.startswith("x-first-death-")}
    assert first == {
        "x-first-death-reason": "expired",
        "x-first-death-queue": NAMES.rung(100),
        "x-first-death-exchange": NAMES.delay,
    }


async def test_a_short_delay_does_not_wait_for_a_long_one(transport: Transport) -> None:
    await transport.declare(small(rungs=(100, 60_000)))
    work = await consume(transport)
    await transport.publish(
        NAMES.delay_route("a", 60_000)[0], replace(RUN, message_id="long"), timeout=SECONDS
    )
    await transport.publish(
        NAMES.delay_route("a", 100)[0], replace(RUN, message_id="short"), timeout=SECONDS
    )
    assert (await work.next()).message.message_id == "short"
    assert await ready(transport, NAMES.rung(60_000)) == 1
    assert len(work) == 0


async def test_delays_keep_their_order(transport: Transport) -> None:
    await transport.declare(small(rungs=(100,)))
    work = await consume(transport, prefetch=20)
    ids = [f"r-{number}" for number in range(20)]
    for message_id in ids:
        await transport.publish(
            NAMES.delay_route("a", 100)[0], replace(RUN, message_id=message_id), timeout=SECONDS
        )
    assert [one.message.message_id for one in await work.take(20)] == ids


async def test_a_delay_without_target_is_parked(transport: Transport) -> None:
    await transport.declare(small(rungs=(100,)))
    work, parked = await consume(transport), await consume(transport, NAMES.unrouted)
    await transport.publish(NAMES.delay_route("nobody", 100)[0], RUN, timeout=SECONDS)
    await transport.publish(NAMES.delay_route("a", 100)[0], RUN, timeout=SECONDS)
    assert (await work.next()).message.message_id == RUN.message_id
    assert (await parked.next()).message.message_id == RUN.message_id


async def test_a_missing_rung_is_unroutable(transport: Transport) -> None:
    await transport.declare(small(rungs=(100,)))
    with pytest.raises(Unroutable):
        await transport.publish(NAMES.delay_route("a", 200)[0], RUN, timeout=SECONDS)


async def test_a_message_lost_too_often_is_dead_lettered(transport: Transport) -> None:
    await transport.declare(small(limited("a", 2)))
    dead = await consume(transport, NAMES.dead_queue("a"))
    await transport.publish(NAMES.trigger_route("a"), RUN, timeout=SECONDS)
    await lose(transport, 3)
    delivery = await dead.next()
    assert delivery.message.body == RUN.body
    assert delivery.message.message_id == RUN.message_id
    assert delivery.lost == (3 if transport.carries_losses else 0)
    added = broker_headers(delivery)
    (death,) = added["x-death"]
    assert (death["reason"], death["queue"]) == ("delivery_limit", WORK)
    assert (death["exchange"], death["routing-keys"]) == (NAMES.tasks, ["a"])
    assert added["x-first-death-reason"] == "delivery_limit"
    assert await ready(transport) == 0


async def test_a_second_death_is_written_before_the_first(transport: Transport) -> None:
    await transport.declare(small(limited("a", 1), rungs=(100,)))
    dead = await consume(transport, NAMES.dead_queue("a"))
    await transport.publish(NAMES.delay_route("a", 100)[0], RUN, timeout=SECONDS)
    await lose(transport, 2)
    added = broker_headers(await dead.next())
    assert [death["reason"] for death in added["x-death"]] == ["delivery_limit", "expired"]
    assert added["x-first-death-reason"] == "expired"


async def test_a_dead_letter_goes_by_the_key_of_its_queue(transport: Transport) -> None:
    wanted = small(limited("a", 1))
    alias = Binding(NAMES.tasks, WORK, "alias")
    await transport.declare(replace(wanted, bindings=(*wanted.bindings, alias)))
    dead = await consume(transport, NAMES.dead_queue("a"))
    await transport.publish(Route(NAMES.tasks, "alias"), RUN, timeout=SECONDS)
    await lose(transport, 2)
    (death,) = broker_headers(await dead.next())["x-death"]
    assert death["routing-keys"] == ["alias"]


async def test_several_keys_to_one_queue_are_one_copy(transport: Transport) -> None:
    await transport.declare(small())
    reply = NAMES.reply("c1")
    queue, bindings = own_queue(reply, "#", "run.*.a", reply)
    await transport.declare(replace(small(), queues=(*small().queues, queue), bindings=bindings))
    await transport.publish(
        NAMES.event_route("run.completed", "a", reply_to=reply), RUN, timeout=SECONDS
    )
    work = await consume(transport, reply)
    assert (await work.next()).message == RUN
    assert await ready(transport, reply) == 0
    assert len(work) == 0


async def test_further_keys_reach_further_queues(transport: Transport) -> None:
    reply = NAMES.reply("c1")
    queue, bindings = own_queue(reply, reply)
    other, others = own_queue("other", "run.failed.*")
    await transport.declare(replace(small(), queues=(queue, other), bindings=(*bindings, *others)))
    for event, expected in (("run.completed", 0), ("run.failed", 1)):
        await transport.publish(NAMES.event_route(event, "a", reply_to=reply), RUN, timeout=SECONDS)
        assert await ready(transport, "other") == expected
    assert await ready(transport, reply) == 2


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("run.completed.a", "run.completed.a", True),
        ("run.completed.a", "run.completed.b", False),
        ("run.*.a", "run.completed.a", True),
        ("run.*", "run.completed.a", False),
        ("*", "run.completed", False),
        ("run.#", "run.completed.a", True),
        ("run.#", "run", True),
        ("#.a", "run.completed.a", True),
        ("#.a", "a", True),
        ("run.#.a", "run.a", True),
        ("run.#.b.#", "run.x.y.b.z", True),
        ("run.#.b.#", "run.x.y.z", False),
        ("#", "", True),
        ("*", "", False),
        ("run.*", "run.", True),
    ],
)
async def test_topic_patterns(transport: Transport, pattern: str, key: str, matches: bool) -> None:
    queue, bindings = own_queue("own", pattern)
    await transport.declare(replace(small(), queues=(queue,), bindings=bindings))
    await transport.publish(Route(NAMES.events, key), RUN, timeout=SECONDS, mandatory=False)
    assert await ready(transport, "own") == int(matches)


async def test_a_message_goes_to_every_bound_queue(transport: Transport) -> None:
    await transport.declare(small())
    queue, _ = own_queue("own")
    parked = replace(small(), queues=(queue,), bindings=())
    await transport.declare(parked)
    both = tuple(replace(b, queue="own") for b in small().bindings if b.queue == WORK)
    await transport.declare(replace(parked, bindings=both))
    await send(transport, b"1")
    assert await ready(transport, "own") == 1
    await until_ready(transport, 1)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_what_is_held_beyond_its_time_expires_when_it_is_given_back(
    transport: Transport, kind: str
) -> None:
    wanted = small(rungs=(1250,))
    arguments: dict[str, Argument] = {
        "x-queue-type": kind,
        "x-message-ttl": 1000,
        "x-dead-letter-exchange": NAMES.resume,
    }
    queues = (*wanted.queues, Queue("held", arguments))
    bindings = (*wanted.bindings, Binding(NAMES.delay, "held", "held"))
    await transport.declare(replace(wanted, queues=queues, bindings=bindings))
    work = await consume(transport)
    consumer, hold = await subscribe(transport, "held")
    await transport.publish(Route(NAMES.delay, "a", ("held",)), RUN, timeout=SECONDS)
    held = await hold.next()
    later = replace(RUN, message_id="later")
    await transport.publish(NAMES.delay_route("a", 1250)[0], later, timeout=SECONDS)
    assert (await work.next()).message.message_id == "later"
    assert held.live
    await consumer.close()
    back = await work.next()
    assert (back.message.message_id, back.message.body) == (RUN.message_id, RUN.body)
    assert back.lost in ((0, 1) if transport.carries_losses else (0,))
    (death,) = broker_headers(back)["x-death"]
    assert (death["queue"], death["reason"], death["count"]) == ("held", "expired", 1)
    assert (death["exchange"], death["routing-keys"]) == (NAMES.delay, ["a", "held"])
    assert await ready(transport, "held") == 0
    assert await ready(transport) == 0
    assert len(work) == 0
