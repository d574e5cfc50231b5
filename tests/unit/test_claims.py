"""Claims where they stand: in messages, memories, events and dead letters; and who gives them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from brokertask import (
    App,
    ConfigurationError,
    EnvelopeError,
    PayloadTooLarge,
    PayloadUnavailable,
    Retry,
    Settings,
)
from brokertask.claim import CLAIM, Claim
from brokertask.claims import Claims
from brokertask.deadletter import DeadLetter, bury
from brokertask.envelope import Envelope
from brokertask.events import Event, event_of
from brokertask.memory import Memory, Step
from brokertask.outcome import AttemptError, Failed, Succeeded
from brokertask.payloads import FolderStore
from brokertask.values import MSGPACK, decode, encode

CONTENT = encode("x" * 2_000)
CLAIMED = Claim.of(CONTENT)
RUN = Envelope(run_id="r", task="a", payload=CONTENT).claimed(CLAIMED)
STEP = Step("fetch", "app.fetch", "", CLAIMED)
ERROR = AttemptError(1, "ValueError", "no", 1_700_000_000_000, "host-1-ab")
pytestmark = pytest.mark.anyio


# --- where they stand -----------------------------------------------------------------------------


def test_a_message_with_a_claim_says_so() -> None:
    message = RUN.message()
    assert (message.content_type, message.body) == (CLAIM, CLAIMED.pack())
    assert Envelope.read(message, task="a", max_bytes=1_024).claim() == CLAIMED


def test_a_claim_is_never_taken_for_the_payload() -> None:
    with pytest.raises(EnvelopeError, match="content type"):
        RUN.value()
    assert Envelope(run_id="r", task="a", payload=CLAIMED.pack()).claim() is None


def test_what_follows_a_message_has_its_claim_as_it_was() -> None:
    raw = encode({"size": CLAIMED.size, "sha256": CLAIMED.sha256, "codec": "none"})
    run = replace(RUN, payload=raw, content_type=f"{CLAIM}; v=1")
    memory = Memory((ERROR,))
    again = run.again(attempt=2, now_ms=5, memory=memory).message()
    assert again.body == raw + memory.pack()
    assert again.content_type == f"{CLAIM}; v=1"
    read = Envelope.read(again, task="a", max_bytes=1_024)
    assert (read.claim(), read.memory) == (CLAIMED, memory)


def test_a_claimed_step_is_remembered_in_a_hundred_bytes_or_so() -> None:
    memory = Memory(steps=(STEP, Step("parse", "app.parse", "fetch", b"\x01")))
    assert Memory.unpack(memory.pack()) == memory
    assert len(STEP.packed) < 150


def test_who_knows_no_claims_cannot_take_one_for_a_result() -> None:
    key, function, after, result, claim = decode(STEP.packed, MSGPACK)
    assert (key, function, after, result) == ("fetch", "app.fetch", "", None)
    assert Claim.read(claim) == CLAIMED
    event = event_of(Succeeded(b"", CLAIMED), RUN, at_ms=1, worker="w")
    assert event is not None
    assert "result" not in decode(event.message().body, MSGPACK)


@pytest.mark.parametrize(
    "step",
    [
        ["fetch", "app.fetch", "", None],
        ["fetch", "app.fetch", "", None, None],
        ["fetch", "app.fetch", "", None, CLAIMED.pack()],
        ["fetch", "app.fetch", "", None, {"sha256": "../../etc/passwd", "size": 1}],
        ["fetch", "app.fetch", "", None, {"sha256": CLAIMED.sha256, "size": -1}],
    ],
)
def test_a_step_with_no_claim_at_all_is_undecodable(step: list[object]) -> None:
    with pytest.raises(EnvelopeError) as caught:
        Memory.unpack(encode({"steps": [step]}))
    assert caught.value.reason == "undecodable"


def test_an_event_tells_of_a_claim() -> None:
    event = event_of(Succeeded(b"", CLAIMED), RUN, at_ms=1, worker="w")
    assert event is not None
    assert (event.result, event.claim) == (None, CLAIMED)
    assert Event.read(event.message()) == event


def test_an_event_with_no_claim_at_all_is_refused() -> None:
    event = event_of(Succeeded(b"\x01"), RUN, at_ms=1, worker="w")
    assert event is not None
    message = event.message()
    raw = decode(message.body, MSGPACK) | {"claim": {"sha256": "../x", "size": 1}}
    with pytest.raises(EnvelopeError, match="sha256 of a claim"):
        Event.read(replace(message, body=encode(raw)))


def test_a_dead_letter_has_its_claim_and_is_redriven_with_it() -> None:
    letter = DeadLetter.read(bury(RUN, Failed("aborted", ERROR), now_ms=1), task="a")
    assert letter.claim == CLAIMED
    assert letter.redriven(trace={}, now_ms=2).claim() == CLAIMED
    edited = letter.redriven(trace={}, now_ms=2, payload=b"\x01")
    assert (edited.claim(), edited.value()) == (None, 1)


def test_a_dead_letter_with_no_claim_at_all_is_not_redriven_as_it_is() -> None:
    run = replace(RUN, payload=b"\x01")
    letter = DeadLetter.read(bury(run, Failed("undecodable", ERROR), now_ms=1), task="a")
    assert letter.claim is None
    with pytest.raises(EnvelopeError, match="a claim is a map"):
        letter.redriven(trace={}, now_ms=2)
    assert letter.redriven(trace={}, now_ms=2, payload=b"\x01").value() == 1


# --- who gives them -------------------------------------------------------------------------------


async def test_claims_are_for_what_is_large_and_lead_back_to_it(tmp_path: Path) -> None:
    claims = Claims(f"file://{tmp_path}/", above=1_000)
    assert await claims.put(b"x" * 1_000) is None
    assert await claims.put(CONTENT) == CLAIMED
    assert await claims.get(CLAIMED) == CONTENT
    assert claims.where(CLAIMED) == f"file://{tmp_path}/{CLAIMED.key}"


async def test_several_are_given_in_their_order_and_equal_content_is_put_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[int] = []
    put = FolderStore.put

    async def counted(store: FolderStore, data: bytes) -> Claim:
        puts.append(len(data))
        return await put(store, data)

    monkeypatch.setattr(FolderStore, "put", counted)
    claims = Claims(f"file://{tmp_path}", above=10)
    contents = [b"a" * 20, b"small", b"b" * 30, b"a" * 20]
    assert await claims.put_all(contents) == [
        Claim.of(b"a" * 20),
        None,
        Claim.of(b"b" * 30),
        Claim.of(b"a" * 20),
    ]
    assert sorted(puts) == [20, 30]
    assert await claims.put_all([]) == []


async def test_without_a_store_everything_stays_and_nothing_is_fetched() -> None:
    claims = Claims()
    assert await claims.put(bytes(10_000_000)) is None
    assert claims.where(CLAIMED) is None
    with pytest.raises(PayloadUnavailable, match="set BROKERTASK_PAYLOAD_STORE"):
        await claims.get(CLAIMED)


def test_an_app_takes_what_is_over_either_limit() -> None:
    store = "file:///srv/payloads"
    app = App("one", settings=Settings(payload_store=store))
    assert (app.client.claims.takes(65_536), app.client.claims.takes(65_537)) == (False, True)
    narrow = Settings(payload_store=store, max_payload_bytes=2_000)
    assert App("two", settings=narrow).client.claims.takes(2_001)
    app = App("three", settings=Settings(max_payload_bytes=2_000))
    assert not app.client.claims.takes(2_001)
    with pytest.raises(PayloadTooLarge, match="BROKERTASK_PAYLOAD_STORE"):
        app.client.encode("x" * 2_000)


@pytest.mark.parametrize(
    "url",
    ["payloads", "/srv/payloads", "file://payloads", "https://k:pw@host/x", "s3://", "s3://A"],
)
def test_a_store_that_is_none_is_refused_without_repeating_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(payload_store=url)
    monkeypatch.setenv("BROKERTASK_PAYLOAD_STORE", url)
    with pytest.raises(ConfigurationError, match="BROKERTASK_PAYLOAD_STORE") as caught:
        App("one")
    assert "k:pw" not in str(refused.value) + str(caught.value)


async def test_what_a_store_needs_is_missed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    app = App("one", settings=Settings(amqp_url="memory:", payload_store="s3://bucket/prefix"))

    @app.task
    async def work() -> None: ...

    with pytest.raises(ConfigurationError, match=r"brokertask\[s3\]"):
        app.worker()
    with pytest.raises(ConfigurationError, match=r"brokertask\[s3\]"):
        await work.trigger()


# --- what a failing store does to a run -----------------------------------------------------------


@pytest.mark.parametrize("retry", [Retry(), Retry(on=ValueError), Retry(on=())])
def test_an_unavailable_payload_is_retried_whatever_the_task_retries(retry: Retry) -> None:
    error = PayloadUnavailable("away")
    assert retry.decide(1, error).delay is not None
    last = retry.decide(3, error)
    assert (last.delay, last.reason) == (None, "max_attempts")


def test_a_task_may_give_up_on_an_unavailable_payload() -> None:
    decision = Retry(never_on=PayloadUnavailable).decide(1, PayloadUnavailable("away"))
    assert (decision.delay, decision.reason) == (None, "never_retried")
