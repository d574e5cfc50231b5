"""Whatever bytes and headers come: understood exactly, or refused as `EnvelopeError`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brokertask import EnvelopeError
from brokertask.claim import CLAIM, Claim
from brokertask.deadletter import DeadLetter, bury, bury_raw
from brokertask.envelope import MAX_HEADERS_BYTES, Envelope, Message
from brokertask.errors import REASONS
from brokertask.events import Event
from brokertask.memory import Memory
from brokertask.outcome import AttemptError, Failed
from brokertask.transport.base import own_headers
from brokertask.values import JSON, LAST_INSTANT_MS, MSGPACK, decode, encode

LIMIT = 1_048_576
ERROR = AttemptError(1, "ValueError", "no", 1_700_000_000_000, "host-1-ab")
NAMES = (
    *("bt-version", "bt-attempt", "bt-seq", "bt-memory", "bt-triggered", "bt-sent", "bt-due"),
    *("bt-left", "bt-expires", "bt-tags", "bt-parent", "bt-root", "bt-derived", "bt-previous"),
    *("bt-origin", "bt-redrives", "bt-raw", "bt-reason", "bt-died"),
    *("traceparent", "tracestate", "baggage", "CC"),
    *("x-death", "x-delivery-count", "x-first-death-queue"),
)

numbers = st.integers(0, 1 << 40)
labels = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=32)
errors = st.builds(
    AttemptError,
    attempt=st.integers(1, 1_000),
    type=labels,
    message=st.text(max_size=50),
    at_ms=numbers,
    worker=labels,
    traceback=st.text(max_size=50),
)
envelopes = st.builds(
    Envelope,
    run_id=labels,
    task=st.just("a"),
    payload=st.binary(max_size=200),
    content_type=st.sampled_from([MSGPACK, JSON, "text/plain"]),
    attempt=st.integers(1, 1_000),
    seq=numbers,
    memory=st.builds(Memory, st.lists(errors, max_size=20).map(tuple)),
    triggered_ms=st.none() | numbers,
    sent_ms=st.none() | numbers,
    due_ms=st.none() | numbers,
    left_ms=numbers,
    expires_ms=st.none() | numbers,
    tags=st.lists(labels, max_size=32).map(tuple),
    parent=st.none() | labels,
    root=st.none() | labels,
    reply_to=st.none() | labels,
    app_id=st.none() | labels,
    id_derived=st.booleans(),
    previous=st.none() | labels,
    origin=st.none() | labels,
    redrives=numbers,
    trace=st.dictionaries(st.sampled_from(["traceparent", "tracestate", "baggage"]), labels),
)

any_text = st.text(st.characters(exclude_categories=[]), max_size=300)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.sampled_from([0, 1, 2, LAST_INSTANT_MS, LAST_INSTANT_MS + 1, 2**63 - 1]),
    st.floats(),
    any_text,
    st.binary(max_size=300),
    st.datetimes(timezones=st.none() | st.just(UTC)),
    st.just("x" * 60_000),
    st.just("\x00" * 128),
    st.just("😀" * 128),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(any_text, inner, max_size=5),
    max_leaves=10,
)
deaths = st.lists(
    st.dictionaries(st.sampled_from(["reason", "time", "queue", "count"]), anything), max_size=2
)
headers = st.dictionaries(
    st.sampled_from(NAMES) | any_text, anything | deaths | numbers, max_size=len(NAMES)
)
properties = st.none() | st.text(max_size=255)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
bodies = st.one_of(
    st.binary(max_size=200),
    plain_values.map(encode),
    plain_values.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda value, cut: encode(value)[:cut], plain_values, st.integers(0, 50)),
    st.builds(lambda value, more: encode(value) + more, plain_values, st.binary(min_size=1)),
    st.builds(
        lambda head, count: head * count,
        st.sampled_from(
            [
                *(b"\x91", b"\x81", b"\x81\x01", b"\xdc\xff\xff", b"\xdd\x00\x01\x86\xa0"),
                *(b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
                *(b"[", b'{"a":', b"\xc1", b"\xd4\x05"),
            ]
        ),
        st.sampled_from([1, 64, 65, 100, 1_100, 10_000]),
    ),
)
messages = st.builds(
    Message,
    body=bodies,
    message_id=st.none() | any_text,
    type=properties,
    content_type=st.sampled_from([None, MSGPACK, JSON, CLAIM, "text/plain", "", ";"]) | properties,
    content_encoding=properties,
    app_id=properties,
    reply_to=properties,
    correlation_id=st.none() | any_text,
    timestamp_ms=st.none() | st.integers(-(2**63), 2**63),
    headers=headers,
)


T = TypeVar("T")


def attempted(call: Callable[[], T]) -> tuple[T | None, EnvelopeError | None]:
    """Return what a call returns, or the one error that it may raise."""
    try:
        return call(), None
    except EnvelopeError as error:
        return None, error


def read(message: Message) -> Envelope:
    return Envelope.read(message, task="a", max_bytes=LIMIT)


def size(headers: Mapping[str, object]) -> int:
    """Return how many bytes these headers take in AMQP, at least."""

    def taken(value: object) -> int:
        if isinstance(value, str):
            return 5 + len(value.encode())
        return 5 + sum(map(taken, value)) if isinstance(value, list) else 9

    return sum(1 + len(name.encode()) + taken(value) for name, value in headers.items())


@given(envelopes)
def test_an_envelope_comes_back_as_it_went(envelope: Envelope) -> None:
    assert read(envelope.message()) == envelope


@given(envelopes)
def test_the_same_envelope_is_the_same_bytes(envelope: Envelope) -> None:
    assert envelope.message() == replace(envelope).message()


@given(messages)
@example(Message(body=b"", headers={"bt-tags": ["😀" * 128] * 40, "baggage": "b" * 8_192}))
@example(Message(body=b"", headers={"bt-tags": ["\x00" * 128] * 40, "baggage": "ä" * 4_096}))
@example(Message(body=b"", headers={"bt-parent": "\ud800", "bt-tags": ["\ud800"]}))
@settings(max_examples=200)
def test_whatever_is_read_can_be_followed_and_buried(message: Message) -> None:
    failed = Failed("undecodable", ERROR)
    envelope, error = attempted(lambda: read(message))
    if envelope is None:
        assert error is not None
        assert error.reason in REASONS
        buried = bury_raw(message, failed, task="a", now_ms=LAST_INSTANT_MS)
    else:
        for follows in followers(envelope):
            assert_sendable(follows.message())
        buried = bury(envelope, failed, now_ms=LAST_INSTANT_MS)
    assert_sendable(buried)
    assert DeadLetter.read(buried, task="a").reason == "undecodable"


def followers(envelope: Envelope) -> tuple[Envelope, Envelope]:
    """Return a continuation and a redrive, with all that a worker may add."""
    memory = envelope.memory.with_error(ERROR)
    again = envelope.again(attempt=envelope.attempt + 1, now_ms=LAST_INSTANT_MS, memory=memory)
    again = replace(again, previous="p" * 55, origin="o" * 55, due_ms=LAST_INSTANT_MS)
    return again, envelope.redriven(trace=envelope.trace, now_ms=LAST_INSTANT_MS)


def assert_sendable(message: Message) -> None:
    """Assert that it fits a frame, and that every transport can write it."""
    assert own_headers(message.headers) == message.headers
    assert size(message.headers) < MAX_HEADERS_BYTES
    assert message.message_id is not None
    assert len(message.message_id.encode()) <= 255
    assert msgpack.unpackb(msgpack.packb(message.headers)) == message.headers
    for value in message.headers.values():
        assert not isinstance(value, int) or 0 <= value < 2**62


@given(messages)
@settings(max_examples=200)
def test_a_payload_is_decoded_or_refused(message: Message) -> None:
    envelope = Envelope(
        run_id="r", task="a", payload=message.body, content_type=message.content_type or MSGPACK
    )
    _, error = attempted(envelope.value)
    if error is not None:
        assert error.reason in ("undecodable", "too_deep")
        assert len(str(error)) < 400


@given(bodies | st.dictionaries(st.sampled_from(["sha256", "size"]), plain_values).map(encode))
@settings(max_examples=200)
def test_a_claim_is_read_or_refused(body: bytes) -> None:
    envelope = Envelope(run_id="r", task="a", payload=body, content_type=CLAIM)
    claim, error = attempted(envelope.claim)
    if error is not None:
        assert error.reason in ("undecodable", "too_deep")
    else:
        assert claim is not None
        assert Claim.unpack(claim.pack()) == claim


@given(messages)
@settings(max_examples=200)
def test_a_dead_letter_can_always_be_seen(message: Message) -> None:
    dead = DeadLetter.read(message, task="a")
    assert dead.died_ms is None or datetime.fromtimestamp(dead.died_ms / 1000, UTC)
    assert len(dead.reason) <= 128
    assert dead.run_id
    assert dead.meaning
    assert dead.claim is None or dead.claim.size >= 0
    # Encodable, so that it can be printed.
    f"{dead.run_id}{dead.reason}{dead.tags}".encode()


@given(messages)
def test_an_event_is_read_or_refused(message: Message) -> None:
    event, error = attempted(lambda: Event.read(message))
    if event is not None:
        assert Event.read(event.message()) == event
    elif error is not None:
        assert error.reason in ("undecodable", "too_deep")


@given(plain_values)
def test_a_value_comes_back_as_it_went(value: object) -> None:
    assert encode(decode(encode(value), MSGPACK)) == encode(value)


def nested_msgpack(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


def nested_json(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize("levels", [65, 100, 1_023, 1_024, 1_025, 10_000, 100_000])
@pytest.mark.parametrize(("make", "kind"), [(nested_msgpack, MSGPACK), (nested_json, JSON)])
def test_too_deep_is_said_whatever_the_depth(
    make: Callable[[int], bytes], kind: str, levels: int
) -> None:
    with pytest.raises(EnvelopeError) as caught:
        decode(make(levels), kind)
    assert caught.value.reason == "too_deep"


def test_depth_in_a_header_is_of_no_matter() -> None:
    value: object = "x"
    for _ in range(100_000):
        value = [value]
    message = Message(body=b"\x01", headers={"bt-tags": value, "x-death": [{"reason": value}]})
    assert read(message).tags == ()
    assert DeadLetter.read(message, task="a").reason == "unknown"
