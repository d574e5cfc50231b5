"""Publishers and listeners that are not brokertask: npm's amqplib, and Debian's amqp-publish.

Whatever they send is run or buried, and what comes next runs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import msgpack
import pytest
from pydantic import BaseModel

from brokertask import App, Context, Event, Settings
from brokertask.envelope import Message, derived_id

pytestmark = pytest.mark.anyio

HERE: Final = Path(__file__).parent
SECONDS: Final = 20.0
"""How long a test waits for what must happen; only a failing test takes that long."""
REPORT: Final[dict[str, Any]] = {"title": "Überschrift 📄", "pages": 3}
GOOD: Final = "good"
INT64_MAX: Final = 2**63 - 1


class Report(BaseModel):
    title: str
    pages: int


class Rich(BaseModel):
    at: datetime
    before: datetime
    largest: int
    smallest: int
    number: int
    fraction: float
    bytes: bytes
    nothing: None
    missing: str | None
    list: list[Any]


def typed(kind: str, value: object) -> dict[str, object]:
    """A header's value whose type on the wire amqplib would not guess."""
    return {"!": kind, "value": value}


def nested(depth: int) -> object:
    value: object = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


@pytest.fixture(scope="session")
def modules() -> Path:
    """The folder of the npm packages, installed once for every run of the tests."""
    wanted = [HERE / "package.json", HERE / "package-lock.json"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in wanted)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brokertask-tests"
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / digest).exists():
        with TemporaryDirectory(dir=cache) as temporary:
            folder = Path(temporary, digest)
            folder.mkdir()
            for file in wanted:
                shutil.copy(file, folder)
            npm("ci", "--no-audit", "--no-fund", "--ignore-scripts", folder=folder)
            with suppress(OSError):  # another run was faster
                folder.rename(cache / digest)
    return cache / digest / "node_modules"


def npm(*arguments: str, folder: Path) -> None:
    try:
        subprocess.run(
            ["npm", *arguments], cwd=folder, check=True, text=True, capture_output=True, timeout=100
        )
    except subprocess.CalledProcessError as error:
        pytest.fail(f"npm {arguments[0]} failed:\n{error.stderr}{error.stdout}", pytrace=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"npm does not run, try `make tools`: {error}", pytrace=False)


@dataclass
class Noted:
    """What tasks were told of their runs."""

    received: dict[str, list[object]] = field(default_factory=dict)
    attempts: set[int] = field(default_factory=set)

    def note(self, context: Context) -> None:
        self.received.setdefault(context.run_id, []).append(context.payload)
        self.attempts.add(context.attempt)


@dataclass
class Stage:
    """A worker at work, the programs that trigger it, and what became of what they sent."""

    app: App
    url: str
    modules: Path
    events: AsyncIterator[Event]
    received: Mapping[str, list[object]]
    """What tasks were given, by run."""

    async def publish(self, *messages: Mapping[str, Any]) -> None:
        """Publish with amqplib; returns when they are confirmed."""
        text = json.dumps(messages).encode()
        await self._run("node", str(HERE / "foreign.js"), "publish", self.url, stdin=text)

    async def amqp_publish(self, body: bytes, *arguments: str | bytes, key: str) -> None:
        """Publish with amqp-publish; there is no confirm."""
        await self._run(
            "amqp-publish",
            f"--url={self.url}",
            "--exchange=bt.tasks",
            f"--routing-key={key}",
            *arguments,
            stdin=body,
        )

    async def ended(self, count: int) -> list[Event]:
        """Return the last events of the next so many runs."""
        ended: list[Event] = []
        try:
            async with asyncio.timeout(SECONDS):
                while len(ended) < count:
                    event = await anext(self.events)
                    if event.event != "retrying":
                        ended.append(event)
        except TimeoutError:
            pytest.fail(f"{len(ended)} of {count} runs ended: {outcomes(ended)}")
        return ended

    async def buried(self) -> int:
        transport = self.app.connect()
        try:
            await transport.open(timeout=SECONDS)
            depth = await transport.depth("bt.dead.file_report")
            return depth.ready if depth else 0
        finally:
            await transport.close()

    async def survives(self, *hostile: Any) -> dict[str, str]:
        """Return what became of these messages; a good one behind each must run."""
        await self.publish(*(each for bad in hostile for each in (bad, message(messageId=GOOD))))
        ended = await self.ended(2 * len(hostile))
        good = [event.event for event in ended if event.run_id == GOOD]
        assert good == ["completed"] * len(hostile)
        return outcomes([event for event in ended if event.run_id != GOOD])

    async def listener(self, key: str) -> asyncio.subprocess.Process:
        """Return a program that is listening for the first event with that key."""
        listener = await asyncio.create_subprocess_exec(
            "node",
            str(HERE / "foreign.js"),
            "listen",
            self.url,
            key,
            stdout=PIPE,
            env={**os.environ, "NODE_PATH": str(self.modules)},
        )
        assert listener.stdout is not None
        async with asyncio.timeout(SECONDS):
            assert await listener.stdout.readline() == b"ready\n"
        return listener

    async def _run(self, *command: str | bytes, stdin: bytes) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env={**os.environ, "NODE_PATH": str(self.modules)},
            )
        except FileNotFoundError as error:
            pytest.fail(f"try `make tools`: {error}", pytrace=False)
        async with asyncio.timeout(SECONDS):
            said, failed = await process.communicate(stdin)
        assert process.returncode == 0, (said + failed).decode()


@pytest.fixture
async def stage(
    amqp_url: str, modules: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Stage]:
    app = App("wire", settings=Settings(amqp_url=amqp_url))

    noted = Noted()

    # One at a time: a message that is never settled would stop the next.
    @app.task(concurrency=1)
    async def file_report(report: Report, ctx: Context) -> Report:
        noted.note(ctx)
        return report

    @app.task
    async def keep(rich: Rich, ctx: Context) -> None:
        noted.note(ctx)

    async with app, app.worker(), app.client.events() as events:
        yield Stage(app, amqp_url, modules, events, noted.received)
    defects = [record.message for record in caplog.records if record.levelno >= logging.CRITICAL]
    assert defects == []
    assert noted.attempts <= {1}


def message(payload: object = "report", key: str = "file_report", **properties: object) -> Any:
    return {"key": key, "payload": payload, "properties": properties}


def outcome(event: Event) -> str:
    return event.reason or event.event


def outcomes(events: list[Event]) -> dict[str, str]:
    return {event.run_id: outcome(event) for event in events}


def pack(value: object) -> bytes:
    return cast("bytes", msgpack.packb(value))


def derived(task: str) -> str:
    """The run id of a bare report."""
    return derived_id(Message(body=pack(REPORT)), task)


# --- what others send -----------------------------------------------------------------------------


async def test_a_bare_msgpack_payload_is_a_trigger(stage: Stage) -> None:
    await stage.publish(message(), message())
    first, second = await stage.ended(2)
    # Two triggers that are equal in every byte share their derived id, and are two runs.
    assert first.run_id == second.run_id
    assert [first.event, second.event] == ["completed", "completed"]
    assert stage.received == {first.run_id: [Report(**REPORT), Report(**REPORT)]}


async def test_a_message_id_is_the_run_id(stage: Stage) -> None:
    await stage.publish(message(messageId="order-7"))
    (ended,) = await stage.ended(1)
    assert outcomes([ended]) == {"order-7": "completed"}
    assert stage.received == {"order-7": [Report(**REPORT)]}
    assert msgpack.unpackb(ended.result or b"") == REPORT


async def test_json_is_taken_when_it_says_so(stage: Stage) -> None:
    await stage.publish(
        message({"json": REPORT}, messageId="json", contentType="application/json"),
        message({"json": REPORT}, messageId="more", contentType="Application/JSON; charset=utf-8"),
        message({"json": REPORT}, messageId="none"),
    )
    assert outcomes(await stage.ended(3)) == {
        "json": "completed",
        "more": "completed",
        "none": "undecodable",
    }
    assert stage.received == {"json": [Report(**REPORT)], "more": [Report(**REPORT)]}


async def test_dates_and_large_numbers_of_javascript_arrive_as_they_were(stage: Stage) -> None:
    await stage.publish(message("rich", "keep", messageId="rich"))
    assert outcomes(await stage.ended(1)) == {"rich": "completed"}
    assert stage.received["rich"] == [
        Rich(
            at=datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC),
            before=datetime(1969, 7, 20, 20, 17, 40, 0, UTC),
            largest=2**64 - 1,
            smallest=-(2**63),
            number=2**40,
            fraction=0.1,
            bytes=b"\x00\x80\xff",
            nothing=None,
            missing=None,
            list=[1, "two", [True]],
        )
    ]


async def test_amqp_publish_needs_no_header_at_all(stage: Stage) -> None:
    await stage.amqp_publish(pack(REPORT), key="file_report")
    (ended,) = await stage.ended(1)
    assert ended.event == "completed"
    assert ended.run_id == derived("file_report")
    assert stage.received == {ended.run_id: [Report(**REPORT)]}


async def test_another_language_reads_events(stage: Stage) -> None:
    listener = await stage.listener("completed.*")
    try:
        await stage.publish(message(messageId="heard"))
        async with asyncio.timeout(SECONDS):
            said, _ = await listener.communicate()
    finally:
        with suppress(ProcessLookupError):
            listener.kill()
    heard = json.loads(said)
    assert heard["key"] == "completed.file_report"
    assert heard["properties"] == {
        "contentType": "application/msgpack",
        "correlationId": "heard",
        "type": "completed",
    }
    event = heard["event"]
    assert abs(datetime.now(UTC).timestamp() - event.pop("at_ms") / 1000) < 60
    assert isinstance(event.pop("worker"), str)
    assert event == {
        "event": "completed",
        "run_id": "heard",
        "task": "file_report",
        "attempt": 1,
        "result": REPORT,
    }


# --- what enemies send ----------------------------------------------------------------------------

NUMBERS: Final = [
    *("bt-version", "bt-attempt", "bt-seq", "bt-memory", "bt-triggered", "bt-sent", "bt-due"),
    *("bt-left", "bt-expires", "bt-derived", "bt-redrives"),
]
TEXTS: Final = [
    *("bt-tags", "bt-parent", "bt-root", "bt-previous", "bt-origin", "bt-raw", "bt-reason"),
    *("bt-died", "traceparent", "tracestate", "baggage"),
]
WRONG: Final[list[object]] = [
    "x",
    "x" * 60_000,
    {"a": [1, {"b": None}]},
    [1, "a", [2]],
    1.5,
    typed("decimal", {"places": 2, "digits": 5}),
    -1,
    typed("int64", str(INT64_MAX)),
]


async def test_our_headers_with_values_of_a_wrong_type(stage: Stage) -> None:
    for wrong in WRONG:
        hostile = [message(messageId=name, headers={name: wrong}) for name in NUMBERS + TEXTS]
        assert await stage.survives(*hostile) == {
            **dict.fromkeys(NUMBERS, "undecodable"),
            **dict.fromkeys(TEXTS, "completed"),
        }
    assert await stage.buried() == len(WRONG) * len(NUMBERS)


FORGED: Final[Mapping[str, tuple[str, Mapping[str, object]]]] = {
    "a 60 kB header": ("completed", {"x": "y" * 60_000}),
    "2,500 headers": ("completed", {f"x{number}": "y" for number in range(2_500)}),
    "60 kB of tags": ("completed", {"bt-tags": ["y" * 1_500] * 40}),
    "nested 300 deep": ("completed", {"x": nested(300)}),
    "x-death of no list": ("completed", {"x-death": "no", "x-first-death-queue": 7}),
    "x-death of nonsense": ("completed", {"x-death": [{"count": "many", "time": 1, "queue": []}]}),
    "CC to nowhere": ("completed", {"CC": ["nowhere"], "BCC": ["nowhere"]}),
    "CC to the same queue": ("completed", {"CC": ["file_report"]}),
    "lost deliveries of no number": ("completed", {"x-delivery-count": "many"}),
    "too many lost deliveries": ("crashed", {"x-delivery-count": 1_000}),
    "all of the body is memory": ("undecodable", {"bt-memory": 0}),
    "memory behind the body": ("undecodable", {"bt-memory": 10**6}),
    "a newer version": ("unsupported_version", {"bt-version": 2}),
    "expired": ("expired", {"bt-expires": 1}),
    "due in 9999, by a clock that is wrong": ("completed", {"bt-due": 253e12, "bt-left": 1}),
    "too many attempts": ("crashed", {"bt-attempt": 253e12}),
}


async def test_forged_headers(stage: Stage) -> None:
    hostile = [message(messageId=name, headers=headers) for name, (_, headers) in FORGED.items()]
    expected = {name: ends for name, (ends, _) in FORGED.items()}
    assert await stage.survives(*hostile) == expected
    alive = ("completed", "expired")
    assert await stage.buried() == sum(ends not in alive for ends in expected.values())


@pytest.mark.parametrize(("count", "expected"), [(-5, "completed"), (INT64_MAX, "crashed")])
async def test_a_count_of_lost_deliveries_that_cannot_be(
    stage: Stage, count: int, expected: str
) -> None:
    headers = {"x-delivery-count": typed("int64", str(count))}
    assert await stage.survives(message(messageId="x", headers=headers)) == {"x": expected}


async def test_odd_properties(stage: Stage) -> None:
    assert await stage.survives(
        message(messageId="milliseconds", timestamp=1_767_225_600_123),
        message(messageId="texts", replyTo="é" * 127, correlationId="#" * 255, appId="x" * 255),
        message(messageId="another", type="another", userId="guest", expiration="60000"),
        message(messageId="encoding", contentEncoding="gzip"),
        message(messageId="content type", contentType="x" * 255),
    ) == {
        "milliseconds": "completed",
        "texts": "completed",
        "another": "completed",
        "encoding": "completed",
        "content type": "undecodable",
    }


async def test_memory_that_is_none(stage: Stage) -> None:
    payload = pack(REPORT)
    memories = [[], {"errors": 7}, {"errors": [7]}, {"errors": [{"attempt": "x"}]}, {"errors": 9e9}]
    hostile = [
        message(
            {"base64": base64.b64encode(payload + pack(memory)).decode()},
            messageId=repr(memory),
            headers={"bt-memory": len(payload)},
        )
        for memory in memories
    ]
    assert await stage.survives(*hostile) == dict.fromkeys(map(repr, memories), "undecodable")


# --- what RabbitMQ takes and delivers, and pamqp does not read ------------------------------------


async def test_dates_after_9999(stage: Stage) -> None:
    assert await stage.survives(
        message(messageId="property", timestamp=1_767_225_600_123_456),
        message(messageId="header", headers={"x": typed("timestamp", 2**60)}),
    ) == {"property": "completed", "header": "undecodable"}


async def test_headers_nested_without_end(stage: Stage) -> None:
    hostile = message(messageId="deep", headers={"x": nested(600)})
    # Whether pamqp can read it depends on the recursion limit of the interpreter, and its stack.
    (fate,) = (await stage.survives(hostile)).values()
    assert fate in ("undecodable", "completed")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (b"--header=x: \xff\xfe", "completed"),
        (b"--header=\xff\xfe: x", "undecodable"),
        (b"--reply-to=\xff\xfe", "completed"),
        (b"--content-type=\xff\xfe", "undecodable"),
    ],
    ids=["value", "name", "reply-to", "content-type"],
)
async def test_text_that_is_not_utf_8(stage: Stage, argument: bytes, expected: str) -> None:
    await stage.amqp_publish(pack(REPORT), argument, key="file_report")
    await stage.publish(message(messageId=GOOD))
    first, second = await stage.ended(2)
    assert outcome(first) == expected
    assert outcomes([second]) == {GOOD: "completed"}
