"""`brokertask trigger`: what it sends, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from brokertask.envelope import Envelope, Message
from brokertask.topology import Names, QueueOptions, TaskQueue, topology
from tests.flow.commandline import SECONDS, Done, Place, place
from tests.flow.graveyard import take

pytestmark = pytest.mark.anyio

NAMES = Names("bt")
TASKS = """
import asyncio
from datetime import date
from pydantic import BaseModel
from brokertask import Abort, App, Context, Retry, steps

steps.SLEEP_IN_PLACE = 0.1
app = App("shop")

class Order(BaseModel):
    order: int
    due: date = date(2026, 1, 2)
    amount: float = 1.0

class Receipt(BaseModel):
    order: int
    due: date
    ratio: float = float("nan")
    data: bytes = bytes([255])

@app.task(retry=Retry(max_attempts=3, min_delay=0.05, max_delay=0.1))
async def charge(order: Order, ctx: Context) -> Receipt:
    if order.amount > 100 and ctx.attempt < 3:
        raise ConnectionError(f"504 for {order.order}\\x1b[31m [bold]x[/]")
    if order.amount < 0:
        raise Abort("negative")
    return Receipt(order=order.order, due=order.due)

@app.task
async def nothing() -> None:
    await asyncio.sleep(0)

@app.task
async def dream(ctx: Context) -> None:
    ctx.metadata["mood"] = "calm"
    await asyncio.sleep(0.05)
    ctx.progress(1.5, 4)
    await ctx.sleep(0.4)
"""
WHOLE = topology(NAMES, [TaskQueue("charge"), TaskQueue("nothing"), TaskQueue("dream")])


@pytest.fixture(params=["socket", "rabbitmq"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A folder with an app, and a broker that has its topology."""
    async with place(request, tmp_path) as shop:
        shop.write("tasks.py", TASKS)
        async with shop.transport() as transport:
            await transport.declare(WHOLE)
        yield shop


@asynccontextmanager
async def working(shop: Place) -> AsyncIterator[None]:
    """Run a worker of the app meanwhile."""
    code = "import asyncio, tasks\nasync def main():\n async with tasks.app.worker():\n  "
    code += "print('ready', flush=True)\n  await asyncio.Event().wait()\nasyncio.run(main())"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        cwd=shop.folder,
        env=shop.environment | {"PYTHONPATH": os.getcwd()},
        stdin=DEVNULL,
        stdout=PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            assert await process.stdout.readline() == b"ready\n"
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def sent(shop: Place, task: str = "charge") -> tuple[Message, Envelope]:
    async with shop.transport() as transport:
        (message,) = await take(transport, NAMES.queue(task), 1)
    return message, Envelope.read(message, task=task, max_bytes=10_000)


async def test_the_id_is_all_that_is_printed(shop: Place) -> None:
    done = await shop.brokertask("trigger", "charge", '{"order": 7}', "--tag", "a:b", "--tag", "c")
    assert (done.code, done.err) == (0, "")
    _, envelope = await sent(shop)
    assert done.out == f"{envelope.run_id}\n"
    assert envelope.value() == {"order": 7}
    assert envelope.tags == ("a:b", "c")
    assert envelope.app_id == "brokertask"


async def test_options_reach_the_message(shop: Place) -> None:
    words = ("--run-id", "run-1", "--expires", "1h", "--json")
    done = await shop.brokertask("trigger", "nothing", *words)
    assert done.json() == {"run_id": "run-1", "task": "nothing", "status": "triggered"}
    _, envelope = await sent(shop, "nothing")
    assert envelope.run_id == "run-1"
    assert envelope.value() is None
    assert envelope.expires_ms is not None
    assert envelope.triggered_ms is not None
    assert envelope.expires_ms - envelope.triggered_ms == 3_600_000


async def test_a_delay_waits_on_the_broker(shop: Place) -> None:
    done = await shop.brokertask("trigger", "charge", "1", "--delay", "1d")
    assert done.code == 0
    async with shop.transport() as transport:
        depth = await transport.depth(NAMES.rung(86_400_000))
    assert depth is not None
    assert depth.ready == 1


async def test_a_payload_comes_from_a_file_or_standard_input(shop: Place) -> None:
    shop.write("order.json", '{"order": 8}')
    assert (await shop.brokertask("trigger", "charge", "--file", "order.json")).code == 0
    assert (await sent(shop))[1].value() == {"order": 8}
    assert (await shop.brokertask("trigger", "charge", "-", stdin='{"order": 9}')).code == 0
    assert (await sent(shop))[1].value() == {"order": 9}


async def test_with_the_app_the_payload_is_of_the_tasks_type(shop: Place) -> None:
    words = ("trigger", "charge", '{"order": "7", "due": "2026-02-03"}', "--app", "tasks")
    assert (await shop.brokertask(*words)).code == 0
    _, envelope = await sent(shop)
    assert envelope.value() == {"order": 7, "due": "2026-02-03", "amount": 1.0}
    assert envelope.app_id == "shop"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("charge", '{"order": "seven"}', "--app", "tasks"), 2, "order: int_parsing"),
        (("chrage", "1", "--app", "tasks"), 2, "did you mean 'charge'?"),
        (("charge", "{order: 7}"), 2, "the payload is not JSON"),
        (("charge", "NaN"), 2, "NaN is not JSON"),
        (("charge", "[" * 100_000), 2, "the payload is not JSON"),
        (("charge", "1", "--file", "x.json"), 2, "as text or as a file, not both"),
        (("charge", "--file", "gone.json"), 2, "gone.json: No such file"),
        (("charge", "1", "--delay", "soon"), 2, "duration 'soon'"),
        (("nobody", "1"), 6, "nobody"),
        (("bad name", "1"), 2, "task id 'bad name'"),
        (("charge", "1", "--app", "gone"), 3, "there is no module 'gone' here"),
    ],
)
async def test_mistakes_end_with_a_sentence(
    shop: Place, words: tuple[str, ...], code: int, sentence: str
) -> None:
    done = await shop.brokertask("trigger", *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert sentence in done.err
    assert done.err.count("\n") == 1


async def test_a_value_is_never_in_an_error(shop: Place) -> None:
    done = await shop.brokertask("trigger", "charge", '{"order": "hunter2"}', "--app", "tasks")
    assert done.code == 2
    assert "hunter2" not in done.err


async def test_waiting_prints_the_result_alone(shop: Place) -> None:
    async with working(shop):
        untyped = await shop.brokertask("trigger", "charge", '{"order": 7}', "--wait")
        words = ("trigger", "charge", '{"order": 7}', "--app", "tasks", "--wait")
        typed = await shop.brokertask(*words)
        none = await shop.brokertask("trigger", "nothing", "--wait", "--json", "--run-id", "run-1")
    result = {"order": 7, "due": "2026-01-02", "ratio": "nan", "data": "ff"}
    for done in (untyped, typed):
        assert (done.code, done.json()) == (0, result)
        assert len(done.err.strip()) == 36
    assert none.json() == {
        "run_id": "run-1",
        "task": "nothing",
        "status": "completed",
        "result": None,
    }


async def test_following_prints_a_line_for_each_event(shop: Place) -> None:
    async with working(shop):
        done = await shop.brokertask(
            "trigger", "charge", '{"order": 7, "amount": 500}', "--follow", "--run-id", "run-1"
        )
    assert done.code == 0
    first, one, two, three = done.out.splitlines()
    assert first == "run-1"
    for number, line in ((1, one), (2, two)):
        assert line.startswith(
            f"✗ attempt {number} failed  ConnectionError: 504 for 7\\x1b[31m [bold]x[/]; retry in "
        )
    assert three == "✔ completed in attempt 3"
    assert "\x1b" not in done.out


async def test_following_shows_sleeps_and_progress(shop: Place) -> None:
    async with working(shop):
        done = await shop.brokertask("trigger", "dream", "--follow", "--run-id", "run-1")
    assert (done.code, done.err) == (0, "")
    first, before, asleep, after, last = done.out.splitlines()
    assert first == "run-1"
    assert before == after == "1.5 of 4 done"
    assert re.fullmatch(r"sleeps for [34]\d\d ms", asleep)
    assert last == "✔ completed in attempt 1"


async def failed(shop: Place, *words: str) -> Done:
    async with working(shop):
        return await shop.brokertask("trigger", "charge", '{"order": 7, "amount": -1}', *words)


async def test_a_failed_run_ends_with_1(shop: Place) -> None:
    done = await failed(shop, "--wait")
    assert (done.code, done.out) == (1, "")
    assert "dead-letter queue (aborted): Abort: negative" in done.err


async def test_a_failed_run_that_is_followed(shop: Place) -> None:
    done = await failed(shop, "--follow")
    assert (done.code, done.err) == (1, "")
    told = "✗ attempt 1 failed  Abort: negative; dead (aborted)"
    assert done.out.splitlines()[1:] == [told]


async def test_a_failed_run_as_json(shop: Place) -> None:
    done = await failed(shop, "--wait", "--json", "--run-id", "run-1")
    assert (done.code, done.err) == (1, "")
    assert done.json() == {
        "run_id": "run-1",
        "task": "charge",
        "status": "failed",
        "reason": "aborted",
        "error": {"type": "Abort", "message": "negative"},
    }


async def test_a_run_that_expired(shop: Place) -> None:
    run = ("trigger", "nothing", "--expires", "0", "--wait", "--json", "--run-id", "run-1")
    waiting = asyncio.create_task(shop.brokertask(*run))
    async with working(shop):
        done = await waiting
    assert done.code == 1
    assert done.json() == {"run_id": "run-1", "task": "nothing", "status": "expired"}


async def test_waiting_has_an_end(shop: Place) -> None:
    done = await shop.brokertask("trigger", "nothing", "--wait", "--timeout", "0.1")
    assert done.code == 8
    assert "within 100 ms; it goes on" in done.err


async def test_an_interrupted_wait_leaves_the_run(shop: Place) -> None:
    process = await shop.start("trigger", "nothing", "--follow", PYTHONUNBUFFERED="1")
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        run_id = (await process.stdout.readline()).decode().strip()
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    assert (await sent(shop, "nothing"))[1].run_id == run_id


async def test_a_full_queue_is_a_conflict(shop: Place) -> None:
    limited = TaskQueue("batch", QueueOptions(max_length=1))
    async with shop.transport() as transport:
        await transport.declare(topology(NAMES, [limited]))
        for _ in range(200):
            with contextlib.suppress(Exception):
                message = Message(body=b"\xc0")
                await transport.publish(NAMES.trigger_route("batch"), message, timeout=SECONDS)
    done = await shop.brokertask("trigger", "batch")
    assert done.code == 6
    assert done.err.startswith("error[BT-204]")


async def test_without_a_broker(tmp_path: Path) -> None:
    nowhere = Place(tmp_path, "amqp://guest:secret@127.0.0.1:1/")
    done = await nowhere.brokertask("trigger", "charge", "1", BROKERTASK_CONNECT_TIMEOUT="0.2")
    assert (done.code, done.out) == (4, "")
    assert "secret" not in done.err
