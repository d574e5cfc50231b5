"""The control log: its entries, and what holds when they are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from brokertask.control import MAX_CANCELLED, MAX_REASON, Entry, Standing
from brokertask.envelope import Envelope, Message
from brokertask.errors import EnvelopeError
from brokertask.values import MSGPACK, pack


def run(run_id: str, **values: str) -> Envelope:
    return Envelope(run_id=run_id, task="t", payload=b"\xc0", **values)  # type: ignore[arg-type]


def cancel(run_id: str, *, children: bool = False, reason: str = "") -> Entry:
    return Entry(kind="cancel", subject=run_id, at_ms=1, children=children, reason=reason)


def pause(task: str, at_ms: int = 1, *, again: bool = False) -> Entry:
    return Entry(kind="pause", subject=task, at_ms=at_ms, again=again)


def resume(task: str, at_ms: int = 1) -> Entry:
    return Entry(kind="resume", subject=task, at_ms=at_ms)


@pytest.mark.parametrize(
    "entry",
    [
        cancel("r", reason="why"),
        cancel("r", children=True),
        pause("t", again=True),
        resume("t"),
        Entry(kind="hello", subject="w", at_ms=5),
        Entry(kind="recording", subject="server", at_ms=5),
    ],
)
def test_an_entry_is_read_as_it_was_written(entry: Entry) -> None:
    assert Entry.read(entry.message()) == entry


def test_a_reason_that_is_too_long_is_cut() -> None:
    read = Entry.read(cancel("r", reason="x" * 10_000).message())
    assert read is not None
    assert len(read.reason) <= MAX_REASON


def test_entries_of_a_newer_version_are_passed_over() -> None:
    newer = {"subject": "r", "at_ms": 1, "colour": "red"}
    assert Entry.read(Message(body=pack(newer), type="cancel", content_type=MSGPACK)) == cancel("r")
    assert Entry.read(Message(body=b"anything", type="teleport")) is None


@pytest.mark.parametrize("body", [b"", b"\xc1", pack([1]), pack({"subject": 1, "at_ms": 1})])
def test_what_is_no_entry_is_refused(body: bytes) -> None:
    with pytest.raises(EnvelopeError):
        Entry.read(Message(body=body, type="cancel", content_type=MSGPACK))


def test_a_run_is_cancelled_by_its_own_entry_or_by_one_above_it() -> None:
    standing = Standing()
    assert standing.cancelled(run("a")) is None
    standing.apply(cancel("a", reason="first"))
    standing.apply(cancel("a", reason="second"))
    standing.apply(cancel("tree", children=True))
    assert (standing.cancelled(run("a")) or cancel("")).reason == "first"
    assert standing.cancelled(run("b", parent="a", root="a")) is None
    assert standing.cancelled(run("c", parent="tree", root="tree"))
    assert standing.cancelled(run("d", parent="c", root="tree"))
    assert standing.cancelled(run("tree"))
    assert standing.cancelled(run("e", parent="x", root="y")) is None


def test_children_that_are_named_later_are_cancelled_as_well() -> None:
    standing = Standing()
    standing.apply(cancel("a"))
    standing.apply(cancel("a", children=True))
    assert standing.cancelled(run("b", parent="a", root="a"))


def test_the_last_word_on_a_pause_counts() -> None:
    standing = Standing()
    for entry in (pause("t"), pause("t"), resume("t"), pause("u"), resume("v")):
        standing.apply(entry)
    assert standing.paused == {"u"}
    standing.apply(resume("u"))
    assert standing.paused == set()


def test_a_pause_that_is_repeated_too_late_is_none() -> None:
    standing = Standing()
    standing.apply(pause("t", 10))
    standing.apply(resume("t", 20))
    standing.apply(pause("t", 10, again=True))
    assert standing.paused == set()
    # One that was said since, by whichever clock, is one.
    standing.apply(pause("t", 15))
    assert standing.paused == {"t"}


def test_a_pause_that_is_repeated_holds_for_who_heard_nothing_before() -> None:
    standing = Standing()
    standing.apply(pause("t", 10, again=True))
    assert standing.paused == {"t"}


def test_the_oldest_cancellations_are_forgotten_first() -> None:
    standing = Standing()
    for number in range(MAX_CANCELLED + 10):
        standing.apply(replace(cancel("r"), subject=f"r{number}"))
    assert standing.cancelled(run("r9")) is None
    assert standing.cancelled(run("r10"))
