"""Frozen selections of dead runs: what they hold, what they do, and what they never lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from brokertask import Settings
from brokertask.clock import VirtualClock
from brokertask.deadletter import DeadLetter, Filter
from brokertask.deadletters import Result, Selection
from brokertask.envelope import Envelope, Message
from brokertask.errors import BrokerUnavailable, InvalidOption
from brokertask.telemetry import Telemetry
from brokertask.topology import Binding, QueueOptions, TaskQueue, Topology
from brokertask.transport.base import Consumer, Delivery, Receive, Transport
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.values import decode, encode
from tests.contract.conftest import SECONDS, small
from tests.flow.graveyard import (
    NAMES,
    NOW_MS,
    TRACE,
    at_work,
    bury_by_broker,
    dead,
    dead_raw,
    failure,
    graveyard,
    in_dead,
    put,
    take,
    trigger,
    until_dead,
)

pytestmark = pytest.mark.anyio

Connect: TypeAlias = Callable[[], Awaitable[Transport]]
SETTINGS = Settings()
WORK = NAMES.queue("charge")
DEAD = NAMES.dead_queue("charge")


@pytest.fixture(params=["memory", "rabbitmq"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """A function that returns one more open transport to the same broker."""
    async with AsyncExitStack() as stack:
        if request.param == "rabbitmq":
            url: str = request.getfixturevalue("amqp_url")
            make: Callable[[], Transport] = lambda: RabbitTransport(url)  # noqa: E731
        else:
            broker = MemoryBroker()
            stack.callback(broker.close)
            make = lambda: MemoryTransport(broker)  # noqa: E731

        async def connect() -> Transport:
            transport = make()
            await transport.open(timeout=SECONDS)
            stack.push_async_callback(transport.close)
            return transport

        yield connect


@pytest.fixture
async def transport(connect: Connect) -> Transport:
    """An open transport to a broker that knows task `charge`."""
    transport = await connect()
    await transport.declare(graveyard("charge"))
    return transport


def selected(
    transport: Transport, filters: Filter | None = None, *tasks: str, **values: Any
) -> AbstractAsyncContextManager[Selection]:
    """Open a selection of `charge`, at `NOW_MS`."""
    values.setdefault("clock", VirtualClock(NOW_MS))
    return Selection.open(transport, SETTINGS, tasks or ("charge",), filters, **values)


async def done(results: AsyncIterator[Result]) -> list[Result]:
    return [result async for result in results]


def statuses(results: Sequence[Result]) -> list[str]:
    return [result.status for result in results]


def ids(letters: Sequence[DeadLetter]) -> list[str]:
    return [letter.run_id for letter in letters]


async def test_looking_sees_everything_and_gives_it_all_back(transport: Transport) -> None:
    await put(transport, *(dead(trigger(f"run-{number}", number)) for number in range(20)))
    for _ in range(3):
        async with selected(transport) as selection:
            assert ids(selection.letters) == [f"run-{number}" for number in range(20)]
            assert [decode(one.payload, one.content_type) for one in selection.letters] == [
                *range(20)
            ]
            (look,) = selection.looks
            assert (look.ready, look.seen, look.elsewhere, look.left) == (20, 20, 0, 0)
            assert await in_dead(transport) == 0
        await until_dead(transport, 20)


async def test_an_empty_and_a_missing_queue(transport: Transport) -> None:
    async with selected(transport, None, "charge", "nobody") as selection:
        assert selection.letters == []
        assert selection.missing == ["nobody"]


async def test_a_letter_tells_its_whole_story(transport: Transport) -> None:
    run = trigger("run-1", {"order": 7}, tags=("tenant:acme",), parent="run-0")
    await put(transport, dead(run, "aborted", failure("ValueError", "no such order", 2)))
    async with selected(transport) as selection:
        (letter,) = selection.letters
    assert (letter.run_id, letter.task, letter.reason) == ("run-1", "charge", "aborted")
    assert (letter.attempts, letter.redrives, letter.died_ms) == (2, 0, NOW_MS)
    assert [error.type for error in letter.errors] == ["GatewayTimeout", "ValueError"]
    assert letter.tags == ("tenant:acme",)
    assert letter.trace_id == TRACE.split("-")[1]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (Filter(run_ids=("b", "z")), ["b"]),
        (Filter(reasons=("aborted",)), ["b"]),
        (Filter(reasons=("aborted", "invalid")), ["c", "b"]),
        (Filter(error="gatewaytimeout"), ["d", "a"]),
        (Filter(error="valueerror: no"), ["c", "b"]),
        (Filter(tags=("red",)), ["b", "a"]),
        (Filter(tags=("red", "blue")), ["b"]),
        (Filter(older_than="1h"), ["c"]),
        (Filter(newer_than=90), ["b", "a"]),
        (Filter(older_than=30, newer_than="1h"), ["d", "b"]),
        (Filter(limit=2), ["b", "a"]),
        (Filter(error="timeout", limit=1), ["a"]),
        (Filter(run_ids=("nobody",)), []),
    ],
)
async def test_a_filter_takes_what_meets_all_of_it(filters: Filter, wanted: list[str]) -> None:
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    await transport.open(timeout=SECONDS)
    await transport.declare(graveyard("charge"))
    no = failure("ValueError", "no such order", 2)
    await put(
        transport,
        dead(trigger("a", tags=("red",))),
        dead(trigger("b", tags=("red", "blue")), "aborted", no, died_ms=NOW_MS - 60_000),
        dead(trigger("c"), "invalid", no, died_ms=NOW_MS - 7_200_000),
        dead(trigger("d"), died_ms=NOW_MS - 600_000),
    )
    async with selected(transport, filters) as selection:
        assert ids(selection.letters) == wanted
    assert await in_dead(transport) == 4
    await transport.close()
    broker.close()


@pytest.mark.parametrize("values", [{"limit": 0}, {"older_than": "soon"}, {"newer_than": -1}])
def test_a_filter_that_means_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        Filter(**values)


async def test_a_limit_counts_over_all_queues(transport: Transport) -> None:
    await transport.declare(graveyard("charge", "refund"))
    await put(transport, dead(trigger("a")), dead(trigger("b")))
    await put(transport, dead(trigger("c")), dead(trigger("d")), task="refund")
    async with selected(transport, Filter(limit=3), "charge", "refund") as selection:
        assert ids(selection.letters) == ["a", "b", "c"]
        assert [look.left for look in selection.looks] == [0, 1]
    await until_dead(transport, 2)
    await until_dead(transport, 2, "refund")
    async with selected(transport, Filter(limit=1), "charge", "refund") as selection:
        assert ids(selection.letters) == ["a"]
    await until_dead(transport, 2)
    await until_dead(transport, 2, "refund")


async def test_what_is_behind_a_limit_is_left_alone(transport: Transport) -> None:
    names = [f"run-{number}" for number in range(9)]
    await put(transport, *(dead(trigger(name)) for name in names))
    async with selected(transport, Filter(limit=3)) as selection:
        assert ids(selection.letters) == names[:3]
        assert await in_dead(transport) == 6
        assert statuses(await done(selection.redrive())) == ["redriven"] * 3
        assert await in_dead(transport) == 6
    left = await take(transport, DEAD, 6)
    assert [message.message_id for message in left] == names[3:]
    assert all("x-delivery-count" not in message.headers for message in left)


async def test_to_look_only_keeps_no_body_and_acts_on_nothing(transport: Transport) -> None:
    await put(transport, dead(trigger("run-1", "a secret")))
    async with selected(transport, bodies=False) as selection:
        (letter,) = selection.letters
        assert letter.payload == b""
        assert [error.traceback for error in letter.errors] == [""]
        assert statuses(await done(selection.redrive())) == ["lapsed"]
        assert statuses(await done(selection.discard())) == ["lapsed"]
    await until_dead(transport, 1)
    assert await at_work(transport) == 0


async def test_a_redriven_run_starts_anew(transport: Transport) -> None:
    run = trigger("run-1", {"order": 7}, tags=("red",), expires_ms=NOW_MS, reply_to="bt.reply.1")
    await put(transport, dead(run))
    async with selected(transport) as selection:
        assert statuses(await done(selection.redrive())) == ["redriven"]
    assert await in_dead(transport) == 0
    (message,) = await take(transport, WORK, 1)
    assert message.message_id == "run-1"
    assert message.body == encode({"order": 7})
    assert message.headers["bt-redrives"] == 1
    assert message.headers["bt-origin"] == TRACE
    for gone in ("bt-attempt", "bt-memory", "bt-reason", "bt-died", "bt-expires", "traceparent"):
        assert gone not in message.headers
    again = Envelope.read(message, task="charge", max_bytes=1_000)
    assert (again.attempt, again.memory.errors, again.tags) == (1, (), ("red",))
    assert again.reply_to == "bt.reply.1"
    assert again.seq > run.seq + 1


async def test_a_run_redriven_twice_remembers_its_first_trace(transport: Transport) -> None:
    await put(transport, dead(trigger("run-1", redrives=1, origin="00-first-trace-01")))
    async with selected(transport) as selection:
        await done(selection.redrive())
    (message,) = await take(transport, WORK, 1)
    assert message.headers["bt-redrives"] == 2
    assert message.headers["bt-origin"] == "00-first-trace-01"


async def test_a_redrive_is_a_trace_of_its_own_linked_to_the_first(transport: Transport) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    await put(transport, dead(trigger("run-1")))
    telemetry = Telemetry(NAMES, tracer_provider=provider)
    async with selected(transport, telemetry=telemetry) as selection:
        await done(selection.redrive())
    (message,) = await take(transport, WORK, 1)
    asked, sent = exporter.get_finished_spans()
    assert (asked.name, sent.name) == ("trigger charge", "send charge")
    assert asked.parent is None
    (link,) = asked.links
    assert f"{link.context.trace_id:032x}" == TRACE.split("-")[1]
    assert asked.attributes is not None
    assert asked.attributes["brokertask.redrives"] == 1
    assert asked.context is not None
    assert f"{asked.context.trace_id:032x}" in str(message.headers["traceparent"])


async def test_garbage_is_shown_and_redriven_once_it_is_mended(transport: Transport) -> None:
    garbage = Message(body=b"\xc1 not msgpack", content_type="application/msgpack", app_id="php")
    await put(transport, dead_raw(garbage), dead(trigger("run-2")))
    async with selected(transport) as selection:
        letter = selection.letters[0]
        assert (letter.reason, letter.attempts) == ("undecodable", 0)
        assert letter.payload == b"\xc1 not msgpack"
        results = await done(selection.redrive())
        assert statuses(results) == ["failed", "redriven"]
        assert "not application/msgpack" in results[0].detail
    await until_dead(transport, 1)
    async with selected(transport) as selection:
        mended = selection.redrive(payload=encode({"order": 7}))
        assert statuses(await done(mended)) == ["redriven"]
    _, message = await take(transport, WORK, 2)
    assert message.message_id == letter.run_id
    assert message.body == encode({"order": 7})
    assert "bt-attempt" not in message.headers
    assert "bt-raw" not in message.headers


async def test_what_was_unreadable_then_is_redriven_if_it_can_be_read_now(
    transport: Transport,
) -> None:
    json = Message(body=b'{"order": 7}', content_type="application/json")
    await put(transport, dead_raw(json), dead_raw(json))
    async with selected(transport) as selection:
        assert statuses(await done(selection.redrive())) == ["redriven", "redriven"]
    first, second = await take(transport, WORK, 2)
    assert first.body == b'{"order": 7}'
    assert first.content_type == "application/json"
    # Equal messages without ids share the derived one: a worker must not take them for one run.
    assert first.message_id == second.message_id
    assert first.headers["bt-derived"]


async def test_foreign_headers_are_shown_and_discarded(transport: Transport) -> None:
    strange = Message(body=b"\x93", headers={"bt-version": "new", "bt-died": -5, "x": {"y": [1]}})
    await put(transport, strange)
    async with selected(transport) as selection:
        (letter,) = selection.letters
        assert letter.envelope is None
        assert (letter.reason, letter.died_ms, letter.payload) == ("undecodable", None, b"\x93")
        assert statuses(await done(selection.redrive())) == ["failed"]
        assert statuses(await done(selection.discard("junk"))) == ["discarded"]
    assert await in_dead(transport) == 0


async def test_what_the_broker_buried_has_its_reason(connect: Connect) -> None:
    transport = await connect()
    limited = TaskQueue("charge", QueueOptions(delivery_limit=2))
    await transport.declare(small(limited))
    await bury_by_broker(transport, trigger("run-1", 7).message(), deliveries=3)
    async with selected(transport) as selection:
        (letter,) = selection.letters
        assert (letter.reason, letter.errors) == ("delivery_limit", ())
        assert "x-delivery-limit" in letter.meaning
        assert letter.died_ms is not None
        assert statuses(await done(selection.redrive())) == ["redriven"]
    (message,) = await take(transport, WORK, 1)
    assert "x-death" not in message.headers
    assert message.body == encode(7)


async def test_discarding_deletes_only_what_is_selected(transport: Transport) -> None:
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(3)))
    async with selected(transport, Filter(run_ids=("run-1",))) as selection:
        (result,) = await done(selection.discard("a duplicate"))
        assert (result.letter.run_id, result.status) == ("run-1", "discarded")
        assert statuses(await done(selection.discard())) == ["lapsed"]
    await until_dead(transport, 2)
    async with selected(transport) as selection:
        assert ids(selection.letters) == ["run-0", "run-2"]


async def test_one_that_fails_stays_and_the_rest_goes_on(transport: Transport) -> None:
    whole = graveyard("charge", "refund")
    await transport.declare(whole)
    direct = Binding(NAMES.tasks, NAMES.queue("refund"), "refund")
    await transport.declare(Topology((), (), (), (direct,)))
    await put(transport, dead(trigger("a")))
    await put(transport, dead(replace(trigger("b"), task="refund")), task="refund")
    await put(transport, dead(trigger("c")))
    async with selected(transport, None, "refund", "charge") as selection:
        results = await done(selection.redrive())
        assert statuses(results) == ["failed", "redriven", "redriven"]
        assert "no queue" in results[0].detail
    await until_dead(transport, 1, "refund")
    assert await in_dead(transport) == 0
    assert await at_work(transport) == 2


async def test_a_full_intake_refuses_the_rest(connect: Connect) -> None:
    transport = await connect()
    await transport.declare(graveyard("charge", max_length=1))
    total = 60
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(total)))
    async with selected(transport) as selection:
        results = statuses(await done(selection.redrive()))
    redriven = results.count("redriven")
    # RabbitMQ lets a quorum queue overshoot its limit a little.
    assert 1 <= redriven < total
    assert results.count("failed") == total - redriven
    await until_dead(transport, total - redriven)


async def test_a_cancelled_redrive_loses_nothing_and_doubles_nothing(transport: Transport) -> None:
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(10)))
    begun = asyncio.Event()
    clock = VirtualClock(NOW_MS)
    selections: list[Selection] = []

    async def redrive() -> None:
        async with selected(transport, clock=clock) as selection:
            selections.append(selection)
            async for _ in selection.redrive(rate=1):
                begun.set()

    redriving = asyncio.create_task(redrive())
    async with asyncio.timeout(SECONDS):
        await begun.wait()
    redriving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await redriving
    assert statuses(selections[0].results) == ["redriven"]
    await until_dead(transport, 9)
    assert await at_work(transport) == 1


class Cancelling:
    """A transport that cancels a task while it publishes for it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.victim: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    async def publish(self, *arguments: Any, **options: Any) -> None:
        if self.victim is not None:
            self.victim.cancel()
            await asyncio.sleep(0)
        await self.transport.publish(*arguments, **options)


async def test_a_cancellation_between_confirm_and_ack_waits_for_the_ack(
    transport: Transport,
) -> None:
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(3)))
    cancelling: Any = Cancelling(transport)

    async def redrive() -> None:
        async with selected(cancelling) as selection:
            cancelling.victim = redriving
            await done(selection.redrive())

    redriving = asyncio.create_task(redrive())
    with pytest.raises(asyncio.CancelledError):
        await redriving
    await until_dead(transport, 2)
    assert await at_work(transport) == 1


async def test_a_rate_is_kept(transport: Transport) -> None:
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(4)))
    clock = VirtualClock(NOW_MS)
    at: list[int] = []
    async with selected(transport, clock=clock) as selection:
        results = selection.redrive(rate=2)
        for number in range(4):
            following = asyncio.ensure_future(anext(results))
            if number:
                async with asyncio.timeout(SECONDS):
                    while clock.next_ms() is None:  # noqa: ASYNC110 - a clock sets no event
                        await asyncio.sleep(0)
                clock.advance_to(clock.next_ms() or 0)
            await following
            at.append(clock.now_ms() - NOW_MS)
    assert at == [0, 500, 1_000, 1_500]


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
async def test_a_rate_that_means_nothing_is_refused(rate: float) -> None:
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    await transport.open(timeout=SECONDS)
    async with selected(transport) as selection:
        with pytest.raises(InvalidOption, match="rate"):
            await done(selection.redrive(rate=rate))
    await transport.close()
    broker.close()


async def test_another_payload_is_for_one_run(transport: Transport) -> None:
    await put(transport, dead(trigger("a")), dead(trigger("b")))
    async with selected(transport) as selection:
        with pytest.raises(InvalidOption, match="2 are selected"):
            await done(selection.redrive(payload=encode(1)))
    await until_dead(transport, 2)


async def test_a_second_reader_is_told_of_the_first(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(graveyard("charge"))
    await put(one, *(dead(trigger(f"run-{number}")) for number in range(5)))
    async with selected(one) as first:
        assert len(first.letters) == 5
        async with selected(other) as second:
            assert second.letters == []
            (look,) = second.looks
            assert look.readers == 1
        assert statuses(await done(first.redrive())) == ["redriven"] * 5
    assert await in_dead(one) == 0


async def test_two_readers_at_once_share_and_lose_nothing(connect: Connect) -> None:
    one, other = await connect(), await connect()
    await one.declare(graveyard("charge"))
    names = [f"run-{number:02}" for number in range(40)]
    await put(one, *(dead(trigger(name)) for name in names))
    both = asyncio.Barrier(2)

    async def look(transport: Transport) -> tuple[list[str], int, int]:
        async with selected(transport) as selection:
            async with asyncio.timeout(SECONDS):
                await both.wait()
            (seen,) = selection.looks
            return ids(selection.letters), seen.elsewhere, seen.ready

    results = await asyncio.gather(look(one), look(other))
    found = [name for letters, _, _ in results for name in letters]
    assert sorted(found) == names
    for letters, elsewhere, ready in results:
        assert len(letters) + elsewhere == ready
    await until_dead(one, 40)


class Dropping(MemoryTransport):
    """A transport that loses its connection in the middle of the deliveries, once."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self._drop = broker.drop_connections
        self._left = 3

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        def counted(delivery: Delivery) -> None:
            receive(delivery)
            self._left -= 1
            if self._left == 0:
                self._drop()

        return await super().consume(queue, counted, prefetch=prefetch, limited=limited)


async def test_a_connection_lost_while_looking_is_looked_through_again() -> None:
    broker = MemoryBroker()
    transport = Dropping(broker)
    await transport.open(timeout=SECONDS)
    await transport.declare(graveyard("charge"))
    await put(transport, *(dead(trigger(f"run-{number}")) for number in range(5)))
    async with selected(transport) as selection:
        assert ids(selection.letters) == [f"run-{number}" for number in range(5)]
        assert statuses(await done(selection.redrive())) == ["redriven"] * 5
    assert await in_dead(transport) == 0
    await transport.close()
    broker.close()


async def test_what_is_no_longer_held_is_not_redriven() -> None:
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    await transport.open(timeout=SECONDS)
    await transport.declare(graveyard("charge"))
    await put(transport, dead(trigger("run-1")), dead(trigger("run-2")))
    async with selected(transport) as selection:
        broker.drop_connections()
        results = await done(selection.redrive())
        assert statuses(results) == ["lapsed", "lapsed"]
        assert "consumer timeout" in results[0].detail
    assert await in_dead(transport) == 2
    assert await at_work(transport) == 0
    await transport.close()
    broker.close()


async def test_a_selection_holds_so_much_and_says_what_is_left(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokertask.letterbox.MAX_HELD_BYTES", 3_000)
    await put(transport, *(dead(trigger(f"run-{number}", "x" * 1_000)) for number in range(9)))
    left = 9
    while left:
        async with selected(transport) as selection:
            assert 1 <= len(selection.letters) <= 3
            (look,) = selection.looks
            assert look.left == left - len(selection.letters)
            await done(selection.redrive())
            left = look.left
        await until_dead(transport, left)
    assert await at_work(transport) == 9


class Stuck(MemoryTransport):
    """A transport whose queue never delivers: it reads another, which is empty."""

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        return await super().consume(WORK, receive, prefetch=prefetch, limited=limited)


async def test_a_queue_that_does_not_deliver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokertask.letterbox.QUIET", 0.01)
    broker = MemoryBroker()
    transport = Stuck(broker)
    await transport.open(timeout=SECONDS)
    await transport.declare(graveyard("charge"))
    await put(transport, dead(trigger("run-1")))
    with pytest.raises(BrokerUnavailable, match=DEAD):
        async with selected(transport):
            pass
    await transport.close()
    broker.close()
