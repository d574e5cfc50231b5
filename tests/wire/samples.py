"""What the golden files of `v1` hold, as values. The files stay as they are: a change is a v2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from brokertask.claim import CLAIM, Claim
from brokertask.deadletter import bury, bury_raw
from brokertask.envelope import Envelope, Message
from brokertask.events import Event
from brokertask.memory import Memory, Step
from brokertask.outcome import AttemptError, Failed

FOLDER: Final = Path(__file__).parent / "v1"
LIMIT: Final = 1_048_576
T0: Final = 1_700_000_000_123

FIRST: Final = AttemptError(1, "ValueError", "zu früh", T0 + 50, "web-1-42-ab12", "Traceback …\n")
SECOND: Final = AttemptError(2, "app.errors.Busy", "429", T0 + 1_100, "web-2-43-cd34")
LAST: Final = AttemptError(3, "TimeoutError", "took longer than 5 s", T0 + 8_000, "web-1-42-ab12")
UNREAD: Final = AttemptError(
    1, "brokertask.errors.EnvelopeError", "not application/msgpack", T0 + 20, "web-1-42-ab12"
)

TRIGGER: Final = Envelope(
    run_id="018bcfe5-687b-7abc-8def-0123456789ab",
    task="process_document",
    # the map of path "a.txt" and pages 3
    payload=b"\x82\xa4path\xa5a.txt\xa5pages\x03",
    triggered_ms=T0,
    sent_ms=T0,
    expires_ms=T0 + 3_600_000,
    tags=("demo", "größe-l"),
    parent="018bcfe5-0000-7000-8000-000000000001",
    root="018bcfe5-0000-7000-8000-000000000000",
    reply_to="bt.reply.0123456789abcdef",
    app_id="documents",
    trace={
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
        "baggage": "user=7",
    },
)
CONTINUATION: Final = replace(
    TRIGGER,
    attempt=3,
    seq=2,
    memory=Memory((FIRST, SECOND)),
    sent_ms=T0 + 1_150,
    due_ms=T0 + 3_150,
    previous="00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
)
DELAYED: Final = Envelope(
    run_id="018bcfe5-687b-7abc-8def-0123456789ac",
    task="remind",
    payload=b"\xc0",
    triggered_ms=T0,
    sent_ms=T0,
    due_ms=T0 + 67_000,
    left_ms=7_000,
)
REDRIVEN: Final = CONTINUATION.redriven(
    trace={"traceparent": "00-11111111111111111111111111111111-2222222222222222-00"},
    now_ms=T0 + 86_400_000,
)
# what the payload and the result of a step are claims for
SCAN: Final = Claim("2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", 3_145_728)
TEXT: Final = Claim("fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9", 70_000)
CLAIMED: Final = replace(
    TRIGGER,
    payload=b"\x82\xa6sha256\xd9\x40" + SCAN.sha256.encode() + b"\xa4size\xce\x00\x30\x00\x00",
    content_type=CLAIM,
    seq=2,
    memory=Memory(
        steps=(
            Step("fetch", "app.fetch", "", TEXT),
            # the number 3
            Step("count", "app.count", "fetch", b"\x03"),
        )
    ),
)
BARE: Final = Envelope(
    run_id="ffc70197-8c94-5110-8248-18ac6a417db5",
    task="process_document",
    payload=b"\x82\xa4path\xa5a.txt\xa5pages\x03",
    id_derived=True,
)
JSON_TRIGGER: Final = Envelope(
    run_id="order-7",
    task="process_document",
    payload=b'{"path": "a.txt", "pages": 3}',
    content_type="application/json",
    triggered_ms=1_700_000_000_000,
    app_id="shop",
)
ENVELOPES: Final[Mapping[str, Envelope]] = {
    "trigger": TRIGGER,
    "continuation": CONTINUATION,
    "delayed": DELAYED,
    "redriven": REDRIVEN,
    "claimed": CLAIMED,
}
FOREIGN: Final[Mapping[str, Envelope]] = {"bare": BARE, "json": JSON_TRIGGER}

COMPLETED: Final = Event(
    event="completed",
    run_id=TRIGGER.run_id,
    task="process_document",
    attempt=3,
    at_ms=T0 + 9_000,
    worker="web-1-42-ab12",
    # the map of sections 2
    result=b"\x81\xa8sections\x02",
)
EVENTS: Final[Mapping[str, Event]] = {
    "event_completed": COMPLETED,
    "event_claimed": replace(COMPLETED, result=None, claim=TEXT),
    "event_retrying": replace(
        COMPLETED, event="retrying", attempt=2, result=None, error=SECOND, delay_ms=2_000
    ),
    "event_failed": replace(
        COMPLETED, event="failed", result=None, error=LAST, reason="max_attempts"
    ),
    "event_expired": replace(COMPLETED, event="expired", attempt=1, result=None),
}

NO_RUN: Final = Message(
    body=b"\xc1 neither msgpack nor anything",
    message_id="legacy-99",
    content_type="application/octet-stream",
    app_id="legacy",
    timestamp_ms=1_700_000_000_000,
    headers={"bt-attempt": "three", "x-trace": {"nested": True}},
)


def written() -> dict[str, Message]:
    """Return every message that this version writes, by the name of its files."""
    return {
        **{name: envelope.message() for name, envelope in ENVELOPES.items()},
        **{name: event.message() for name, event in EVENTS.items()},
        "dead": bury(CONTINUATION, Failed("max_attempts", LAST), now_ms=T0 + 8_010),
        "dead_raw": bury_raw(
            NO_RUN, Failed("undecodable", UNREAD), task="process_document", now_ms=T0 + 20
        ),
    }


@dataclass(frozen=True, slots=True)
class Golden:
    """A message as its two files hold it: `<name>.bin`, the body; `<name>.json`, all the rest."""

    body: bytes
    rest: str

    @staticmethod
    def load(name: str) -> Golden:
        path = FOLDER / name
        return Golden(path.with_suffix(".bin").read_bytes(), path.with_suffix(".json").read_text())

    @staticmethod
    def of(message: Message) -> Golden:
        rest = asdict(message)
        body = rest.pop("body")
        kept = {name: value for name, value in rest.items() if value is not None}
        return Golden(body, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

    @property
    def message(self) -> Message:
        return Message(body=self.body, **json.loads(self.rest))
