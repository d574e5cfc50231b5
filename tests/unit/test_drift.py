"""Rules for topologies, and what a comparison with a broker says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from brokertask.drift import Plan, lacking, observe, plan
from brokertask.lint import Finding, Limits, lint
from brokertask.topology import (
    Argument,
    Binding,
    Exchange,
    Names,
    Queue,
    QueueOptions,
    TaskQueue,
    Topology,
    topology,
)
from brokertask.transport.base import Difference
from brokertask.transport.memory import MemoryBroker, MemoryTransport

NAMES = Names("bt")
PLAIN = Limits(task="charge", longest_delay=60, bounded=False)
WHOLE = topology(NAMES, [TaskQueue("charge"), TaskQueue("refund", QueueOptions(max_length=9))])


def changed(queue: str, **arguments: Argument | None) -> Topology:
    """Return the whole with other arguments of one queue; None leaves one out."""
    queues = []
    for one in WHOLE.queues:
        if one.name == queue:
            merged = {**one.arguments, **_dashed(arguments)}
            one = Queue(queue, {key: value for key, value in merged.items() if value is not None})
        queues.append(one)
    return replace(WHOLE, queues=tuple(queues))


def _dashed(arguments: dict[str, Argument | None]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def found(checked: Topology, *tasks: Limits) -> list[Finding]:
    return lint(checked, tasks or [PLAIN], NAMES)


def test_what_brokertask_makes_keeps_its_own_rules() -> None:
    assert found(WHOLE) == []


@pytest.mark.parametrize(
    ("queue", "arguments", "what", "fix"),
    [
        (
            "bt.q.charge",
            {"x_dead_letter_exchange": "bt.daed"},
            "x-dead-letter-exchange 'bt.daed' is not declared",
            "declare exchange 'bt.daed'",
        ),
        (
            "bt.q.charge",
            {"x_dead_letter_exchange": None, "x_dead_letter_strategy": None},
            "a message is dropped after 50 lost deliveries",
            "set the dead-letter exchange",
        ),
        ("bt.q.charge", {"x_delivery_limit": None}, "no x-delivery-limit", "write the number"),
        (
            "bt.q.charge",
            {"x_delivery_limit": -1},
            "x-delivery-limit -1 buries at the first redelivery",
            "1000000000",
        ),
        (
            "bt.q.charge",
            {"x_overflow": None},
            "at-least-once without x-overflow reject-publish",
            "set x-overflow to reject-publish",
        ),
        (
            "bt.delay.100",
            {"x_overflow": "drop-head"},
            "at-least-once without x-overflow reject-publish",
            "set x-overflow to reject-publish",
        ),
        (
            "bt.delay.100",
            {"x_dead_letter_strategy": None},
            "it dead-letters at most once",
            "at-least-once",
        ),
        (
            "bt.delay.100",
            {"x_queue_type": "classic"},
            "only quorum queues dead-letter at least once",
            "quorum",
        ),
        (
            "bt.q.charge",
            {"x_max_length": 5},
            "x-max-length on a queue that delays deliver to",
            "max_length",
        ),
        (
            "bt.q.charge",
            {"x_max_length_bytes": 5},
            "x-max-length-bytes on a queue that delays deliver to",
            "max_length",
        ),
        ("bt.delay.100", {"x_expires": 60_000}, "x-expires deletes it", "leave x-expires out"),
        (
            "bt.q.charge",
            {"x_mesage_ttl": 5},
            "'x-mesage-ttl' is no argument of a queue",
            "did you mean 'x-message-ttl'?",
        ),
        ("bt.q.charge", {"foo": 5}, "'foo' is no argument of a queue", "there are: x-queue-type"),
        (
            "bt.q.charge",
            {"x_queue_type": "quorom"},
            "x-queue-type is 'quorom'",
            "quorum or classic or stream",
        ),
        ("bt.in.refund", {"x_max_length": "9"}, "x-max-length is '9'", "a whole number"),
        ("bt.in.refund", {"x_max_length": True}, "x-max-length is True", "a whole number"),
        ("bt.in.refund", {"x_max_length": -9}, "x-max-length is -9", "a whole number"),
        (
            "bt.q.charge",
            {"x_dead_letter_routing_key": 5},
            "x-dead-letter-routing-key is 5",
            "a text",
        ),
        (
            "bt.q.charge",
            {"x_single_active_consumer": "yes"},
            "x-single-active-consumer is 'yes'",
            "true or false",
        ),
    ],
)
def test_a_broken_rule_is_an_error_with_a_fix(
    queue: str, arguments: dict[str, Argument | None], what: str, fix: str
) -> None:
    problems = [one for one in found(changed(queue, **arguments)) if what in one.what]
    (problem,) = problems
    assert (problem.level, problem.where) == ("error", queue)
    assert fix in problem.fix


def test_an_intake_may_be_limited_and_a_rung_needs_no_delivery_limit() -> None:
    assert found(changed("bt.in.refund", x_max_length=1)) == []
    assert found(changed("bt.delay.100", x_message_ttl=150)) == []


def test_bindings_and_alternates_must_lead_somewhere() -> None:
    stray = replace(
        WHOLE,
        exchanges=(*WHOLE.exchanges, Exchange("bt.own", "direct", {"alternate-exchange": "x"})),
        bindings=(*WHOLE.bindings, Binding("bt.own", "bt.q.nobody", "k")),
    )
    assert [(one.level, one.where) for one in found(stray)] == [
        ("error", "bt.own"),
        ("error", "bt.q.nobody"),
    ]


def test_delays_beyond_the_ladder_are_noted() -> None:
    assert found(WHOLE, replace(PLAIN, longest_delay=86_400)) == []
    (note,) = found(WHOLE, replace(PLAIN, longest_delay=86_401))
    assert (note.level, note.where) == ("note", "charge")


def test_errors_come_first() -> None:
    slow = replace(PLAIN, longest_delay=86_401)
    broken = changed("bt.q.charge", foo=1, x_max_length=5)
    assert [one.level for one in found(broken, slow)] == ["error", "error", "note"]


class Differing(MemoryTransport):
    """A transport that finds what it is told to."""

    def __init__(self, *differences: Difference) -> None:
        super().__init__(MemoryBroker())
        self.differences = list(differences)

    async def compare(self, topology: Topology) -> list[Difference]:
        return self.differences


async def planned(item: Exchange | Queue, detail: str) -> Plan:
    return await plan(Differing(Difference(item, missing=False, detail=detail)), WHOLE)


def queue(name: str) -> Queue:
    return next(one for one in WHOLE.queues if one.name == name)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("said", "argument", "mismatch"),
    [
        ("received '50' but current is '5'", "x-delivery-limit", ("5", "50")),
        (
            "received the value 'bt.dead' of type 'longstr' but current is none",
            "x-dead-letter-exchange",
            ("not set", "bt.dead"),
        ),
        (
            "received none but current is the value '9' of type 'signedint'",
            "x-max-length",
            ("9", "not set"),
        ),
    ],
)
async def test_what_rabbitmq_says_of_a_difference(
    said: str, argument: str, mismatch: tuple[str, str]
) -> None:
    detail = (
        f"PRECONDITION_FAILED - inequivalent arg '{argument}' for queue 'bt.q.charge' in vhost "
        f"'/': {said}"
    )
    (change,) = (await planned(queue("bt.q.charge"), detail)).mismatches
    assert change.argument == argument
    assert (change.found, change.wanted) == mismatch


@pytest.mark.anyio
async def test_what_is_not_understood_is_told_as_it_is() -> None:
    (change,) = (await planned(queue("bt.q.charge"), "the queue sulks")).mismatches
    assert (change.argument, change.found, change.wanted) == ("something", "the queue sulks", "")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "argument", "way"),
    [
        ("bt.q.charge", "x-delivery-limit", "set it back to 5 in the code (a policy"),
        ("bt.q.charge", "x-overflow", "stop what publishes to it and let its workers empty it"),
        (
            "bt.delay.100",
            "x-overflow",
            "stop workers and publishers until its messages have left it",
        ),
        ("bt.dead.charge", "x-queue-type", "redrive or discard what it holds"),
    ],
)
async def test_each_kind_of_queue_has_its_way_out(name: str, argument: str, way: str) -> None:
    detail = f"queue {name!r}: {argument} is 5 on the broker, 50 in the code"
    (change,) = (await planned(queue(name), detail)).mismatches
    assert (change.found, change.wanted) == ("5", "50")
    assert change.fix.startswith(way)
    assert f"rabbitmqctl delete_queue {name} --if-empty" in change.fix
    assert "BROKERTASK_NAMESPACE" in change.fix


@pytest.mark.anyio
async def test_an_exchange_has_its_own() -> None:
    detail = "exchange 'bt.tasks': type is 'topic' on the broker, 'direct' in the code"
    (change,) = (await planned(WHOLE.exchanges[0], detail)).mismatches
    assert (change.kind, change.found, change.wanted) == ("exchange", "topic", "direct")
    assert "rabbitmqadmin delete exchange name=bt.tasks" in change.fix


@pytest.mark.anyio
async def test_an_empty_broker_lacks_everything_and_holds_nothing() -> None:
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    await transport.open(timeout=1)
    empty = await plan(transport, WHOLE)
    assert empty.mismatches == []
    assert len(empty.missing) == len(WHOLE.exchanges) + len(WHOLE.queues)
    assert await observe(transport, NAMES, [PLAIN]) == []
    await transport.declare(WHOLE)
    assert (await plan(transport, WHOLE)).changes == ()
    assert await lacking(transport, WHOLE) == []
    await transport.close()
    broker.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ((queue("bt.q.refund"),), "bt.q.refund is missing"),
        (
            (queue("bt.q.refund"), WHOLE.exchanges[0]),
            "2 queues and exchanges are missing, such as bt.tasks",
        ),
    ],
)
async def test_what_is_missing_is_one_error(
    missing: tuple[Exchange | Queue, ...], what: str
) -> None:
    differing = Differing(*(Difference(item, missing=True) for item in missing))
    (problem,) = await lacking(differing, WHOLE)
    assert (problem.level, problem.what) == ("error", what)
    assert problem.fix == "brokertask topology apply --app MODULE:APP"


@pytest.mark.anyio
async def test_an_intake_left_over_and_empty_is_only_noted() -> None:
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    await transport.open(timeout=1)
    await transport.declare(WHOLE)
    refund = replace(PLAIN, task="refund", bounded=False)
    (note,) = await observe(transport, NAMES, [refund])
    assert (note.level, note.where) == ("note", "bt.in.refund")
    assert await observe(transport, NAMES, [replace(refund, bounded=True)]) == []
    await transport.close()
    broker.close()
