"""Messages that fit nowhere: unroutable ones, too many, and what is no run at all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from brokertask.envelope import Message
from brokertask.errors import QueueFull, Unroutable
from brokertask.values import pack
from tests.crash.proxy import Proxy
from tests.crash.stage import SECONDS, Gate, Stage, transport_to

pytestmark = pytest.mark.anyio
MSGPACK = "application/msgpack"


async def test_a_trigger_that_no_queue_takes_is_refused(stage: Stage) -> None:
    await stage.worker()
    with pytest.raises(Unroutable, match="no queue on this broker takes 'misspelt'") as caught:
        await stage.app.client.trigger("misspelt", 1)
    assert not caught.value.unknown
    await stage.check()


async def test_a_full_queue_refuses_triggers_but_not_retries(stage: Stage, gate: Gate) -> None:
    worker = await stage.worker()

    async def fill() -> None:
        for _ in range(50):
            await stage.trigger("bounded", str(gate))

    with pytest.raises(QueueFull, match="at its limit") as caught:
        await fill()
    assert not caught.value.unknown
    taken = len(stage.accepted)
    assert 2 <= taken <= 10, "the limit is 2, and a quorum queue may take some more"
    gate.open()
    for run_id in list(stage.accepted):
        await stage.until_finished(run_id)
        attempts = [entry.attempt for entry in stage.journal.of(run_id, "started")]
        assert attempts == [1, 2], "its retry came through, whatever the intake held"
    await stage.trigger("bounded", str(gate))
    assert worker.alive
    await stage.check()


@dataclass(frozen=True)
class Bad:
    """A body that is no run, and what it is buried with."""

    body: bytes
    reason: str
    properties: Mapping[str, Any] = field(default_factory=dict)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


HOSTILE = {
    "garbage": Bad(b"\xc1\xff\x00garbage", "undecodable"),
    "truncated": Bad(pack({"number": 1})[:-3], "undecodable"),
    "trailing": Bad(b"\x01\x02", "undecodable"),
    "empty": Bad(b"", "undecodable"),
    "100 deep": Bad(nested(100), "too_deep"),
    "100,000 deep": Bad(nested(100_000), "too_deep"),
    "2 MiB": Bad(pack("x" * 2_097_152), "too_large"),
    "a length that lies": Bad(b"\xdd\xff\xff\xff\xff", "undecodable"),
    "an extension type": Bad(b"\xd4\x05\x00", "undecodable"),
    "wrong schema": Bad(pack({"not": "a number"}), "invalid"),
    "bad UTF-8": Bad(b"\xa2\xff\xfe", "undecodable"),
    "newer version": Bad(b"\x01", "unsupported_version", {"headers": {"bt-version": 99}}),
    "version as text": Bad(b"\x01", "undecodable", {"headers": {"bt-version": "two"}}),
    "negative attempt": Bad(b"\x01", "undecodable", {"headers": {"bt-attempt": -1}}),
    "memory out of bounds": Bad(b"\x01", "undecodable", {"headers": {"bt-memory": 999}}),
    "damaged memory": Bad(b"\x01\xc1", "undecodable", {"headers": {"bt-memory": 1}}),
    "triggered in the year 292 million": Bad(
        b"\x01", "undecodable", {"headers": {"bt-triggered": 2**62}}
    ),
    "due in the year 292 million": Bad(
        b"\x01", "undecodable", {"headers": {"bt-due": 2**62, "bt-left": 2**62}}
    ),
    "foreign content type": Bad(b"\x01", "undecodable", {"content_type": "image/png"}),
    "broken JSON": Bad(b'{"a":', "undecodable", {"content_type": "application/json"}),
    "JSON with NaN": Bad(b"NaN", "undecodable", {"content_type": "application/json"}),
}


async def test_a_bad_message_is_buried_at_once_and_the_next_one_runs(stage: Stage) -> None:
    worker = await stage.worker()
    for number, (name, bad) in enumerate(HOSTILE.items()):
        properties = {"content_type": MSGPACK, "message_id": f"bad-{number}", **bad.properties}
        stage.put("quick", bad.body, **properties)
        begun = time.monotonic()
        good = await stage.trigger("quick", number)
        assert await good.result(timeout=SECONDS) == number
        assert time.monotonic() - begun < 1, f"the run after {name!r} was held up"
    dead = {letter.run_id: letter for letter in await stage.until_dead("quick", count=len(HOSTILE))}
    for number, (name, bad) in enumerate(HOSTILE.items()):
        letter = dead[f"bad-{number}"]
        assert letter.reason == bad.reason, name
        assert letter.payload == bad.body or bad.properties, name
        assert letter.attempts <= 1, name
        assert stage.journal.of(f"bad-{number}") == [], name
    assert worker.log.count("CRITICAL") == 0
    assert "a message for quick is no run" in worker.log
    await stage.check()


async def test_foreign_messages_that_mean_well_are_run(stage: Stage) -> None:
    await stage.worker()
    foreign: dict[str, Any] = {
        "x-death": "not a list",
        "bt-tags": [1, {"a": "b"}, "ok"],
        "traceparent": "nonsense",
        "baggage": "k=" + "v" * 20_000,
        "deep": {"a": {"b": {"c": [1, 2, 3]}}},
    }
    stage.put("quick", b"\x01", content_type=MSGPACK)
    stage.put("quick", b"2", content_type="application/json; charset=utf-8")
    stage.put("quick", b"\x03", message_id="x" * 200, content_type=MSGPACK)
    stage.put("quick", b"\x04", message_id="good-4", headers=foreign)
    stage.put("quick", b"\x05", message_id="good-5", timestamp=2**40, reply_to="nobody")
    stage.put("flaky", b"\x01", message_id="good-6", headers=foreign)
    for run_id in ("good-4", "good-5", "good-6"):
        await stage.until_finished(run_id)
    await stage.check()
    assert len(stage.journal.finished()) == 7  # with that of the check


UNREADABLE = {
    "bytes as an id": (b"MARK-IDS", b"\xff\xfe\xfd\xfc\x80\x81\x82\x83", True),
    "nanoseconds": (b"\x00\x00\x00\x00\x12\x34\x56\x78", b"\x7f" + b"\xff" * 7, True),
    "bytes as a header's name": (b"MARKNAME", b"\xff\xfe\xfd\xfc\x80\x81\x82\x83", False),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_properties_that_are_no_text_or_time_do_not_cost_the_connection(
    stage: Stage, name: str
) -> None:
    """They come from languages whose strings are bytes, and clocks that count nanoseconds."""
    marker, replacement, runs = UNREADABLE[name]
    worker = await stage.worker()
    message = Message(
        body=b"\x01",
        message_id="MARK-IDS",
        content_type=MSGPACK,
        timestamp_ms=0x12345678 * 1000,
        headers={"MARKNAME": 1},
    )
    async with Proxy(stage.url) as proxy:
        proxy.tap = lambda passage, way, data: data.replace(marker, replacement)
        publisher = transport_to(proxy.url)
        await publisher.open(timeout=SECONDS)
        await publisher.publish(stage.names.trigger_route("quick"), message, timeout=SECONDS)
        await publisher.close()
    await stage.check()
    assert "lost" not in worker.log
    assert len(stage.journal.finished()) == (2 if runs else 1)
    assert [letter.reason for letter in await stage.dead("quick")] == (
        [] if runs else ["undecodable"]
    )
