"""What travels of a wait, and when it is over."""

from __future__ import annotations

import pytest

from brokertask.claim import Claim
from brokertask.envelope import Envelope
from brokertask.errors import EnvelopeError
from brokertask.memory import Memory, Step
from brokertask.values import encode, pack
from brokertask.wait import WAIT, Failing, Got, Target, Wait, child_id, holds, token_id

ONE = Got("value", encode(1))
FAILED = Got("failed", Failing("run", "task", "max_attempts", "ValueError", "no"))
CALL, MAP = Target("call", "task"), Target("map", "task", 2)
TOKEN = Target("token", "token_1", due_ms=500, name="approval")
EVENT = Target("event", "order.paid", where={"order": {"number": 7}})


@pytest.mark.parametrize(
    "wait",
    [
        Wait((CALL,)),
        Wait((MAP, TOKEN, EVENT), first=True, due_ms=7, redrives=2),
        Wait((CALL, MAP), got=(ONE, FAILED, None)),
        Wait((CALL,), got=(Got("value", Claim.of(b"large")),)),
        Wait((TOKEN,), got=(Got("rejected", "too dear"),)),
        Wait((TOKEN,), got=(Got("timed_out"),)),
        Wait((CALL,), got=Claim.of(b"all of it")),
        Wait((), got=()),
    ],
)
def test_a_wait_comes_back_as_it_was(wait: Wait) -> None:
    again = Wait.unpack(wait.pack())
    assert again == wait
    assert [one.due_ms for one in again.targets] == [one.due_ms for one in wait.targets]
    assert [one.name for one in again.targets] == [one.name for one in wait.targets]


@pytest.mark.parametrize(
    "raw",
    [
        7,
        {},
        {"for": 7},
        {"for": [["call"]]},
        {"for": [["dance", "task", 1, {}, None, [], ""]]},
        {"for": [["map", "task", 10_000_000, {}, None, [], ""]]},
        {"for": [], "got": 7},
        {"for": [], "got": [["value"]]},
        {"for": [], "got": [["failed", ["run"]]]},
        {"for": [], "claim": {}},
        {"for": [], "due": "soon"},
    ],
)
def test_a_damaged_wait_is_refused(raw: object) -> None:
    with pytest.raises(EnvelopeError):
        Wait.unpack(pack(raw))


def test_all_is_over_when_the_last_has_come() -> None:
    wait = Wait((CALL, MAP))
    assert wait.decide([ONE, None, ONE], 0) == ((), None)
    assert wait.decide([ONE, ONE, FAILED], 0)[0] == (ONE, ONE, FAILED)


def test_first_is_over_with_one_whole_target() -> None:
    wait = Wait((CALL, MAP), first=True)
    assert wait.decide([None, ONE, None], 0)[0] == ()
    assert wait.decide([None, ONE, ONE], 0)[0] == (None, ONE, ONE)


def test_what_has_not_come_in_the_time_of_the_wait_has_timed_out() -> None:
    wait = Wait((CALL, MAP), due_ms=100)
    assert wait.decide([ONE, None, ONE], 99) == ((), 100)
    assert wait.decide([ONE, None, ONE], 100)[0] == (ONE, Got("timed_out"), ONE)


def test_a_target_may_time_out_by_itself() -> None:
    wait = Wait((TOKEN, CALL), due_ms=900)
    assert wait.decide([None, None], 499) == ((), 500)
    assert wait.decide([None, None], 500) == ((), 900)
    assert wait.decide([None, ONE], 500)[0] == (Got("timed_out"), ONE)


def test_a_wait_for_nothing_is_over() -> None:
    wait = Wait((Target("map", "task", 0),))
    assert wait.over(wait.decide([], 0)[0]).got == ()


def test_children_have_ids_of_their_own_that_are_always_the_same() -> None:
    wait = Wait((MAP, CALL))
    ids = [*wait.children("run", "wait", 0), *wait.children("run", "wait", 1)]
    others = [*wait.children("run", "wait#2", 0), *wait.children("other", "wait", 0)]
    again = Wait((MAP, CALL), redrives=1).children("run", "wait", 0)
    assert len({*ids, *others, *again}) == 3 + 4 + 2
    assert ids == [*wait.children("run", "wait", 0), *wait.children("run", "wait", 1)]
    assert [one.subject for one in wait.conditions("run", "wait")] == ids


def test_an_id_is_for_ever() -> None:
    # Runs that sleep today are resumed by the release of next year.
    assert child_id("a") == "ca978112-ca1b-5dca-bac2-31b39a23dc4d"
    assert token_id("a") == "token_ca978112ca1bbdcafac231b39a23dc4d"


def test_only_what_raises_is_asked_for_anew_after_a_redrive() -> None:
    raising = Wait((CALL, MAP)).over([FAILED, ONE, ONE])
    partly = Wait((CALL, MAP)).over([ONE, FAILED, ONE])
    assert raising.failed
    assert not partly.failed
    steps = tuple(
        Step(f"wait#{at}", WAIT, "", one.pack()) for at, one in enumerate((raising, partly))
    )
    dead = Envelope(run_id="run", task="task", payload=b"", memory=Memory(steps=steps))
    redriven = dead.redriven(trace={}, now_ms=0).memory
    found = [Wait.unpack(step.result) for step in redriven.steps if isinstance(step.result, bytes)]
    assert [wait.got is None for wait in found] == [True, False]


def test_an_event_that_came_is_not_waited_for_again() -> None:
    over = Wait((EVENT, CALL)).over([Got("value", b"", source="event-1"), ONE])
    assert [target.seen for target in Wait.unpack(over.pack()).targets] == [("event-1",), ()]


@pytest.mark.parametrize(
    ("value", "where", "held"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": None}, {"b": None}, False),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, True),
        ({"a": [1, 2]}, {"a": [1]}, False),
        (["a"], {}, False),
    ],
)
def test_an_event_holds_what_is_asked_for(
    value: object, where: dict[str, object], held: bool
) -> None:
    assert holds(value, where) is held
