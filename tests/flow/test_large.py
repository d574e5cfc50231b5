"""Payloads and results too large for a message: claims in their place, content in the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from brokertask import (
    App,
    BrokertaskError,
    Context,
    InvalidPayload,
    PayloadTooLarge,
    PayloadUnavailable,
    ResultTimeout,
    ResultUnavailable,
    Retry,
    RunFailed,
    Settings,
)
from brokertask.claim import CLAIM, Claim
from brokertask.deadletters import Selection
from brokertask.envelope import Envelope, Message
from brokertask.events import Event
from brokertask.payloads import FolderStore, open_store
from brokertask.testing import Harness
from brokertask.transport.memory import MemoryTransport
from brokertask.values import encode
from tests.flow.commandline import Place, place
from tests.flow.graveyard import NAMES, dead, graveyard, put, trigger, until_dead

pytestmark = pytest.mark.anyio

LARGE = "a scan of three megabytes " * 120_000
MEDIUM = "x" * 200_000
ABOVE = 65_536
TWICE = Retry(max_attempts=2, min_delay=1, jitter=False)


@dataclass(slots=True)
class Traffic:
    """What was asked of every store, by claim."""

    put: list[Claim]
    got: list[Claim]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    seen = Traffic([], [])
    put, get = FolderStore.put, FolderStore.get

    async def counted_put(store: FolderStore, data: bytes) -> Claim:
        seen.put.append(await put(store, data))
        return seen.put[-1]

    async def counted_get(store: FolderStore, claim: Claim) -> bytes:
        seen.got.append(claim)
        return await get(store, claim)

    monkeypatch.setattr(FolderStore, "put", counted_put)
    monkeypatch.setattr(FolderStore, "get", counted_get)
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "payloads"


@pytest.fixture
def app(folder: Path) -> App:
    return App("flow", settings=Settings(amqp_url="memory:", payload_store=f"file://{folder}"))


def breaks(folder: Path, content: bytes) -> None:
    """Have the store refuse this content: where its folder should be is a file."""
    path = (folder / Claim.of(content).key).parent
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


def spoils(folder: Path) -> None:
    """Have the store refuse everything."""
    folder.write_bytes(b"")


def loses(folder: Path, content: bytes) -> None:
    (folder / Claim.of(content).key).unlink()


def stored(folder: Path) -> int:
    return len([path for path in folder.rglob("*") if path.is_file()])


async def send(harness: Harness, task: str, message: Message) -> None:
    """Publish what a publisher of another kind might."""
    transport = MemoryTransport(harness.broker)
    await transport.open(timeout=1)
    await transport.publish(NAMES.trigger_route(task), message, timeout=1)
    await transport.close()


def claimed(task: str, content: bytes) -> Message:
    envelope = Envelope(run_id="run-1", task=task, payload=b"")
    return envelope.claimed(Claim.of(content)).message()


# --- payloads -------------------------------------------------------------------------------------


async def test_a_large_payload_leaves_its_message_and_reaches_its_task(
    app: App, folder: Path
) -> None:
    @app.task
    async def count(text: str) -> int:
        return len(text)

    async with Harness(app) as harness:
        run = await count.trigger(LARGE, delay=1)
        (message,) = harness.broker.messages(NAMES.rung(1000))
        assert (message.content_type, len(message.body) < 120) == (CLAIM, True)
        assert Claim.unpack(message.body) == Claim.of(encode(LARGE))
        await harness.drain()
        assert await run.result(timeout=1) == len(LARGE)
        assert stored(folder) == 1


async def test_what_fits_stays_in_its_message(app: App, folder: Path) -> None:
    @app.task
    async def echo(data: bytes) -> bytes:
        return data

    async with Harness(app) as harness:
        # As msgpack, it has three bytes more.
        fitting = b"x" * (ABOVE - 3)
        run = await echo.trigger(fitting)
        await harness.drain()
        assert await run.result(timeout=1) == fitting
        assert stored(folder) == 0
        await echo.trigger(fitting + b"x")
        assert stored(folder) == 1


async def test_what_is_over_the_limit_of_a_message_leaves_it_in_any_case(folder: Path) -> None:
    settings = Settings(
        amqp_url="memory:",
        payload_store=f"file://{folder}",
        claim_above_bytes=1_000_000,
        max_payload_bytes=100_000,
    )
    app = App("flow", settings=settings)

    @app.task
    async def echo(text: str) -> str:
        return text

    async with Harness(app) as harness:
        run = await echo.trigger(MEDIUM)
        await harness.drain()
        assert await run.result(timeout=1) == MEDIUM
        assert stored(folder) == 1


async def test_without_a_store_the_limit_says_that_there_could_be_one() -> None:
    app = App("flow", settings=Settings(amqp_url="memory:"))

    @app.task
    async def take(text: str) -> None: ...

    with pytest.raises(PayloadTooLarge, match="BROKERTASK_PAYLOAD_STORE"):
        await take.trigger(LARGE)


async def test_a_claim_stays_as_it_is_through_retry_sleep_death_and_redrive(
    app: App, traffic: Traffic
) -> None:
    attempts: list[int] = []

    @app.task(retry=TWICE)
    async def stubborn(text: str, ctx: Context) -> int:
        await ctx.sleep("1h")
        attempts.append(ctx.attempt)
        if len(attempts) < 3:
            raise ConnectionError
        return len(text)

    async with Harness(app) as harness:
        run = await stubborn.trigger(LARGE)
        await harness.drain()
        (letter,) = harness.dead_letters("stubborn")
        claim = Claim.of(encode(LARGE))
        assert letter.claim == claim
        assert (letter.payload, letter.content_type) == (claim.pack(), CLAIM)
        await redrive(harness, "stubborn")
        await harness.drain()
        assert harness[run].result == len(LARGE)
        assert attempts == [1, 2, 1]
        # Each time that it started anew: two attempts and a sleep, and once more after its death.
        assert (len(traffic.put), len(traffic.got)) == (1, 4)


async def redrive(harness: Harness, task: str, payload: bytes | None = None) -> None:
    transport = MemoryTransport(harness.broker)
    await transport.open(timeout=1)
    settings, claims = harness.app.settings, harness.app.client.claims
    async with Selection.open(transport, settings, [task], claims=claims) as selection:
        assert [result.status async for result in selection.redrive(payload=payload)] == [
            "redriven"
        ]
    await transport.close()


async def test_a_payload_given_at_the_redrive_is_put_like_any_other(app: App, folder: Path) -> None:
    @app.task(retry=Retry(max_attempts=1))
    async def picky(text: str) -> int:
        if "scan" not in text:
            raise ValueError
        return len(text)

    async with Harness(app) as harness:
        run = await picky.trigger("short")
        await harness.drain()
        await redrive(harness, "picky", app.client.encode(LARGE))
        await harness.drain()
        assert harness[run].result == len(LARGE)
        assert stored(folder) == 1


async def test_equal_payloads_of_many_runs_are_put_once(app: App, traffic: Traffic) -> None:
    @app.task
    async def take(text: str) -> None: ...

    async with Harness(app) as harness:
        await take.trigger_many([LARGE, "small", LARGE, MEDIUM, LARGE])
        assert sorted(claim.size for claim in traffic.put) == [
            len(encode(MEDIUM)),
            len(encode(LARGE)),
        ]
        await harness.drain()
        assert [record.status for record in harness.runs.values()] == ["completed"] * 5


async def test_if_the_store_refuses_nothing_is_sent(app: App, folder: Path) -> None:
    @app.task
    async def take(text: str) -> None: ...

    async with Harness(app) as harness:
        breaks(folder, encode(LARGE))
        with pytest.raises(PayloadUnavailable, match="mend the folder"):
            await take.trigger(LARGE)
        with pytest.raises(PayloadUnavailable, match="mend the folder"):
            await take.trigger_many([MEDIUM, "small", LARGE])
        await harness.drain()
        assert harness.runs == {}


async def test_what_cannot_be_sent_is_not_put(app: App, folder: Path) -> None:
    @app.task
    async def take(texts: list[str]) -> None: ...

    async with Harness(app):
        with pytest.raises(InvalidPayload):
            await take.trigger([LARGE, 5])  # type: ignore[list-item]
        with pytest.raises(BrokertaskError):
            await take.trigger([LARGE], tags=["x"] * 1_000)
        assert stored(folder) == 0


async def test_content_that_is_gone_is_asked_for_at_each_attempt(app: App, folder: Path) -> None:
    @app.task(retry=Retry(max_attempts=3, on=ValueError))
    async def count(text: str) -> int:
        return len(text)

    failures: list[BaseException] = []

    @count.on_failure
    async def hear(ctx: Context, error: BaseException) -> None:
        failures.append(error)

    async with Harness(app) as harness:
        run = await count.trigger(LARGE, delay=1)
        loses(folder, encode(LARGE))
        await harness.drain()
        (letter,) = harness.dead_letters("count")
        assert (letter.reason, letter.attempts) == ("max_attempts", 3)
        assert {error.type for error in letter.errors} == {"PayloadUnavailable"}
        assert [type(error) for error in failures] == [PayloadUnavailable]
        await open_store(f"file://{folder}").put(encode(LARGE))
        await redrive(harness, "count")
        await harness.drain()
        assert harness[run].result == len(LARGE)


async def test_content_that_comes_back_in_time_is_all_a_run_needs(app: App, folder: Path) -> None:
    @app.task(retry=Retry(max_attempts=2, min_delay=60, jitter=False, on=ValueError))
    async def count(text: str) -> int:
        return len(text)

    async with Harness(app) as harness:
        run = await count.trigger(LARGE, delay=1)
        loses(folder, encode(LARGE))
        await harness.advance(30)
        assert harness[run].status == "retrying"
        await open_store(f"file://{folder}").put(encode(LARGE))
        await harness.drain()
        assert await run.result(timeout=1) == len(LARGE)


async def test_never_on_has_the_last_word(app: App, folder: Path) -> None:
    @app.task(retry=Retry(max_attempts=3, never_on=PayloadUnavailable))
    async def count(text: str) -> None: ...

    async with Harness(app) as harness:
        run = await count.trigger(LARGE, delay=1)
        loses(folder, encode(LARGE))
        await harness.drain()
        assert (harness[run].reason, harness[run].attempts) == ("never_retried", 1)


async def test_a_worker_without_a_store_says_which_setting_is_missing() -> None:
    app = App("flow", settings=Settings(amqp_url="memory:"))

    @app.task(retry=TWICE)
    async def count(text: str) -> None: ...

    async with Harness(app) as harness:
        await send(harness, "count", claimed("count", encode(LARGE)))
        await harness.drain()
        (letter,) = harness.dead_letters("count")
        assert (letter.reason, letter.attempts) == ("max_attempts", 2)
        assert letter.error is not None
        assert letter.error.type == "PayloadUnavailable"
        assert "BROKERTASK_PAYLOAD_STORE" in letter.error.message


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode("a.txt"),
        encode({"size": 5}),
        encode({"sha256": "../../../etc/passwd", "size": 5}),
        encode({"sha256": "ab" * 32, "size": 2**40}),
        encode({"sha256": "ab" * 32, "size": 5}) + b"\xc0",
    ],
)
async def test_a_claim_that_is_none_is_buried_at_once(
    app: App, payload: bytes, traffic: Traffic
) -> None:
    @app.task
    async def count(text: str) -> None: ...

    async with Harness(app) as harness:
        message = Message(body=payload, message_id="run-1", content_type=f"{CLAIM.upper()}; v=1")
        await send(harness, "count", message)
        await harness.drain()
        (letter,) = harness.dead_letters("count")
        assert (letter.reason, letter.attempts, letter.claim) == ("undecodable", 1, None)
        assert letter.payload == payload
        assert traffic.got == []


async def test_content_that_is_not_msgpack_is_buried_at_once(app: App, folder: Path) -> None:
    @app.task
    async def count(text: str) -> None: ...

    async with Harness(app) as harness:
        await open_store(f"file://{folder}").put(b"\xc1 no msgpack")
        await send(harness, "count", claimed("count", b"\xc1 no msgpack"))
        await harness.drain()
        assert [letter.reason for letter in harness.dead_letters("count")] == ["undecodable"]


async def test_to_fetch_is_part_of_the_attempt_and_of_its_timeout(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(timeout=0.05, retry=TWICE)
    async def count(text: str) -> int:
        return len(text)

    get = FolderStore.get
    asked: list[Claim] = []

    async def slow_at_first(store: FolderStore, claim: Claim) -> bytes:
        asked.append(claim)
        return await (get(store, claim) if len(asked) > 1 else asyncio.Future())

    monkeypatch.setattr(FolderStore, "get", slow_at_first)
    async with Harness(app) as harness:
        run = await count.trigger(MEDIUM)
        await harness.drain()
        assert [error.type for error in harness[run].errors] == ["TimeoutError"]
        assert await run.result(timeout=1) == len(MEDIUM)


# --- results --------------------------------------------------------------------------------------


async def test_a_large_result_is_a_claim_until_somebody_asks(
    app: App, folder: Path, traffic: Traffic
) -> None:
    @app.task
    async def produce() -> str:
        return LARGE

    async with Harness(app) as harness, app.client.events("completed.#") as events:
        run = await produce.trigger()
        event = await anext(events)
        assert (event.result, event.claim) == (None, Claim.of(encode(LARGE)))
        assert len(event.message().body) < 400
        assert traffic.got == []
        assert await run.result(timeout=1) == LARGE
        await harness.drain()
        assert harness[run].result == LARGE


async def test_a_hook_gets_the_result_itself(app: App) -> None:
    results: list[str] = []

    @app.task
    async def produce() -> str:
        return LARGE

    @produce.on_success
    async def hear(ctx: Context, result: str) -> None:
        results.append(result)

    async with Harness(app) as harness:
        await produce.trigger()
        await harness.drain()
        assert results == [LARGE]


async def test_a_caller_without_a_store_is_told_so(app: App) -> None:
    @app.task
    async def produce() -> str:
        return LARGE

    async with Harness(app) as harness:
        other = App("caller", settings=Settings(amqp_url="memory:"))
        with other.on(harness.broker):
            run = await other.client.trigger("produce")
            with pytest.raises(ResultUnavailable, match="BROKERTASK_PAYLOAD_STORE"):
                await run.result(timeout=5)
            await other.client.close()


async def test_a_result_that_is_gone_is_unavailable(app: App, folder: Path) -> None:
    @app.task
    async def produce() -> str:
        return LARGE

    async with Harness(app) as harness:
        run = await produce.trigger()
        await harness.drain()
        loses(folder, encode(LARGE))
        with pytest.raises(ResultUnavailable, match="completed, but its result cannot be fetched"):
            await run.result(timeout=1)


async def test_a_slow_store_does_not_hold_up_who_asks_for_a_result(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    async def produce() -> str:
        return LARGE

    async def hang(store: FolderStore, claim: Claim) -> bytes:
        return await asyncio.Future()

    async with Harness(app) as harness:
        run = await produce.trigger()
        await harness.drain()
        monkeypatch.setattr(FolderStore, "get", hang)
        with pytest.raises(ResultTimeout, match="store is slow"):
            await run.result(timeout=0.01)


async def test_a_result_that_cannot_be_put_is_a_failed_attempt(app: App, folder: Path) -> None:
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=2, on=ValueError))
    async def produce(ctx: Context) -> str:
        attempts.append(ctx.attempt)
        return LARGE

    async with Harness(app) as harness:
        breaks(folder, encode(LARGE))
        run = await produce.trigger()
        await harness.drain()
        with pytest.raises(RunFailed, match="PayloadUnavailable") as caught:
            await run.result(timeout=1)
        assert caught.value.reason == "max_attempts"
        assert attempts == [1, 2]


async def test_without_a_store_a_large_result_is_a_bad_one() -> None:
    app = App("flow", settings=Settings(amqp_url="memory:"))

    @app.task
    async def produce() -> str:
        return LARGE

    async with Harness(app) as harness:
        run = await produce.trigger()
        await harness.drain()
        assert harness[run].reason == "bad_result"
        assert "BROKERTASK_PAYLOAD_STORE" in harness[run].errors[0].message


# --- steps ----------------------------------------------------------------------------------------


async def test_large_results_of_steps_do_not_fill_the_memory(app: App, traffic: Traffic) -> None:
    calls: list[int] = []

    def part(number: int) -> str:
        calls.append(number)
        return f"{number:02}" + MEDIUM

    @app.task(retry=TWICE)
    async def collect(ctx: Context) -> int:
        parts = [await ctx.step(f"part {number}", part, number) for number in range(20)]
        if ctx.attempt == 1:
            assert traffic.got == []
            raise ConnectionError
        return sum(map(len, parts))

    async with Harness(app) as harness:
        run = await collect.trigger()
        await harness.advance(0.4)
        (waiting,) = harness.broker.messages(NAMES.rung(1000))
        assert len(waiting.body) < 20 * 200 + 2_000
        await harness.drain()
        assert await run.result(timeout=1) == 20 * 200_002
        assert calls == [*range(20)]
        assert traffic.got == traffic.put
        assert len(traffic.put) == 20


async def test_without_a_store_they_do_fill_it() -> None:
    app = App("flow", settings=Settings(amqp_url="memory:"))

    @app.task
    async def collect(ctx: Context) -> None:
        for number in range(20):
            await ctx.step(f"part {number}", lambda: MEDIUM)

    async with Harness(app) as harness:
        run = await collect.trigger()
        await harness.drain()
        assert harness[run].reason == "memory_full"


async def test_what_is_not_asked_for_again_is_not_fetched(app: App, traffic: Traffic) -> None:
    @app.task(retry=TWICE)
    async def summarise(ctx: Context) -> int:
        size = await ctx.step("size", size_of)
        if ctx.attempt == 1:
            raise ConnectionError
        return size

    async def size_of() -> int:
        return len(MEDIUM)

    async with Harness(app) as harness:
        run = await summarise.trigger()
        await harness.drain()
        assert await run.result(timeout=1) == len(MEDIUM)
        assert (traffic.put, traffic.got) == ([], [])


@pytest.mark.parametrize("catching", [True, False])
async def test_a_step_whose_result_is_away_stops_the_attempt_whatever_its_code_makes_of_it(
    app: App, folder: Path, catching: bool
) -> None:
    async def fetch() -> str:
        return MEDIUM

    async def fall_back() -> str:
        fallbacks.append("used")
        return "nothing"

    fallbacks: list[str] = []

    @app.task(retry=Retry(max_attempts=3, min_delay=60, factor=1, jitter=False, on=ValueError))
    async def careful(ctx: Context) -> int:
        try:
            text = await ctx.step("fetch", fetch)
        except Exception:
            if not catching:
                raise
            text = await ctx.step("fall back", fall_back)
        if ctx.attempt == 1:
            raise ValueError
        return len(text)

    async with Harness(app) as harness:
        run = await careful.trigger()
        await harness.advance(30)
        loses(folder, encode(MEDIUM))
        await harness.advance(60)
        assert [error.type for error in harness[run].errors] == ["ValueError", "PayloadUnavailable"]
        await open_store(f"file://{folder}").put(encode(MEDIUM))
        await harness.drain()
        assert await run.result(timeout=1) == len(MEDIUM)
        assert fallbacks == []


async def test_a_step_whose_result_cannot_be_put_is_done_again(app: App, folder: Path) -> None:
    calls: list[str] = []

    async def fetch() -> str:
        calls.append("fetch")
        return MEDIUM

    @app.task(retry=Retry(max_attempts=2, min_delay=60, jitter=False, on=ValueError))
    async def careful(ctx: Context) -> int:
        return len(await ctx.step("fetch", fetch))

    async with Harness(app) as harness:
        breaks(folder, encode(MEDIUM))
        run = await careful.trigger()
        await harness.advance(30)
        assert [error.type for error in harness[run].errors] == ["PayloadUnavailable"]
        (folder / Claim.of(encode(MEDIUM)).key).parent.unlink()
        await harness.drain()
        assert await run.result(timeout=1) == len(MEDIUM)
        assert calls == ["fetch", "fetch"]


async def test_a_step_of_a_local_call_needs_no_store(app: App, folder: Path) -> None:
    @app.task
    async def local(ctx: Context) -> int:
        return len(await ctx.step("fetch", lambda: MEDIUM))

    assert await local(ctx=Context(run_id="local", task="local")) == len(MEDIUM)
    assert stored(folder) == 0


# --- on RabbitMQ ----------------------------------------------------------------------------------


async def test_claims_on_rabbitmq(amqp_url: str, folder: Path) -> None:
    settings = Settings(amqp_url=amqp_url, payload_store=f"file://{folder}")
    app, calls = App("flow", settings=settings), []

    async def upper(text: str) -> str:
        calls.append(len(text))
        return text.upper()

    @app.task(retry=Retry(max_attempts=2, min_delay=0.05))
    async def shout(text: str, ctx: Context) -> str:
        louder = await ctx.step("upper", upper, text)
        await ctx.sleep(0.01)
        if ctx.attempt == 1:
            raise ConnectionError
        return louder

    async with app, app.worker():
        async with app.client.events() as events:
            run = await shout.trigger(LARGE)
            heard: list[Event] = [await anext(events), await anext(events)]
        assert [(event.event, event.attempt) for event in heard] == [
            ("retrying", 1),
            ("completed", 2),
        ]
        assert heard[-1].claim == Claim.of(encode(LARGE.upper()))
        assert await run.result(timeout=30) == LARGE.upper()
    assert calls == [len(LARGE)]
    # The step's result and the run's are one and the same.
    assert stored(folder) == 2


# --- on the command line --------------------------------------------------------------------------


@pytest.fixture(params=["socket"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    async with place(request, tmp_path) as shop, shop.transport() as transport:
        await transport.declare(graveyard("charge"))
        yield shop


async def bury(shop: Place, content: bytes) -> Claim:
    claim = Claim.of(content)
    async with shop.transport() as transport:
        await put(transport, dead(trigger("run-1").claimed(claim)))
        await until_dead(transport, 1)
    return claim


async def test_dead_show_tells_of_a_claim_and_fetches_what_it_stands_for(
    shop: Place, folder: Path
) -> None:
    content, url = encode({"order": MEDIUM}), f"file://{folder}"
    claim = await bury(shop, content)
    await open_store(url).put(content)
    words = ("dead", "show", "run-1", "--task", "charge")
    done = await shop.brokertask(*words, BROKERTASK_PAYLOAD_STORE=url)
    assert f"claim for {claim.size} bytes, sha256 {claim.sha256}" in done.out
    assert f"in {url}/{claim.key}" in done.out
    assert f"payload {claim.size} bytes in the payload store; --payload shows it" in done.out
    shown = await shop.brokertask(*words, "--payload", "--json", BROKERTASK_PAYLOAD_STORE=url)
    (told,) = shown.json()
    assert told["claim"] == {
        "sha256": claim.sha256,
        "size": claim.size,
        "where": f"{url}/{claim.key}",
    }
    assert told["payload"] == {"order": MEDIUM}
    assert (told["payload_bytes"], told["content_type"]) == (claim.size, CLAIM)


async def test_dead_show_without_a_store_or_content_says_so(shop: Place, folder: Path) -> None:
    await bury(shop, encode(MEDIUM))
    words = ("dead", "show", "run-1", "--task", "charge", "--payload")
    done = await shop.brokertask(*words)
    assert "a payload store that is not configured here" in done.out
    assert "set BROKERTASK_PAYLOAD_STORE" in done.out.partition("  payload\n")[2]
    done = await shop.brokertask(*words, "--json", BROKERTASK_PAYLOAD_STORE=f"file://{folder}")
    (told,) = done.json()
    assert told["payload"] is None
    assert "restore it, or discard the run" in told["payload_problem"]


async def test_dead_redrive_takes_a_large_payload(shop: Place, folder: Path) -> None:
    await bury(shop, encode(MEDIUM))
    url = f"file://{folder}"
    words = ("dead", "redrive", "run-1", "--yes", "--task", "charge", "--payload", "-")
    process = await shop.start(*words, BROKERTASK_PAYLOAD_STORE=url)
    out, err = await process.communicate(f'"{LARGE}"'.encode())
    assert (process.returncode, out.decode().splitlines()[-1]) == (0, "1 redriven"), err
    assert await open_store(url).get(Claim.of(encode(LARGE))) == encode(LARGE)


async def test_a_store_that_refuses_is_a_failure_of_the_command(shop: Place, folder: Path) -> None:
    spoils(folder)
    (shop.folder / "large.json").write_text(f'"{LARGE}"')
    words = ("trigger", "charge", "--file", "large.json")
    done = await shop.brokertask(*words, BROKERTASK_PAYLOAD_STORE=f"file://{folder}")
    assert done.code == 4
    assert "error[BT-302]" in done.err
    async with shop.transport() as transport:
        depth = await transport.depth(NAMES.queue("charge"))
        assert depth is not None
        assert depth.ready == 0


@pytest.mark.parametrize(
    ("url", "broken", "status", "told"),
    [
        ("file://{}", False, "ok", "takes and gives content"),
        ("file://{}", True, "failed", "mend the folder"),
    ],
)
async def test_the_doctor_looks_at_the_store(
    shop: Place, folder: Path, url: str, broken: bool, status: str, told: str
) -> None:
    if broken:
        spoils(folder)
    done = await shop.brokertask("doctor", "--json", BROKERTASK_PAYLOAD_STORE=url.format(folder))
    checks: dict[str, Any] = {check["name"]: check for check in done.json()}
    assert checks["payloads"]["status"] == status
    assert told in checks["payloads"]["detail"]


async def test_a_wrong_store_is_named_at_the_start(shop: Place) -> None:
    done = await shop.brokertask("doctor", BROKERTASK_PAYLOAD_STORE="https://key:pw@x/payloads")
    assert done.code == 2
    assert "BROKERTASK_PAYLOAD_STORE" in done.err
    assert "pw@x" not in done.err
