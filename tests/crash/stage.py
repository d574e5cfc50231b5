"""What a bad day is played on: a broker, real worker processes, a publisher, and the journal.

A test does the harm and says what it expects; `Stage.check` asserts what has to hold after every
one of them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from inspect import isawaitable
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack
from urllib.parse import quote, urlsplit

from brokertask import App, Event, PublishError, Run, Settings
from brokertask.deadletter import DeadLetter
from brokertask.envelope import Message
from brokertask.identity import uuid7
from brokertask.topology import Names
from brokertask.transport.base import Delivery
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.transport.rabbitmq.link import BACKOFF_MAX
from brokertask.trigger import TriggerOptions
from infra.rabbitmq.node import Node
from tests.crash import subject
from tests.crash.journal import VARIABLE, Entry, Journal

ROOT = Path(__file__).parents[2]
SUBJECT = "tests.crash.subject:app"
SECONDS = 15.0
"""How long a test waits for what must happen; only a failing test takes that long."""


async def eventually(condition: Callable[[], Any], what: str, *, timeout: float = SECONDS) -> Any:
    """Return what `condition` returns once it is true; for files and brokers, which tell nobody."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        value = await answer if isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout:g} s there is still no {what}")
        await asyncio.sleep(0.02)


class Gate:
    """A file that runs of `held` wait for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def open(self) -> None:
        self._path.touch()


class WorkerProcess:
    """A `brokertask worker` of real processes: the supervisor and its children."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def log(self) -> str:
        """All that supervisor and children said so far."""
        return self._log.read_text(errors="replace")

    @property
    def children(self) -> list[int]:
        """The pids of the children that live."""
        pid = self.process.pid
        try:
            return [
                int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            ]
        except FileNotFoundError:
            return []

    async def busy(self) -> int:
        """Return how many deliveries its processes hold, as they reported within half a second."""
        found = re.search(r"http://(.+?):(\d+)/readyz", self.log)
        assert found, f"there is no health endpoint in the log:\n{self.log}"
        reader, writer = await asyncio.open_connection(found[1], int(found[2]))
        writer.write(b"GET /readyz HTTP/1.1\r\n\r\n")
        answer = await reader.read()
        writer.close()
        state = json.loads(answer.partition(b"\r\n\r\n")[2])
        return sum(process["busy"] for process in state["processes"])

    async def said(self, text: str, *, times: int = 1, timeout: float = SECONDS) -> None:
        """Return once the log holds `text` so often."""
        try:
            await eventually(lambda: self.log.count(text) >= times, text, timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error} in the log:\n{self.log[-4000:]}") from None

    async def stop(self, *, timeout: float = 30.0) -> int:
        """Tell it to stop, in order, and return its exit code."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(timeout):
            return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL it and all its children."""
        for pid in (self.process.pid, *self.children):
            kill(pid)
        await self.process.wait()


async def start_worker(
    url: str,
    journal: Path,
    log: Path,
    *,
    app: str = SUBJECT,
    processes: int = 1,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> WorkerProcess:
    """Start a `brokertask worker`; see `WorkerProcess.said` for when it consumes."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "brokertask.cli", "worker", app),
            *("--processes", str(processes), "--health", "127.0.0.1:0", *arguments),
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={
                **os.environ,
                "BROKERTASK_AMQP_URL": url,
                "PYTHONUNBUFFERED": "1",
                VARIABLE: str(journal),
                **(environment or {}),
            },
        )
    return WorkerProcess(process, log)


def private_node(folder: Path) -> Node:
    """Start a private node with the settings recommended for production.

    Without them a message that a dying broker was moving between two queues can take 180 s to
    arrive: it is not lost, but these tests would have to wait for it.
    """
    node = Node.create(folder)
    shutil.copy(ROOT / "infra/rabbitmq/advanced.config", node.directory)
    return node.start()


def transport_to(url: str) -> RabbitTransport:
    """Return a transport on the data plane of the environment."""
    return RabbitTransport(url, data_plane=Settings().data_plane)


def kill(pid: int) -> None:
    """SIGKILL a process of ours; it may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Stage:
    """A virtual host with the topology of the subject, and who plays on it."""

    def __init__(self, node: Node, url: str, folder: Path) -> None:
        self.node = node
        self.url = url
        self.names = Names()
        self.folder = folder
        self.journal = Journal(folder / "journal")
        self.accepted: dict[str, str] = {}
        """Run ids by which the broker owes us an end, and their tasks."""
        self.events: list[Event] = []
        self.workers: list[WorkerProcess] = []
        self._numbers = count(1)
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Stage:
        self.transport = transport_to(self.url)
        self._resources.push_async_callback(self.transport.close)
        await self.transport.open(timeout=SECONDS)
        await self.transport.declare(subject.app.topology())
        self.app = await self.client(self.url)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            if worker.alive:
                await worker.kill()
        await self._resources.aclose()

    async def client(self, url: str, **settings: Any) -> App:
        """Return a connected app that has no tasks of its own, and triggers by id."""
        app = App("stage", settings=Settings(amqp_url=url, **settings))
        await self._resources.enter_async_context(app)
        return app

    async def worker(
        self,
        *,
        url: str | None = None,
        processes: int = 1,
        arguments: tuple[str, ...] = (),
        **settings: object,
    ) -> WorkerProcess:
        """Start a worker, and return when it consumes; `settings` are BROKERTASK_…, in any case."""
        worker = await start_worker(
            url or self.url,
            self.journal.path,
            self.folder / f"worker-{next(self._numbers)}.log",
            processes=processes,
            arguments=arguments,
            environment={f"BROKERTASK_{name.upper()}": str(v) for name, v in settings.items()},
        )
        self.workers.append(worker)
        await worker.said(" consumes ", times=processes)
        return worker

    async def trigger(
        self, task: str, payload: object = None, **options: Unpack[TriggerOptions]
    ) -> Run[Any]:
        """Trigger, and remember that the broker took it."""
        run = await self.app.client.trigger(task, payload, **options)
        self.accepted[run.run_id] = task
        return run

    async def trigger_surely(
        self,
        task: str,
        payload: object = None,
        *,
        app: App | None = None,
        run_id: str | None = None,
        delay: float = 0,
    ) -> tuple[Run[Any], int]:
        """Trigger as the guide says: after an error, once more with the same run id.

        Returns the run, and how many times it was triggered.
        """
        client = (app or self.app).client
        run_id = run_id or uuid7(time.time_ns() // 1_000_000)
        for times in count(1):
            try:
                run = await client.trigger(task, payload, run_id=run_id, delay=delay)
            except PublishError:
                await asyncio.sleep(0.05)
            else:
                self.accepted[run_id] = task
                return run, times
        raise AssertionError("count has no end")

    def put(self, task: str, body: bytes, **properties: Any) -> None:
        """Publish whatever to the queue of a task, as a program would that knows nothing of us."""
        vhost, exchange = quote(urlsplit(self.url).path[1:], safe=""), self.names.tasks
        message = {
            "routing_key": task,
            "properties": {"delivery_mode": 2, **properties},
            "payload": base64.b64encode(body).decode(),
            "payload_encoding": "base64",
        }
        answer = self.node.api("POST", f"/api/exchanges/{vhost}/{exchange}/publish", message)
        assert answer["routed"]

    async def until_told(self, run_id: str, fact: str, *, times: int = 1) -> list[Entry]:
        """Return what the run told so often, once it has."""
        await eventually(
            lambda: len(self.journal.of(run_id, fact)) >= times, f"{fact!r} number {times}"
        )
        return self.journal.of(run_id, fact)

    async def until_started(self, run_id: str, *, times: int = 1) -> list[Entry]:
        """Return the run's starts once there are so many."""
        return await self.until_told(run_id, "started", times=times)

    async def until_finished(self, run_id: str, *, timeout: float = SECONDS) -> None:
        """Return once the run's body came to its end."""
        await eventually(
            lambda: self.journal.of(run_id, "finished"), f"end of run {run_id}", timeout=timeout
        )

    async def until_dead(
        self, task: str, *, count: int = 1, timeout: float = SECONDS
    ) -> list[DeadLetter]:
        """Return the dead runs of a task once there are so many."""

        found: list[DeadLetter] = []

        async def enough() -> bool:
            # Looked at once more, some may still be on their way back from this look.
            found[:] = await self.dead(task)
            return len(found) >= count

        await eventually(enough, f"dead letter number {count} of {task}", timeout=timeout)
        return found

    async def dead(self, task: str) -> list[DeadLetter]:
        """Return what is in the dead-letter queue of a task, and leave it there."""
        messages = await self.messages(self.names.dead_queue(task))
        return [DeadLetter.read(message, task=task) for message in messages]

    async def messages(self, queue: str) -> list[Message]:
        """Return what is in a queue, and leave it there."""
        depth = await self.transport.depth(queue)
        if depth is None or depth.ready == 0:
            return []
        seen: list[Delivery] = []
        consumer = await self.transport.consume(queue, seen.append, prefetch=0)
        try:
            await eventually(lambda: len(seen) >= depth.ready, f"{depth.ready} from {queue}")
        finally:
            await consumer.close()
        return [delivery.message for delivery in seen]

    async def missing(self) -> set[str]:
        """Return the accepted runs that have neither finished nor died."""
        missing = self.accepted.keys() - self.journal.finished().keys()
        for task in {self.accepted[run_id] for run_id in missing}:
            missing -= {letter.run_id for letter in await self.dead(task)}
        return missing

    async def works(self) -> None:
        """Assert that the workers live, and that a run of theirs completes."""
        assert all(worker.alive for worker in self.workers)
        run = await self.trigger("quick", 1)
        # After cuts in quick succession a worker waits, before it connects once more.
        assert await run.result(timeout=SECONDS + BACKOFF_MAX) == 1

    async def held(self) -> dict[str, int]:
        """Return what every queue holds that has to be empty in the end; it says who holds more."""
        # What is in the control log stays there.
        control = subject.app.settings.names.control
        names = [one.name for one in subject.app.topology().queues if one.name != control]
        names = [name for name in names if not name.startswith(self.names.dead_queue(""))]
        depths = await asyncio.gather(*(self.transport.depth(name) for name in names))
        held = {name: depth.ready for name, depth in zip(names, depths, strict=True) if depth}
        held |= {str(worker.process.pid): await worker.busy() for worker in self.workers}
        return {who: count for who, count in held.items() if count}

    async def until_idle(self, *, lasting: float = 0, timeout: float = 60) -> None:
        """Return once queues are empty and workers idle, for so long without a break.

        A run that has ended may have a double that still goes on.
        """
        idle_since = time.monotonic()

        async def idle() -> bool:
            nonlocal idle_since
            if await self.held():
                idle_since = time.monotonic()
                return False
            return time.monotonic() >= idle_since + lasting

        await eventually(idle, "rest", timeout=timeout)

    async def check(self, *, lasting: float = 0, timeout: float = 30.0) -> None:
        """Assert that nothing is lost, no limit was exceeded, and work goes on.

        Then the workers stop, within their time and with exit code 0, and leave nothing behind.
        """
        await self.works()

        async def none_missing() -> bool:
            return not await self.missing()

        await eventually(none_missing, "end of every run", timeout=timeout)
        await self.until_idle(lasting=lasting, timeout=timeout)
        for task, most in self.journal.most_at_once().items():
            assert most <= subject.app.tasks[task].options.concurrency, task
        for worker in self.workers:
            assert await worker.stop() == 0, worker.log[-4000:]
        self.workers.clear()
        assert await self.held() == {}
