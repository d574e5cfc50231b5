"""Today's code reads every byte of `v1` as it was meant, and writes no other."""

from __future__ import annotations

import msgpack
import pytest

from brokertask.deadletter import DeadLetter
from brokertask.envelope import Envelope
from brokertask.events import Event
from tests.wire.samples import (
    CLAIMED,
    CONTINUATION,
    ENVELOPES,
    EVENTS,
    FIRST,
    FOLDER,
    FOREIGN,
    LAST,
    LIMIT,
    NO_RUN,
    SCAN,
    SECOND,
    T0,
    TEXT,
    UNREAD,
    Golden,
    written,
)


@pytest.mark.parametrize("name", written())
def test_the_same_bytes_are_written(name: str) -> None:
    assert Golden.of(written()[name]) == Golden.load(name)


@pytest.mark.parametrize("name", [*ENVELOPES, *FOREIGN])
def test_a_message_of_a_run_is_read(name: str) -> None:
    expected = {**ENVELOPES, **FOREIGN}[name]
    message = Golden.load(name).message
    assert Envelope.read(message, task=expected.task, max_bytes=LIMIT) == expected


@pytest.mark.parametrize("name", ["trigger", "bare", "json"])
def test_the_payload_is_what_was_sent(name: str) -> None:
    message = Golden.load(name).message
    envelope = Envelope.read(message, task="process_document", max_bytes=LIMIT)
    assert envelope.value() == {"path": "a.txt", "pages": 3}


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_read(name: str) -> None:
    message = Golden.load(name).message
    assert Event.read(message) == EVENTS[name]
    assert (message.type, message.correlation_id) == (EVENTS[name].event, EVENTS[name].run_id)


def test_a_dead_run_is_read() -> None:
    dead = DeadLetter.read(Golden.load("dead").message, task="process_document")
    assert (dead.run_id, dead.task) == (CONTINUATION.run_id, "process_document")
    assert (dead.reason, dead.died_ms, dead.attempts) == ("max_attempts", T0 + 8_010, 3)
    assert dead.errors == (FIRST, SECOND, LAST)
    assert (dead.payload, dead.content_type) == (CONTINUATION.payload, "application/msgpack")
    assert (dead.tags, dead.redrives) == (("demo", "größe-l"), 0)
    assert dead.traceparent == CONTINUATION.trace["traceparent"]
    assert dead.envelope is not None


def test_what_was_no_run_is_read() -> None:
    dead = DeadLetter.read(Golden.load("dead_raw").message, task="process_document")
    assert (dead.run_id, dead.reason, dead.died_ms) == ("legacy-99", "undecodable", T0 + 20)
    assert (dead.attempts, dead.errors) == (0, (UNREAD,))
    assert (dead.payload, dead.content_type) == (NO_RUN.body, NO_RUN.content_type)


def test_another_languages_msgpack_finds_the_memory() -> None:
    """Read by the specification alone: `bt-memory` bytes of payload, then one msgpack map."""
    golden = Golden.load("continuation")
    offset = golden.message.headers["bt-memory"]
    assert isinstance(offset, int)
    assert msgpack.unpackb(golden.body[:offset]) == {"path": "a.txt", "pages": 3}
    (first, second) = msgpack.unpackb(golden.body[offset:])["errors"]
    assert (first["message"], second["type"]) == ("zu früh", "app.errors.Busy")


def test_another_languages_msgpack_finds_the_claims() -> None:
    golden = Golden.load("claimed")
    offset = golden.message.headers["bt-memory"]
    assert isinstance(offset, int)
    assert golden.message.content_type == "application/vnd.brokertask.claim+msgpack"
    assert msgpack.unpackb(golden.body[:offset]) == {"sha256": SCAN.sha256, "size": SCAN.size}
    claimed, plain = msgpack.unpackb(golden.body[offset:])["steps"]
    text = {"sha256": TEXT.sha256, "size": TEXT.size}
    assert claimed == ["fetch", "app.fetch", "", None, text]
    assert plain == ["count", "app.count", "fetch", b"\x03"]
    event = msgpack.unpackb(Golden.load("event_claimed").body)
    assert (event["claim"], event.get("result")) == (text, None)


def test_a_claim_is_read() -> None:
    message = Golden.load("claimed").message
    envelope = Envelope.read(message, task="process_document", max_bytes=LIMIT)
    assert (envelope.claim(), envelope.payload) == (SCAN, CLAIMED.payload)


def test_every_golden_file_is_looked_at() -> None:
    names = {*written(), *FOREIGN}
    assert {path.name for path in FOLDER.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("bin", "json")
    }
