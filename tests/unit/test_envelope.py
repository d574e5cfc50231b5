from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import asdict, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from brokertask import EnvelopeError, InvalidPayload, MemoryFull, PayloadTooLarge
from brokertask.claim import Claim
from brokertask.deadletter import DeadLetter, bury, bury_raw
from brokertask.envelope import (
    MAX_HEADERS_BYTES,
    MAX_TRACEBACK,
    Envelope,
    Message,
    check_headers,
    derived_id,
    run_id_of,
)
from brokertask.events import COMPLETED, EXPIRED, FAILED, RETRYING, SLEEPING, Event, event_of
from brokertask.memory import KEPT_ERRORS, MAX_ERRORS_BYTES, Memory, Step
from brokertask.outcome import (
    AttemptError,
    Early,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.values import JSON, LAST_INSTANT_MS, MAX_COLLECTION, MSGPACK, clip, decode, encode
from tests.quickly import quickly

LIMIT = 1_048_576
ERROR = AttemptError(1, "ValueError", "no", 1_700_000_000_000, "host-1-ab", "Traceback …")
STEPS = (
    Step("fetch", "shop.fetch", "", encode({"page": [1, 2]})),
    Step("fetch#2", "shop.fetch", "fetch", Claim.of(b"a large page")),
    Step("tidy", "shop.tidy", None, encode(None)),
)
FULL = Memory((ERROR,), STEPS, {"customer": "acme", "seen": [1, b"\x00"]})
TRIGGER = Envelope(run_id="r", task="a", payload=b"\x01", triggered_ms=1_000, sent_ms=1_000)


def read(message: Message, *, max_bytes: int = LIMIT) -> Envelope:
    return Envelope.read(message, task="a", max_bytes=max_bytes)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        (datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (Decimal("0.10"), "0.10"),
        ((1, (2, 3)), [1, [2, 3]]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({1: "a", None: "b"}, {1: "a", None: "b"}),
        (b"\x00\xff", b"\x00\xff"),
        ("ä€😀", "ä€😀"),
    ],
)
def test_what_is_written_is_read(value: object, read_as: object) -> None:
    assert decode(encode(value), MSGPACK) == read_as


def test_a_time_zone_becomes_utc_and_its_absence_is_refused() -> None:
    here = datetime.fromisoformat("2024-06-01T12:00:00+02:00")
    assert decode(encode(here), MSGPACK).isoformat() == "2024-06-01T10:00:00+00:00"
    with pytest.raises(InvalidPayload, match="time zone"):
        encode([datetime(2024, 1, 1)])


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("kind", [MSGPACK, JSON])
def test_sixty_four_levels_pass_and_one_more_is_too_deep(kind: str) -> None:
    def written(levels: int) -> bytes:
        if kind == JSON:
            return b"[" * levels + b"]" * levels
        return b"\x91" * (levels - 1) + b"\x90"

    assert decode(written(64), kind) == nested(64)
    for levels in (65, 100, 10_000, 100_000):
        with pytest.raises(EnvelopeError, match="nested deeper than 64") as caught:
            decode(written(levels), kind)
        assert caught.value.reason == "too_deep"


def test_many_containers_side_by_side_are_not_deep() -> None:
    assert decode(encode([[]] * 10_000), MSGPACK) == [[]] * 10_000


@pytest.mark.parametrize(
    "value",
    [
        nested(65),
        [0] * (MAX_COLLECTION + 1),
        {(1, 2): 3},
        2**64,
        -(2**63) - 1,
        object(),
        "\ud800",
        {"a": {complex: 1}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_worker_could_read_is_refused_by_the_publisher(value: object) -> None:
    with pytest.raises(InvalidPayload):
        encode(value)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", MSGPACK),
        (b"\xc1", MSGPACK),
        (b"\x01\x02", MSGPACK),
        (b"\x92\x01", MSGPACK),
        (b"\xa5abc", MSGPACK),
        (b"\xa2\xff\xfe", MSGPACK),
        (b"\x81\x90\x01", MSGPACK),
        (b"\xc7\x03\x05abc", MSGPACK),
        (b"\xd7\xff" + b"\xff" * 8, MSGPACK),
        (b"\xc7\x0c\xff" + b"\x00" * 4 + b"\x7f" * 8, MSGPACK),
        (b"\xdf\xff\xff\xff\xff", MSGPACK),
        (b"\xdd\xff\xff\xff\xff", MSGPACK),
        (b"\xdb\xff\xff\xff\xff", MSGPACK),
        (b"", JSON),
        (b"{", JSON),
        (b"NaN", JSON),
        (b"[Infinity]", JSON),
        (b'{"a": -Infinity}', JSON),
        (b"\xff", JSON),
        (b"1 2", JSON),
        (b"9" * 5_000, JSON),
        (b"\x01", "text/plain"),
        (b"\x01", "application/x-python-serialize"),
        (b"\x01", ""),
    ],
)
def test_what_is_no_value_is_undecodable(body: bytes, kind: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        decode(body, kind)
    assert caught.value.reason == "undecodable"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/msgpack", b"\x93\x01\x02\x03"),
        ("application/x-msgpack", b"\x93\x01\x02\x03"),
        ("application/vnd.msgpack", b"\x93\x01\x02\x03"),
        ("Application/MsgPack ; version=5", b"\x93\x01\x02\x03"),
        ("application/json", b" [1, 2, 3] "),
        ("application/json; charset=utf-8", b"[1,2,3]"),
    ],
)
def test_content_types_that_are_understood(kind: str, body: bytes) -> None:
    assert decode(body, kind) == [1, 2, 3]


@pytest.mark.parametrize(
    "header", [b"\xdd\x00\x01\x86\xa0", b"\xdc\xff\xff", b"\xdf\x00\x01\x86\xa0"]
)
def test_lengths_that_lie_cost_nothing(header: bytes) -> None:
    # Believed, a thousand nested arrays of 100,000 would allocate 800 MB.
    with quickly(0.05), pytest.raises(EnvelopeError):
        decode(header * 1_000, MSGPACK)


def test_text_is_clipped_in_its_middle() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("abcdefghijk", 9) == "abc...ijk"


# --- envelopes -----------------------------------------------------------------------------------


def test_bare_bytes_are_a_trigger() -> None:
    envelope = read(Message(body=b"\x01"))
    assert envelope == Envelope(
        run_id=derived_id(Message(body=b"\x01"), "a"), task="a", payload=b"\x01", id_derived=True
    )
    assert envelope.value() == 1


def test_a_derived_id_tells_messages_apart_and_redeliveries_not() -> None:
    message = Message(body=b"\x01", timestamp_ms=5_000, app_id="shop", correlation_id="c")
    again = replace(message, headers={"x-delivery-count": 1}, reply_to="me")
    assert run_id_of(message, "a") == run_id_of(again, "a")
    others = [
        replace(message, body=b"\x02"),
        replace(message, timestamp_ms=6_000),
        replace(message, app_id="other"),
        replace(message, correlation_id="d"),
    ]
    ids = {run_id_of(other, "a") for other in [message, *others]} | {run_id_of(message, "b")}
    assert len(ids) == 6
    assert all(uuid.UUID(one).version == 5 for one in ids)


def test_long_ids_that_begin_alike_stay_different() -> None:
    ids = {run_id_of(Message(body=b"", message_id="x" * 200 + end), "a") for end in "abc"}
    assert len(ids) == 3
    assert all(len(one) <= 128 for one in ids)
    assert run_id_of(Message(body=b"", message_id="x" * 128), "a") == "x" * 128
    assert not read(Message(body=b"\x01", message_id="x" * 200)).id_derived


def test_the_task_is_that_of_the_queue() -> None:
    assert read(Message(body=b"\x01", type="other")).task == "a"


def test_the_memory_is_behind_the_payload() -> None:
    before = replace(TRIGGER, payload=b"\xc1 not msgpack", memory=Memory((ERROR,)), attempt=2)
    after = read(before.message())
    assert (after.payload, after.memory) == (before.payload, before.memory)


def test_memory_keeps_the_first_and_the_latest_errors() -> None:
    memory = Memory()
    for attempt in range(1, 101):
        memory = memory.with_error(replace(ERROR, attempt=attempt))
    assert [error.attempt for error in memory.errors] == [1, *range(82, 101)]
    assert len(memory.errors) == KEPT_ERRORS


def test_memory_of_a_newer_version_is_read_for_what_is_known() -> None:
    raw = {
        "errors": [{**_plain(ERROR), "colour": "red"}],
        "steps": [["fetch", "shop.fetch", "", b"\x01", {"colour": "red"}]],
        "metadata": {"customer": "acme"},
        "children": [1],
    }
    known = Memory((ERROR,), (Step("fetch", "shop.fetch", "", b"\x01"),), {"customer": "acme"})
    assert Memory.unpack(encode(raw)) == known
    assert Memory.unpack(encode({"steps": []})) == Memory()


def test_a_claim_of_a_newer_version_is_read_for_what_is_known() -> None:
    claim = Claim.of(b"a large page")
    raw = ["fetch", "f", "", None, {**asdict(claim), "store": "west"}, "more"]
    assert Memory.unpack(encode({"steps": [raw]})).steps == (Step("fetch", "f", "", claim),)


@pytest.mark.parametrize(
    "memory",
    [
        Memory(),
        FULL,
        Memory(steps=STEPS),
        Memory(metadata={"customer": "acme"}),
        FULL.with_error(ERROR),
    ],
    ids=["empty", "all", "steps", "metadata", "errors"],
)
def test_what_is_remembered_is_read_as_it_was_written(memory: Memory) -> None:
    assert Memory.unpack(memory.pack()) == memory
    envelope = replace(TRIGGER, memory=memory)
    assert read(envelope.message()) == envelope


def test_nothing_to_remember_takes_no_byte() -> None:
    assert Memory().pack() == b""
    assert "bt-memory" not in TRIGGER.message().headers


def test_the_size_of_a_memory_is_that_of_steps_and_metadata() -> None:
    memory = replace(FULL, errors=())
    framing = len(encode({"steps": [], "metadata": {}})) - len(encode({}))
    assert len(memory.pack()) - memory.size == framing
    assert memory.with_error(ERROR).size == memory.size
    largest = max(len(step.packed) for step in STEPS)
    with pytest.raises(MemoryFull, match=f"with 'next' .* the largest steps: 'fetch#2' {largest} "):
        memory.check(memory.size - 1, "next")
    memory.check(memory.size, "next")


def _plain(error: AttemptError) -> dict[str, object]:
    return {name: getattr(error, name) for name in AttemptError.__dataclass_fields__}


@pytest.mark.parametrize(
    "raw",
    [
        5,
        [],
        "errors",
        {"errors": 5},
        {"errors": [5]},
        {"errors": [{}]},
        {"errors": [{**_plain(ERROR), "attempt": "1"}]},
        {"errors": [{**_plain(ERROR), "at_ms": LAST_INSTANT_MS + 1}]},
        {"errors": [{**_plain(ERROR), "message": None}]},
        {"steps": 5},
        {"steps": {"fetch": 1}},
        {"steps": [["fetch", "f", ""]]},
        {"steps": [["fetch", "f", "", "text"]]},
        {"steps": [["fetch", "f", "", None]]},
        {"steps": [["fetch", "f", 1, b"\x01"]]},
        {"steps": [[None, "f", "", b"\x01"]]},
        {"steps": [{"key": "fetch"}]},
        {"metadata": 5},
        {"metadata": [["customer", "acme"]]},
    ],
)
def test_damaged_memory_is_undecodable(raw: object) -> None:
    with pytest.raises(EnvelopeError, match="memory is damaged") as caught:
        Memory.unpack(encode(raw))
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("claim", [5, {}, {"sha256": "x", "size": 1}])
def test_a_step_with_a_damaged_claim_is_undecodable(claim: object) -> None:
    with pytest.raises(EnvelopeError, match="claim") as caught:
        Memory.unpack(encode({"steps": [["fetch", "f", "", None, claim]]}))
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"bt-version": 2}, "unsupported_version"),
        ({"bt-version": 0}, "unsupported_version"),
        ({"bt-version": "1"}, "undecodable"),
        ({"bt-memory": 2}, "undecodable"),
        ({"bt-memory": -1}, "undecodable"),
        ({"bt-memory": 0}, "undecodable"),
        ({"bt-attempt": 2**63}, "undecodable"),
        ({"bt-triggered": LAST_INSTANT_MS + 1}, "undecodable"),
        ({"bt-due": 1.5}, "undecodable"),
        ({"bt-expires": "soon"}, "undecodable"),
    ],
)
def test_headers_that_make_no_sense(headers: dict[str, object], reason: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        read(Message(body=b"\xc1", headers=headers))
    assert caught.value.reason == reason


def test_a_size_over_the_limit_is_refused_unread() -> None:
    assert read(Message(body=b"x" * 100), max_bytes=100).payload == b"x" * 100
    memory = b"x" * ((1_048_576 + MAX_ERRORS_BYTES) + 1)
    for body, headers in (
        (b"x" * 121, {}),
        (b"x" * 121, {"bt-memory": 101}),
        (memory, {"bt-memory": 0}),
    ):
        with pytest.raises(EnvelopeError) as caught:
            read(Message(body=body, headers=headers), max_bytes=100)
        assert caught.value.reason == "too_large"


def test_errors_with_their_tracebacks_fit_whatever_the_limit_of_payloads() -> None:
    error = AttemptError(1, "E" * 200, "m" * 2_000, 0, "w" * 80, "t" * MAX_TRACEBACK)
    memory = Memory()
    for _ in range(100):
        memory = memory.with_error(error)
    sent = Envelope(run_id="r", task="t", payload=b"\x01", memory=memory).message()
    assert read(sent, max_bytes=10).memory == memory


def test_headers_of_no_use_are_left_out() -> None:
    envelope = read(
        Message(
            body=b"\x01",
            headers={
                "bt-tags": ["a", 5, "", b"b", "x" * 300, None, {"c": 1}, *"d" * 50],
                "bt-parent": 5,
                "bt-root": "x" * 129,
                "traceparent": ["00-"],
                "tracestate": "x" * 513,
                "baggage": b"a=b",
                "bt-unknown": object(),
            },
            timestamp_ms=-5,
        )
    )
    assert envelope.tags == ("a", "b", "x" * 128, *"d" * 25)
    assert (envelope.parent, envelope.root, envelope.triggered_ms) == (None, None, None)
    assert envelope.trace == {"baggage": "a=b"}


def test_headers_must_fit_one_frame() -> None:
    check_headers({"a": "x" * (MAX_HEADERS_BYTES - 9)})
    with pytest.raises(PayloadTooLarge, match="16385 bytes, the limit is 16384"):
        check_headers({"a": "x" * (MAX_HEADERS_BYTES - 8)})


def test_what_follows_keeps_the_run_and_counts_on() -> None:
    delayed = replace(TRIGGER, due_ms=9_000, left_ms=5, trace={"traceparent": "t"}, seq=4)
    again = delayed.again(attempt=2, now_ms=7_000, memory=Memory((ERROR,)))
    assert again == replace(
        delayed, attempt=2, seq=5, sent_ms=7_000, memory=Memory((ERROR,)), due_ms=None, left_ms=0
    )
    assert again.again(attempt=3, now_ms=8_000).memory == again.memory


@pytest.mark.parametrize("wait", ["retry", "sleep"])
def test_a_message_says_what_the_run_waited_for_and_the_next_one_forgets_it(wait: str) -> None:
    waited = TRIGGER.again(attempt=1, now_ms=7_000, wait=wait)
    message = waited.message()
    assert message.headers["bt-wait"] == wait
    assert read(message) == waited
    after = waited.again(attempt=1, now_ms=8_000)
    assert after.wait is None
    assert "bt-wait" not in after.message().headers


@pytest.mark.parametrize("value", [5, "x" * 129, None, ["sleep"]])
def test_a_wait_that_is_no_text_is_left_out(value: object) -> None:
    message = replace(TRIGGER.message(), headers={"bt-wait": value})
    assert read(message).wait is None


def test_a_redrive_is_a_clean_start_that_remembers_its_origin() -> None:
    dead = replace(
        TRIGGER,
        attempt=5,
        seq=8,
        memory=Memory((ERROR,)),
        expires_ms=1,
        trace={"traceparent": "old"},
        previous="p",
        tags=("t",),
        redrives=1,
    )
    assert dead.redriven(trace={"traceparent": "new"}, now_ms=9_000) == replace(
        TRIGGER,
        seq=9,
        sent_ms=9_000,
        trace={"traceparent": "new"},
        origin="old",
        redrives=2,
        tags=("t",),
    )


@pytest.mark.parametrize(("forget", "kept"), [(False, replace(FULL, errors=())), (True, Memory())])
def test_a_redriven_run_goes_on_behind_its_steps_unless_it_forgets(
    forget: bool, kept: Memory
) -> None:
    dead = replace(TRIGGER, attempt=5, seq=8, memory=FULL, wait="sleep")
    again = dead.redriven(trace={}, now_ms=9_000, forget=forget)
    assert (again.attempt, again.seq, again.wait, again.memory) == (1, 9, None, kept)
    assert read(again.message()).memory == kept


# --- dead letters --------------------------------------------------------------------------------


def test_a_buried_run_is_read_with_its_reason_and_every_error() -> None:
    run = replace(TRIGGER, attempt=2, memory=Memory((ERROR,)), trace={"traceparent": "t"}, seq=2)
    last = replace(ERROR, attempt=2, message="again")
    dead = DeadLetter.read(bury(run, Failed("max_attempts", last), now_ms=5_000), task="a")
    assert (dead.run_id, dead.reason, dead.died_ms, dead.attempts) == (
        "r",
        "max_attempts",
        5_000,
        2,
    )
    assert (dead.errors, dead.error) == ((ERROR, last), last)
    assert (dead.payload, dead.traceparent) == (b"\x01", "t")
    assert dead.envelope is not None
    assert dead.envelope.seq == 3


def test_what_was_never_understood_is_kept_verbatim() -> None:
    message = Message(body=b"\xc1", content_type="x/y", headers={"bt-attempt": "no", "n": {"m": 1}})
    buried = bury_raw(message, Failed("undecodable", ERROR), task="a", now_ms=5_000)
    assert "n" not in buried.headers
    dead = DeadLetter.read(buried, task="a")
    assert (dead.payload, dead.content_type, dead.reason) == (b"\xc1", "x/y", "undecodable")
    assert (dead.run_id, dead.attempts) == (derived_id(message, "a"), 0)
    assert dead.error == ERROR


def test_what_the_broker_buried_has_the_brokers_reason() -> None:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    deaths = [{"reason": "delivery_limit", "time": at}, {"reason": "expired"}]
    message = replace(TRIGGER.message(), headers={"x-death": deaths})
    dead = DeadLetter.read(message, task="a")
    assert (dead.reason, dead.died_ms) == ("delivery_limit", 1_704_067_200_000)


def test_a_dead_letter_of_a_newer_version_can_still_be_seen() -> None:
    newer = bury(TRIGGER, Failed("aborted", ERROR), now_ms=5_000)
    newer = replace(newer, headers={**newer.headers, "bt-version": 2})
    dead = DeadLetter.read(newer, task="a")
    assert (dead.reason, dead.died_ms, dead.envelope) == ("aborted", 5_000, None)


# --- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "name", "told"),
    [
        (Succeeded(b"\x05"), COMPLETED, {"result": b"\x05"}),
        (Retrying(1.5, ERROR), RETRYING, {"error": ERROR, "delay_ms": 1_500}),
        (Failed("aborted", ERROR), FAILED, {"error": ERROR, "reason": "aborted"}),
        (Expired(), EXPIRED, {}),
        (Sleeping(2.5), SLEEPING, {"delay_ms": 2_500}),
    ],
)
def test_an_event_is_read_as_it_was_written(
    outcome: Outcome, name: str, told: dict[str, Any]
) -> None:
    event = event_of(outcome, TRIGGER, at_ms=5_000, worker="w")
    assert event == Event(
        event=name, run_id="r", task="a", attempt=1, at_ms=5_000, worker="w", **told
    )
    assert event is not None
    assert Event.read(event.message()) == event


@pytest.mark.parametrize("outcome", [Early(1), Interrupted(), Repeated()])
def test_nothing_is_told_where_nothing_happened(outcome: Outcome) -> None:
    assert event_of(outcome, TRIGGER, at_ms=5_000, worker="w") is None


EVENT = {"event": "expired", "run_id": "r", "task": "a", "attempt": 1, "at_ms": 5, "worker": "w"}


def test_what_a_newer_version_tells_is_left_out() -> None:
    newer = {**EVENT, "colour": "red", "error": {**_plain(ERROR), "hint": "x"}}
    assert Event.read(Message(body=encode(newer))).error == ERROR


@pytest.mark.parametrize(
    "raw",
    [
        5,
        [],
        "event",
        {},
        {**EVENT, "attempt": "1"},
        {**EVENT, "result": "text"},
        {**EVENT, "error": 5},
        {**EVENT, "worker": None},
        {name: value for name, value in EVENT.items() if name != "task"},
    ],
)
def test_what_is_no_event(raw: object) -> None:
    with pytest.raises(EnvelopeError, match="not an event"):
        Event.read(Message(body=encode(raw)))
