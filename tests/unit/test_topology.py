from __future__ import annotations

import bisect
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokertask import InvalidOption
from brokertask.topology import (
    IN_PLACE_MS,
    LONGEST_RUNG_MS,
    SHORTEST_RUNG_MS,
    UNLIMITED_DELIVERIES,
    Binding,
    Names,
    QueueOptions,
    Route,
    TaskQueue,
    Topology,
    check_task_id,
    ladder,
    rung_below,
    topology,
)

NAMES = Names("shop")
DAY_MS = 86_400_000
BOUNDED = TaskQueue("bounded", QueueOptions(max_length=5))
PLAIN = TaskQueue("plain")
WHOLE = topology(NAMES, [PLAIN, BOUNDED])
task_queues = st.lists(
    st.builds(
        TaskQueue,
        st.from_regex(r"[a-z][a-z0-9_.:-]{0,20}", fullmatch=True),
        st.builds(QueueOptions, st.none() | st.integers(1, 100), st.integers(1, 100)),
    ),
    unique_by=lambda task: task.task,
    max_size=5,
)


def _hops(delay_ms: int) -> list[int]:
    """Return the rungs that a delay takes, when no time is lost on the way."""
    hops = []
    while delay_ms > IN_PLACE_MS:
        hops.append(rung_below(delay_ms))
        _, delay_ms = NAMES.delay_route("a", delay_ms)
    return hops


def _worst(limit: int, known: dict[int, int]) -> int:
    """Return the most hops that any delay up to `limit` ms takes; `known` is a cache."""
    if limit <= IN_PLACE_MS:
        return 0
    if limit not in known:
        rungs = [rung for rung in ladder() if rung <= limit]
        ends = [*(rung - 1 for rung in rungs[1:]), limit]
        rests = {min(end - rung, limit - 1) for rung, end in zip(rungs, ends, strict=True)}
        known[limit] = 1 + max(_worst(rest, known) for rest in rests)
    return known[limit]


def test_the_ladder_is_what_the_manual_says() -> None:
    rungs = ladder()
    assert rungs == tuple(sorted(set(rungs)))
    assert rungs[:5] == (10, 20, 50, 100, 125)
    assert (rungs[0], rungs[-1]) == (SHORTEST_RUNG_MS, LONGEST_RUNG_MS)
    assert {1_000, 2_000, 5_000, 30_000, 60_000, 300_000} <= set(rungs)
    assert max(b / a for a, b in pairwise(rungs[3:])) < 1.34


@given(st.integers(SHORTEST_RUNG_MS, 30 * DAY_MS))
def test_the_rung_below_is_the_longest_that_fits(delay_ms: int) -> None:
    rungs = ladder()
    assert rung_below(delay_ms) == rungs[bisect.bisect_right(rungs, delay_ms) - 1]


@pytest.mark.parametrize("delay_ms", [-5, 0, 1, 9])
def test_there_is_a_rung_for_every_delay(delay_ms: int) -> None:
    assert NAMES.delay_route("a", delay_ms) == (
        Route("shop.delay", "a", ("shop.delay.10",)),
        0,
    )


@given(st.integers(IN_PLACE_MS + 1, 30 * DAY_MS))
def test_a_delay_is_never_early_and_hardly_late(delay_ms: int) -> None:
    # What the hops leave, up to 20 ms, a worker waits out in place.
    assert 0 <= delay_ms - sum(_hops(delay_ms)) <= IN_PLACE_MS


@given(st.integers(0, 30 * DAY_MS))
def test_days_take_a_hop_each_and_the_rest_few(delay_ms: int) -> None:
    hops = _hops(delay_ms)
    assert hops.count(LONGEST_RUNG_MS) == delay_ms // DAY_MS
    assert len(hops) - hops.count(LONGEST_RUNG_MS) <= 12


def test_no_delay_below_a_day_takes_more_than_twelve_hops() -> None:
    assert _worst(DAY_MS - 1, {}) == 12


def test_the_delays_people_write_take_one_hop() -> None:
    for seconds in (1, 2, 3, 4, 5, 6, 8, 10, 20, 30, 40, 50, 60, 300, 600, 86_400):
        assert len(_hops(seconds * 1000)) == 1, seconds


@given(st.integers(0, 30 * DAY_MS))
def test_every_delay_goes_to_a_queue_that_is_declared(delay_ms: int) -> None:
    route, _ = NAMES.delay_route("plain", delay_ms)
    (rung,) = route.also
    assert Binding(route.exchange, rung, rung) in WHOLE.bindings
    assert any(queue.name == rung for queue in WHOLE.queues)


def test_every_rung_is_at_least_once_and_goes_on_by_its_own_key() -> None:
    rungs = [queue for queue in WHOLE.queues if queue.name.startswith("shop.delay.")]
    assert len(rungs) == len(ladder())
    for queue in rungs:
        assert queue.arguments == {
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-message-ttl": int(queue.name.rpartition(".")[2]),
            "x-dead-letter-exchange": "shop.resume",
        }


@given(task_queues)
def test_nothing_that_a_delay_reaches_can_be_full(tasks: list[TaskQueue]) -> None:
    whole = topology(NAMES, tasks)
    targets = {one.queue for one in whole.bindings if one.exchange in ("shop.resume", "shop.dead")}
    assert {NAMES.queue(one.task) for one in tasks} <= targets
    for queue in whole.queues:
        if queue.name in targets or queue.name == "shop.unrouted":
            assert "x-max-length" not in queue.arguments, queue
        assert "x-expires" not in queue.arguments, queue


@given(task_queues)
def test_a_trigger_reaches_one_queue_and_a_continuation_the_workers(tasks: list[TaskQueue]) -> None:
    whole = topology(NAMES, tasks)
    for task in tasks:
        trigger, resume = NAMES.trigger_route(task.task), NAMES.resume_route(task.task)
        bounded = task.options.max_length is not None
        first = NAMES.intake(task.task) if bounded else NAMES.queue(task.task)
        assert _bound(whole, trigger) == {first}
        assert _bound(whole, resume) == {NAMES.queue(task.task)}
        assert _bound(whole, NAMES.dead_route(task.task)) == {NAMES.dead_queue(task.task)}


def _bound(whole: Topology, route: Route) -> set[str]:
    keys = {route.key, *route.also}
    return {
        one.queue for one in whole.bindings if one.exchange == route.exchange and one.key in keys
    }


@given(task_queues)
def test_what_is_absent_is_never_also_bound(tasks: list[TaskQueue]) -> None:
    whole = topology(NAMES, tasks)
    assert not set(whole.absent_bindings) & set(whole.bindings)
    assert len(whole.absent_bindings) == len(tasks)


def test_changing_the_limit_moves_the_binding() -> None:
    before, after = topology(NAMES, [PLAIN]), topology(NAMES, [TaskQueue("plain", BOUNDED.options)])
    direct = Binding("shop.tasks", "shop.q.plain", "plain")
    bounded = Binding("shop.tasks", "shop.in.plain", "plain")
    assert direct in before.bindings
    assert before.absent_bindings == (bounded,)
    assert bounded in after.bindings
    assert after.absent_bindings == (direct,)


@given(task_queues)
def test_every_binding_joins_what_is_declared(tasks: list[TaskQueue]) -> None:
    whole = topology(NAMES, tasks)
    exchanges = {exchange.name for exchange in whole.exchanges}
    queues = [queue.name for queue in whole.queues]
    assert len(queues) == len(set(queues))
    assert {one.exchange for one in whole.bindings} <= exchanges
    assert {one.queue for one in whole.bindings} <= set(queues)
    assert _dead_letter_exchanges(whole) <= exchanges


def _dead_letter_exchanges(whole: Topology) -> set[object]:
    names: Iterable[tuple[str, object]] = (
        item for queue in whole.queues for item in queue.arguments.items()
    )
    return {value for name, value in names if name == "x-dead-letter-exchange"}


def test_task_queues_bury_by_themselves_and_dead_queues_never_drop() -> None:
    arguments = {queue.name: queue.arguments for queue in WHOLE.queues}
    for name in ("shop.q.plain", "shop.q.bounded", "shop.in.bounded"):
        assert arguments[name]["x-dead-letter-exchange"] == "shop.dead"
        assert arguments[name]["x-dead-letter-strategy"] == "at-least-once"
        assert arguments[name]["x-overflow"] == "reject-publish"
        assert arguments[name]["x-delivery-limit"] == 50
        assert arguments[name]["x-dead-letter-routing-key"] == name.rpartition(".")[2]
    assert arguments["shop.in.bounded"]["x-max-length"] == 5
    for name in ("shop.dead.plain", "shop.unrouted"):
        assert arguments[name]["x-delivery-limit"] == UNLIMITED_DELIVERIES


def test_what_finds_no_target_is_kept() -> None:
    alternates = {one.name: one.arguments.get("alternate-exchange") for one in WHOLE.exchanges}
    assert alternates["shop.resume"] == alternates["shop.dead"] == "shop.unrouted"
    assert Binding("shop.unrouted", "shop.unrouted", "") in WHOLE.bindings


def test_events_go_to_listeners_and_to_the_caller() -> None:
    assert NAMES.event_route("failed", "a.b") == Route("shop.events", "failed.a.b")
    assert NAMES.event_route("failed", "a", reply_to="me").also == ("me",)


def test_equal_tasks_give_equal_topologies() -> None:
    assert topology(NAMES, [PLAIN, BOUNDED]) == WHOLE


@pytest.mark.parametrize("task", ["a", "A-b_c.d:e", "0", "_", "x" * 127])
def test_task_ids(task: str) -> None:
    assert check_task_id(task) == task


@pytest.mark.parametrize("task", ["", "a b", "ä", ".a", "-a", ":a", "a/b", "a*", "x" * 128, "a\n"])
def test_bad_task_ids(task: str) -> None:
    with pytest.raises(InvalidOption, match="task id"):
        check_task_id(task)


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "x" * 33])
def test_bad_namespaces(namespace: str) -> None:
    with pytest.raises(InvalidOption, match="namespace"):
        Names(namespace)


@pytest.mark.parametrize(
    ("max_length", "delivery_limit"), [(0, 1), (-1, 1), (None, 0), (None, -1), (None, 10**10)]
)
def test_bad_queue_options(max_length: int | None, delivery_limit: int) -> None:
    with pytest.raises(InvalidOption, match="queue: "):
        QueueOptions(max_length, delivery_limit)
