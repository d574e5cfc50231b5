"""`brokertask worker` in real processes, against RabbitMQ: how it starts, fails, dies and stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

from brokertask import App, Run, Settings
from brokertask.transport.memory import MemoryBroker
from brokertask.transport.socket import serve
from tests.flow.command import SECONDS, Command, brokertask, until_gone

pytestmark = pytest.mark.anyio

TASKS = """
import asyncio, gc, logging, os, signal, time
from brokertask import App, Context, Retry

app = App("subject")
log = logging.getLogger("subject")


@app.task(retry=Retry(max_attempts=3, min_delay=0.1))
async def die(how: str, ctx: Context) -> int:
    if ctx.attempt == 1:
        os._exit(17) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    return ctx.attempt


@app.task
async def slow(seconds: float, ctx: Context) -> int:
    print(f"slow begins, attempt {ctx.attempt}\\n", end="", flush=True)
    await asyncio.sleep(seconds)
    print("slow ends\\n", end="", flush=True)
    return ctx.attempt


@app.task
def stubborn(seconds: float) -> None:
    print("stubborn begins\\n", end="", flush=True)
    time.sleep(seconds)


@app.task
async def block(seconds: float) -> None:
    time.sleep(seconds)


@app.task
async def unsearched() -> int:
    return gc.get_freeze_count()


@app.task
async def speak(text: str) -> None:
    log.info("spoken: %s", text)
    raise RuntimeError("after speaking")
"""

Running: TypeAlias = AbstractAsyncContextManager[Command]


class Place:
    """A folder with an app, and a broker."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        (folder / "tasks.py").write_text(TASKS)

    def worker(self, *arguments: str, app: str = "tasks:app", **environment: str) -> Running:
        variables: Mapping[str, str] = {"BROKERTASK_AMQP_URL": self.url, **environment}
        return brokertask("worker", app, *arguments, folder=self.folder, environment=variables)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[App]:
    async with App("test", settings=Settings(amqp_url=url)) as app:
        yield app


async def trigger(app: App, task: str, payload: object) -> Run[Any]:
    return await app.client.trigger(task, payload)


@pytest.fixture
async def place(tmp_path: Path, amqp_url: str) -> Place:
    return Place(tmp_path, amqp_url)


@pytest.fixture
async def bare(tmp_path: Path) -> Place:
    """No broker: for what ends before it would need one."""
    return Place(tmp_path, "amqp://guest:secret@127.0.0.1:1/")


async def test_it_says_what_it_runs_and_stays_small(place: Place) -> None:
    async with place.worker("--tasks", "slow,block", "--concurrency", "slow=3") as worker:
        (child,) = await worker.ready()
        sizes = [psutil.Process(pid).memory_info().rss / 2**20 for pid in (worker.pid, child)]
        print(f"RSS of an idle worker: parent {sizes[0]:.1f} MiB, child {sizes[1]:.1f} MiB")
        assert max(sizes) < 60
        assert "slow (3), block (10)" in worker.output
        assert "guest:***@" in worker.output
        assert ":guest@" not in worker.output
        assert await worker.stop() == 0


async def test_what_a_worker_begins_with_is_not_searched_for_garbage(place: Place) -> None:
    async with place.worker() as worker, client(place.url) as app:
        await worker.ready()
        run = await trigger(app, "unsearched", None)
        assert await run.result(timeout=SECONDS) > 10_000


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_worker_stops_at_once(place: Place, sign: signal.Signals) -> None:
    async with place.worker("--processes", "2") as worker:
        children = await worker.ready(2)
        began = time.monotonic()
        # To the whole group, as a terminal does.
        os.killpg(worker.pid, sign)
        assert await worker.end() == 0
        assert time.monotonic() - began < 1.5
        for child in children:
            await until_gone(child)


async def test_a_worker_that_has_just_begun_stops_too(place: Place) -> None:
    async with place.worker("--processes", "2") as worker:
        while not (children := psutil.Process(worker.pid).children()):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        assert await worker.stop() == 0
        await until_gone(children[0].pid)
        assert "is ready" not in worker.output


async def test_a_run_finishes_before_the_worker_ends(place: Place) -> None:
    async with client(place.url) as app, place.worker() as worker:
        await worker.ready()
        run = await trigger(app, "slow", 2)
        await worker.line("slow begins, attempt 1")
        assert await worker.stop() == 0
        assert "slow ends" in worker.output
        assert await run.result(timeout=SECONDS) == 1


async def test_what_does_not_finish_in_time_is_handed_back_uncounted(place: Place) -> None:
    async with client(place.url) as app:
        async with place.worker("--grace", "200ms") as worker:
            await worker.ready()
            run = await trigger(app, "slow", 1.5)
            await worker.line("slow begins, attempt 1")
            assert await worker.stop() == 0
            assert "slow ends" not in worker.output
        async with place.worker() as worker:
            await worker.line("slow begins, attempt 1")
            assert await run.result(timeout=SECONDS) == 1
            assert await worker.stop() == 0


async def test_a_signal_to_every_process_is_one_signal(place: Place) -> None:
    """As systemd stops a service."""
    async with client(place.url) as app, place.worker() as worker:
        (child,) = await worker.ready()
        run = await trigger(app, "slow", 2)
        await worker.line("slow begins")
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGTERM, child)
        assert await worker.end() == 0
        assert await run.result(timeout=SECONDS) == 1
        assert "hands back" not in worker.output


async def test_a_second_signal_does_not_wait(place: Place) -> None:
    async with client(place.url) as app, place.worker() as worker:
        (child,) = await worker.ready()
        await trigger(app, "stubborn", 60)
        await trigger(app, "slow", 60)
        await worker.line("begins")
        await worker.line("begins")
        worker.send(signal.SIGTERM)
        await worker.line("lets 2 run(s) finish")
        began = time.monotonic()
        worker.send(signal.SIGTERM)
        await worker.end()
        assert time.monotonic() - began < 4
        await until_gone(child)


@pytest.mark.parametrize(("how", "why"), [("exit", "exit code 17"), ("kill", "(SIGKILL)")])
async def test_a_dead_process_is_replaced_and_its_run_goes_on(
    place: Place, how: str, why: str
) -> None:
    async with client(place.url) as app, place.worker() as worker:
        await worker.ready()
        run = await trigger(app, "die", how)
        assert why in await worker.line("the next one starts in")
        await worker.ready()
        assert await run.result(timeout=SECONDS) == 2
        assert await worker.stop() == 0


async def test_children_drain_when_their_parent_is_killed(place: Place) -> None:
    async with client(place.url) as app, place.worker("--processes", "2") as worker:
        children = await worker.ready(2)
        run = await trigger(app, "slow", 5)
        await worker.line("slow begins")
        worker.send(signal.SIGKILL)
        await worker.line("the supervisor is gone: draining")
        assert await run.result(timeout=SECONDS) == 1
        assert "is blocked" not in worker.output
        for child in children:
            await until_gone(child)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("app = 1", "has no App called 'app'; it has no App at all"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
async def test_an_app_that_cannot_be_imported_ends_it_with_one_sentence(
    bare: Place, source: str, message: str
) -> None:
    (bare.folder / "wrong.py").write_text(source)
    async with bare.worker("--processes", "3", app="wrong:app") as worker:
        assert await worker.end() == 3
    assert message in worker.output
    assert worker.output.count("error[") == 1
    assert "Traceback" not in worker.output
    assert "brokertask/" not in worker.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "many"], "--concurrency 'many' is not understood"),
        (["--concurrency", "nothing=2"], "no task 'nothing'"),
        (["--concurrency", "0"], "1 to 65535"),
        (["--tasks", "nothing"], "no task 'nothing'; it declares: block, die, slow"),
        (["--grace", "soon"], "duration 'soon' is not understood"),
        (["--health", "8080"], "write HOST:PORT"),
        (["--processes", "0"], "greater than or equal to 1"),
    ],
)
async def test_wrong_usage_ends_it_with_one_sentence(
    bare: Place, arguments: list[str], message: str
) -> None:
    async with bare.worker(*arguments) as worker:
        assert await worker.end() == 2
    assert message in worker.output
    assert "Traceback" not in worker.output


async def test_a_broker_in_its_own_memory_is_refused(bare: Place) -> None:
    async with bare.worker(BROKERTASK_AMQP_URL="memory:") as worker:
        assert await worker.end() == 2
    assert "use `brokertask dev`" in worker.output


async def test_a_wrong_password_ends_it(place: Place) -> None:
    wrong = place.url.replace("guest:guest@", "guest:wrong-password@")
    async with place.worker("--processes", "2", BROKERTASK_AMQP_URL=wrong) as worker:
        assert await worker.end() == 7
    assert worker.output.count("error[BT-202]") == 1
    assert "wrong-password" not in worker.output


async def test_a_worker_may_start_before_its_broker(tmp_path: Path) -> None:
    path = tmp_path / "broker" / "dev.sock"
    place = Place(tmp_path, f"unix:{path}")
    async with place.worker(BROKERTASK_CONNECT_TIMEOUT="0.3") as worker:
        await worker.line("the next one starts in")
        assert "error[" not in worker.output
        broker = MemoryBroker()
        async with await serve(broker, path):
            await worker.ready()
            assert await worker.stop() == 0
        broker.close()


async def test_health_follows_the_processes(place: Place) -> None:
    async with client(place.url) as app, place.worker("--health", "127.0.0.1:0") as worker:
        url = (await worker.line("Health")).split()[-1]
        (child,) = await worker.ready()
        assert (await _get(url))[0] == 200
        worker.send(signal.SIGKILL, child)
        await worker.line("the next one starts in")
        status, state = await _get(url)
        assert (status, state["restarts"]) == (503, 1)
        await worker.ready()
        await trigger(app, "slow", 1)
        await worker.line("slow begins")
        worker.send(signal.SIGTERM)
        await worker.line("lets 1 run(s) finish")
        status, state = await _get(url)
        assert (status, state["stopping"]) == (503, True)
        assert (await _get(url.replace("readyz", "livez")))[0] == 200
        assert await worker.end() == 0


async def _get(url: str) -> tuple[int, Any]:
    def get() -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    return await asyncio.to_thread(get)


async def test_a_blocked_event_loop_is_named(place: Place) -> None:
    async with client(place.url) as app, place.worker() as worker:
        await worker.ready()
        run = await trigger(app, "block", 5)
        line = await worker.line("the event loop is blocked")
        assert f"by block {run.run_id}, at {place.folder}/tasks.py:" in line
        assert await worker.stop() == 0


async def test_logs_are_json_with_the_run_they_belong_to(place: Place) -> None:
    async with client(place.url) as app, place.worker("--log-format", "json") as worker:
        await worker.ready()
        run = await trigger(app, "speak", "hello")
        line = json.loads(await worker.line("spoken: hello"))
        assert line["run_id"] == run.run_id
        assert line["level"] == "info"
        assert await worker.stop() == 0
    for text in worker.lines:
        assert {"time", "level", "logger", "message"} <= set(json.loads(text))


async def test_a_mistyped_command_suggests_the_close_one(tmp_path: Path) -> None:
    async with brokertask("wroker", folder=tmp_path, environment={}) as command:
        assert await command.end() == 2
    assert "Did you mean 'worker'" in command.output


async def test_version_and_help(tmp_path: Path) -> None:
    async with brokertask("--version", folder=tmp_path, environment={}) as command:
        assert await command.end() == 0
    assert command.output.startswith("brokertask 0.")
    async with brokertask("worker", "--help", folder=tmp_path, environment={}) as command:
        assert await command.end() == 0
    for option in (
        "--processes",
        "--tasks",
        "--concurrency",
        "--grace",
        "--health",
        "--log-format",
    ):
        assert option in command.output
