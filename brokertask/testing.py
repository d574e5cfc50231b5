"""A test kit for users: run an app's tasks in a test, without a broker and without sleeping.

```python
async def test_a_flaky_upstream_is_retried() -> None:
    async with Harness(app) as harness:
        run = await process_document.trigger(Document(path="a.txt"))
        await harness.drain()
        assert harness[run].attempts == 3
        assert await run.result() == Report(sections=2)
```

Messages take the same way as in production: they are written, routed, delivered, retried through
the delay ladder and dead-lettered by the embedded broker. Only time is virtual: `drain` jumps over
delays and backoffs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, Protocol, TypeAlias

from brokertask.app import App
from brokertask.claim import Claim
from brokertask.clock import VirtualClock
from brokertask.deadletter import DeadLetter
from brokertask.durations import Duration, readable, seconds
from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, ConfigurationError
from brokertask.events import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    FAILED,
    PROGRESS,
    RETRYING,
    SLEEPING,
    WAITING,
    WARNING,
    Event,
)
from brokertask.outcome import AttemptError
from brokertask.run import Run
from brokertask.topology import IN_PLACE_MS, Binding, Queue
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.values import MSGPACK, decode

__all__ = ["DrainTimeout", "Harness", "RunRecord"]

Status: TypeAlias = Literal[
    "running", "retrying", "sleeping", "waiting", "completed", "failed", "expired", "cancelled"
]
_STATUS: Final[Mapping[str, Status]] = {
    PROGRESS: "running",
    WARNING: "running",
    RETRYING: "retrying",
    SLEEPING: "sleeping",
    WAITING: "waiting",
    COMPLETED: "completed",
    FAILED: "failed",
    EXPIRED: "expired",
    CANCELLED: "cancelled",
}
_TURNS: Final = 5
"""Turns of the event loop in which everything that is ready to happen has happened."""
_PATIENCE: Final = 0.01


class DrainTimeout(BrokertaskError, TimeoutError):
    """Tasks were still running when `drain` had to return."""


@dataclass(slots=True)
class RunRecord:
    """What was heard of one run."""

    run_id: str
    task: str
    status: Status
    attempts: int = 0
    result: Any = None
    """As plain values; `await run.result()` gives it as its type."""
    reason: str | None = None
    errors: list[AttemptError] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    """The seconds between its attempts, and those it slept."""
    metadata: dict[str, Any] = field(default_factory=dict)
    progress: tuple[float, float | None] | None = None
    warnings: list[str] = field(default_factory=list)


class _Server(Protocol):
    """What the harness needs of its server: see `brokertask.server.embedded`."""

    @property
    def at_rest(self) -> bool: ...

    async def find_token(self, run_id: str, name: str) -> str | None: ...

    async def complete(self, token: str, value: object) -> None: ...

    async def reject(self, token: str, reason: str) -> None: ...

    async def publish(self, key: str, event: object) -> None: ...


class Harness:
    """An app with a worker and an embedded broker of its own, on virtual time.

    With `server=True` also with a server, for waits, keys and schedules. It needs
    brokertask[server], and costs about 0.2 s for each harness.

    Attributes:
        runs: Every run that was attempted, by id, in the order they were first heard of.
        broker: The embedded broker, with its faults: `drop_connections`, `block`, `stop`.
        clock: The virtual clock.
    """

    def __init__(
        self,
        app: App,
        *,
        tasks: Iterable[str] | None = None,
        concurrency: int | Mapping[str, int] | None = None,
        server: bool = False,
    ) -> None:
        self.app = app
        self.clock = VirtualClock()
        self.broker = MemoryBroker(self.clock)
        self.runs: dict[str, RunRecord] = {}
        self._claims: list[tuple[RunRecord, Claim]] = []
        self._tasks = tasks
        self._concurrency = concurrency
        self._serves = server
        self._server: _Server | None = None
        self._resources = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __getitem__(self, run: Run[Any] | str) -> RunRecord:
        """Return what was heard of a run; KeyError if it was never attempted."""
        return self.runs[run if isinstance(run, str) else run.run_id]

    async def __aenter__(self) -> Harness:
        self._loop = asyncio.get_running_loop()
        stack, names = self._resources, self.app.settings.names
        try:
            stack.callback(self.broker.close)
            stack.enter_context(self.app.on(self.broker))
            if self._serves:
                await self._serve()
            self._worker = self.app.worker(tasks=self._tasks, concurrency=self._concurrency)
            await self._worker.start()
            stack.push_async_callback(self._worker.stop, grace=0)
            listening = MemoryTransport(self.broker)
            await listening.open(timeout=1)
            stack.push_async_callback(listening.close)
            queue = Queue(f"{names.namespace}.harness", {"x-queue-type": "classic"})
            await listening.listen(queue, (Binding(names.events, queue.name, "#"),), self._hear)
            await self.app.client.open()
            stack.push_async_callback(self.app.client.close)
        except BaseException:
            await stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.aclose()

    async def drain(self, *, timeout: float = 10.0) -> None:
        """Run everything there is, jumping over every delay, until nothing is left to happen.

        Raises:
            DrainTimeout: Tasks still run after `timeout` seconds of real time.
        """
        await self._until(None, timeout)

    async def advance(self, duration: Duration, *, timeout: float = 10.0) -> None:
        """Run what happens within the next `duration` of virtual time, and stop there.

        Raises:
            DrainTimeout: As `drain`.
        """
        await self._until(self.clock.now_ms() + round(seconds(duration) * 1000), timeout)

    async def complete(self, run: Run[Any] | str, name: str, value: object = None) -> None:
        """Complete the token of that name which a run waits for, with a plain value.

        What happens now happens first: the run need not have come to its wait yet.

        Raises:
            LookupError: The run waits for no such token.
            InvalidPayload: The value has no form in msgpack.
        """
        server = self._serving()
        await server.complete(await self._token(server, run, name), value)

    async def reject(self, run: Run[Any] | str, name: str, reason: str = "") -> None:
        """Reject the token of that name which a run waits for: the run gets `Rejected`.

        Raises:
            LookupError: As `complete`.
        """
        server = self._serving()
        await server.reject(await self._token(server, run, name), reason)

    async def publish(self, key: str, event: Mapping[str, Any]) -> None:
        """Publish an event, for the runs that wait for one of that key.

        Raises:
            InvalidPayload: It has no form in msgpack.
        """
        await self._serving().publish(key, event)

    async def stop_worker(self, *, grace: float = 10.0) -> None:
        """Stop the harness's own worker, as a SIGTERM would; what it had not done stays queued."""
        await self._worker.stop(grace=grace)

    def dead_letters(self, task: str) -> list[DeadLetter]:
        """Return what is in the dead-letter queue of a task, oldest first."""
        queue = self.app.settings.names.dead_queue(task)
        return [DeadLetter.read(message, task=task) for message in self.broker.messages(queue)]

    async def _serve(self) -> None:
        try:
            # Whoever tests without a server needs nothing of what one is made of.
            from brokertask.server.embedded import EmbeddedServer
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"{error.name} is not installed: pip install 'brokertask[server]'"
            ) from error
        server = EmbeddedServer(self.app.settings, self.broker)
        self._server = await self._resources.enter_async_context(server)

    def _serving(self) -> _Server:
        if self._server is None:
            raise ConfigurationError("this harness has no server: Harness(app, server=True)")
        return self._server

    async def _token(self, server: _Server, run: Run[Any] | str, name: str) -> str:
        await self.advance(0)
        run_id = run if isinstance(run, str) else run.run_id
        token = await server.find_token(run_id, name)
        if token is None:
            raise LookupError(f"run {run_id} waits for no token {name!r} now")
        return token

    async def _until(self, end_ms: int | None, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise ConfigurationError(
                "this harness was entered in another event loop; give its fixture the scope of the "
                "test's loop"
            )
        deadline = loop.time() + timeout
        while True:
            await self._settle(deadline)
            # Schedules never end: only `advance` goes from tick to tick.
            due = self.clock.next_ms(background=end_ms is not None)
            busy = self._worker.busy > self._worker.resting or not self._at_rest
            if due is not None and (end_ms is None or due <= end_ms):
                # A run that waits out the last milliseconds of its delay counts as busy.
                if not busy or due <= self.clock.now_ms() + IN_PLACE_MS:
                    self.clock.advance_to(due)
                    continue
            elif not busy:
                break
            if loop.time() > deadline:
                raise DrainTimeout(
                    f"{self._worker.busy} run(s) still going after {readable(timeout)}; "
                    "does a task wait for something the test has to provide?"
                )
            await asyncio.sleep(_PATIENCE)
        if end_ms is not None:
            self.clock.advance_to(end_ms)
        while self._claims:
            record, claim = self._claims.pop()
            record.result = decode(await self.app.client.claims.get(claim), MSGPACK)

    async def _settle(self, deadline: float) -> None:
        """Let the event loop turn until nothing moves by itself."""
        loop, quiet = asyncio.get_running_loop(), 0
        while quiet < _TURNS and loop.time() < deadline:
            await asyncio.sleep(0)
            quiet += 1
            if not self._at_rest:
                quiet = 0
            if not quiet or self._worker.busy > self._worker.resting:
                await asyncio.sleep(_PATIENCE / 10)

    @property
    def _at_rest(self) -> bool:
        return self._server is None or self._server.at_rest

    def _hear(self, message: Message) -> None:
        # Where a server listens, workers tell of themselves and of what happens within runs.
        if (status := _STATUS.get(message.type or "")) is None:
            return
        event = Event.read(message)
        record = self.runs.setdefault(event.run_id, RunRecord(event.run_id, event.task, status))
        record.status = status
        record.attempts = event.attempt
        record.reason = event.reason
        if event.error is not None:
            record.errors.append(event.error)
        if event.metadata is not None:
            record.metadata = dict(event.metadata)
        if event.event == PROGRESS and event.done is not None:
            record.progress = (event.done, event.total)
        if event.warning is not None:
            record.warnings.append(event.warning)
        if event.delay_ms is not None:
            record.delays.append(event.delay_ms / 1000)
        if event.result is not None:
            record.result = decode(event.result, MSGPACK)
        if event.claim is not None:
            self._claims.append((record, event.claim))
