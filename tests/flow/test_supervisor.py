"""The supervisor and its health endpoint, with children that only pretend to work."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from brokertask import health, supervisor
from brokertask.errors import ConfigurationError
from brokertask.health import HealthServer
from brokertask.supervisor import Report, Supervisor
from tests.flow.command import SECONDS, until_gone

pytestmark = pytest.mark.anyio

CHILD = """
import json, os, signal, socket, sys, time
orders, channel = json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
def tell(state, **more):
    channel.sendall(json.dumps({"state": state, "busy": 0, **more}).encode() + b"\\n")
def stop(*_):
    tell("draining")
    sys.exit(0)
for sign in (signal.SIGTERM, signal.SIGQUIT):
    signal.signal(sign, signal.SIG_IGN if orders.get("deaf") else stop)
if orders.get("mortal"):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if orders.get("marks"):
    with open(orders["marks"], "a") as marks:
        marks.write(f"{os.getpid()}\\n")
if os.path.exists(orders.get("broken", "/nonexistent")):
    sys.exit(3)
tell("starting", about={"grace": orders.get("grace", 60)})
if "failure" in orders:
    tell("starting", failure=orders["failure"])
if "code" in orders:
    sys.exit(orders["code"])
tell("ready")
if orders.get("silent"):
    time.sleep(60)
if orders.get("then_code"):
    sys.exit(orders["then_code"])
while True:
    tell("ready", busy=orders.get("busy", 1))
    time.sleep(0.1)
"""


class Watched:
    """A running supervisor, and what its children reported."""

    def __init__(self, made: Supervisor) -> None:
        self.supervisor = made
        self.running = asyncio.create_task(made.run())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():  # noqa: ASYNC110 - a state of several processes
                await asyncio.sleep(0.01)

    async def end(self) -> int:
        async with asyncio.timeout(SECONDS):
            return await self.running

    async def stop(self) -> int:
        self.supervisor.interrupt()
        return await self.end()

    @property
    def pids(self) -> list[int]:
        return [process["pid"] for process in self.supervisor.describe()["processes"]]

    @property
    def states(self) -> list[str]:
        return [process["state"] for process in self.supervisor.describe()["processes"]]


@asynccontextmanager
async def supervised(processes: int = 1, **orders: Any) -> AsyncIterator[Watched]:
    command = [sys.executable, "-c", CHILD, json.dumps(orders)]
    watched = Watched(Supervisor(command, processes=processes, fatal={3}))
    try:
        yield watched
    finally:
        watched.running.cancel()
        await asyncio.gather(watched.running, return_exceptions=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    caplog.set_level(logging.INFO)


async def test_a_stopped_supervisor_ends_with_its_children() -> None:
    async with supervised(processes=3) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        pids = watched.pids
        assert len(set(pids)) == 3
        assert await watched.stop() == 0
        for pid in pids:
            await until_gone(pid)


async def test_a_child_that_exits_is_replaced_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with supervised(then_code=17) as watched:
        await watched.until(lambda: watched.supervisor.restarts >= 2)
        assert await watched.stop() == 0
    assert "ended: exit code 17; the next one starts in" in caplog.text


async def test_a_killed_child_is_replaced_and_the_others_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with supervised(processes=2) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        first, second = watched.pids
        os.kill(first, signal.SIGKILL)
        await watched.until(lambda: watched.supervisor.ready and first not in watched.pids)
        assert second in watched.pids
        assert await watched.stop() == 0
    assert "killed by signal 9 (SIGKILL), perhaps out of memory" in caplog.text


async def test_the_reason_a_child_reports_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with supervised(failure="no broker today", code=4) as watched:
        await watched.until(lambda: watched.supervisor.restarts >= 1)
        assert await watched.stop() == 0
    assert "ended: no broker today; the next one" in caplog.text


async def test_the_pause_grows_and_stays_below_its_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.4)
    async with supervised(code=1) as watched:
        await watched.until(lambda: watched.supervisor.restarts >= 4)
        assert await watched.stop() == 0
    found = re.findall(r"the next one starts in ([\d.]+) s", caplog.text)
    pauses = [float(seconds) for seconds in found]
    assert 0.1 <= pauses[0] <= 0.2
    assert 0.2 <= pauses[3] <= 0.4


async def test_a_mistake_of_the_app_ends_everything_at_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    async with supervised(processes=4, code=3, marks=str(marks)) as watched:
        assert await watched.end() == 3
    assert len(marks.read_text().split()) == 1


async def test_a_mistake_after_it_once_worked_is_tried_again(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    async with supervised(processes=2, broken=str(broken)) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        broken.touch()
        os.kill(watched.pids[0], signal.SIGKILL)
        await watched.until(lambda: watched.supervisor.restarts >= 3)
        broken.unlink()
        await watched.until(lambda: watched.supervisor.ready)
        assert await watched.stop() == 0


async def test_a_program_that_cannot_be_started_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched(Supervisor(["/nonexistent/program"]))
    await watched.until(lambda: watched.supervisor.restarts >= 2)
    assert await watched.stop() == 0
    assert "process 1 cannot be started" in caplog.text


async def test_a_second_signal_kills_those_that_do_not_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "HURRY", 0.1)
    async with supervised(deaf=True) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        watched.supervisor.interrupt()
        assert await watched.stop() == 1


@pytest.mark.parametrize(("busy", "code"), [(0, 0), (1, 1)])
async def test_a_child_that_a_signal_ends_has_failed_only_if_it_held_something(
    busy: int, code: int
) -> None:
    """As it has drained, it listens no more."""
    async with supervised(mortal=True, busy=busy) as watched:
        await watched.until(lambda: watched.supervisor.busy == busy and watched.supervisor.ready)
        assert await watched.stop() == code


async def test_a_drain_that_takes_too_long_ends_in_a_kill(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "DRAIN_MARGIN", 0.1)
    async with supervised(deaf=True, grace=0) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        assert await watched.stop() == 1
    assert "killed by signal 9" in caplog.text


async def test_replacing_starts_the_new_before_it_stops_the_old() -> None:
    async with supervised(processes=2) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        before = watched.pids
        assert await watched.supervisor.replace() == ""
        assert not set(before) & set(watched.pids)
        assert watched.supervisor.ready
        for pid in before:
            await until_gone(pid)
        assert watched.supervisor.restarts == 0
        os.kill(watched.pids[0], signal.SIGKILL)
        await watched.until(lambda: watched.supervisor.restarts == 1 and watched.supervisor.ready)
        assert await watched.stop() == 0


async def test_a_replacement_that_fails_leaves_the_old_at_work(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    async with supervised(broken=str(broken)) as watched:
        await watched.until(lambda: watched.supervisor.ready)
        before = watched.pids
        broken.touch()
        assert await watched.supervisor.replace() == "exit code 3"
        assert watched.pids == before
        assert watched.supervisor.ready
        assert await watched.stop() == 0


async def test_a_child_without_heartbeat_is_blocked_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "BLOCKED_AFTER", 0.2)
    async with supervised(silent=True) as watched:
        await watched.until(lambda: watched.states == ["blocked"])
        assert not watched.supervisor.ready
        assert await watched.stop() == 0


def test_reports_are_one_line() -> None:
    line = Report(state="ready", busy=2, about={"app": "a\nb"}).line()
    assert line.count(b"\n") == 1
    assert Report(**json.loads(line)).about == {"app": "a\nb"}
    assert json.loads(Report(state="ready").line()) == {"state": "ready", "busy": 0}


@asynccontextmanager
async def endpoint(state: dict[str, Any]) -> AsyncIterator[int]:
    server = HealthServer(lambda: state)
    port = await server.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await server.close()


async def ask(port: int, request: bytes) -> tuple[bytes, Any]:
    """Return the status line and the JSON of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(SECONDS):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], json.loads(body) if body else None


async def test_health_tells_live_from_ready() -> None:
    state = {"ready": False, "processes": []}
    async with endpoint(state) as port:
        assert await ask(port, b"GET /livez HTTP/1.1\r\n\r\n") == (
            b"HTTP/1.1 200 OK",
            {"live": True},
        )
        assert await ask(port, b"GET /readyz HTTP/1.1\r\n\r\n") == (
            b"HTTP/1.1 503 Service Unavailable",
            state,
        )
        state["ready"] = True
        status, body = await ask(port, b"GET /readyz?verbose HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (status, body) == (b"HTTP/1.1 200 OK", state)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /readyz HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"\r\n\r\n", b"405"),
        (b"\xff\xfe\x00 \x80\r\n\r\n", b"405"),
    ],
)
async def test_health_answers_only_what_it_has(request_: bytes, status: bytes) -> None:
    async with endpoint({"ready": True}) as port:
        assert status in (await ask(port, request_))[0]


async def test_health_does_not_wait_for_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TIMEOUT", 0.1)
    async with endpoint({"ready": True}) as port:
        assert await ask(port, b"GET /livez HTTP/1.1\r\n") == (b"", None)


async def test_health_reads_no_more_than_its_limit() -> None:
    async with endpoint({"ready": True}) as port:
        with suppress(ConnectionResetError):
            assert await ask(port, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 100_000) == (b"", None)


async def test_health_bounds_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 0)
    async with endpoint({"ready": True}) as port:
        with suppress(ConnectionResetError):
            assert await ask(port, b"GET /livez HTTP/1.1\r\n\r\n") == (b"", None)


async def test_health_says_which_address_is_taken() -> None:
    async with endpoint({"ready": True}) as port:
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            await HealthServer(dict).start("127.0.0.1", port)
