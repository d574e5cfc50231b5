"""A worker: consumes the queues of its tasks, and stops without losing anything.

prefetch = concurrency, per task: what the broker hands over is begun at once, so nothing waits in
a worker that another could be doing. Starting and stopping are decided here; what happens to a
message is the executor's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Final

from brokertask.clock import Clock
from brokertask.control import Entry
from brokertask.executor import Executor
from brokertask.inflight import Inflight
from brokertask.intake import Intake
from brokertask.keeper import Keeper
from brokertask.manifest import MANIFEST, Manifest, tell
from brokertask.performer import Performer
from brokertask.presence import EVERY, WORKER, Presence, State
from brokertask.reports import Reports
from brokertask.runlog import RunLog
from brokertask.settings import Settings
from brokertask.slots import Slots
from brokertask.steering import Steering
from brokertask.task import Middleware, Task
from brokertask.telemetry import Telemetry
from brokertask.topology import Topology
from brokertask.transport.base import Delivery, Transport
from brokertask.typed import schema_of
from brokertask.window import Window

log = logging.getLogger("brokertask.worker")

HAND_BACK_TIMEOUT: Final = 5.0
"""After the grace period: how long handing back may take before the broker takes back by itself."""


class Worker:
    """Runs tasks of one app in this process: `async with worker:`, or `start` and `stop`."""

    def __init__(
        self,
        *,
        tasks: Sequence[Task[Any, Any]],
        concurrency: Mapping[str, int],
        connect: Callable[[], Transport],
        topology: Callable[[], Topology],
        lifespan: Callable[[], AbstractAsyncContextManager[Any]],
        middleware: Sequence[Middleware],
        settings: Settings,
        telemetry: Telemetry,
        clock: Clock,
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.tasks = tuple(tasks)
        self.concurrency = {
            task.id: concurrency.get(task.id, task.options.concurrency) for task in tasks
        }
        self._connect = connect
        self._topology = topology
        self._lifespan = lifespan
        self._middleware = middleware
        self._settings = settings
        self._telemetry = telemetry
        self._clock = clock
        self._resources = AsyncExitStack()
        self._called = asyncio.Event()
        self._started_ms = 0
        self._transport: Transport | None = None
        self._executor: Executor | None = None
        self._inflight: Inflight | None = None
        self._windows = {task: Window(count) for task, count in self.concurrency.items()}
        self._steering = Steering(worker=self.name, settings=settings, clock=clock, obey=self._obey)
        self._intake = Intake(
            self.tasks,
            self._windows,
            names=settings.names,
            to_pause=self._steering.standing.paused,
            receive=self._receive,
        )
        self._executions: dict[asyncio.Task[None], Window] = {}

    @property
    def ready(self) -> bool:
        """Whether it is connected and the broker delivers to each of its consumers."""
        return self._intake.begun and self._transport is not None and self._transport.connected

    @property
    def paused(self) -> frozenset[str]:
        """The tasks that it begins no runs of, as they are paused."""
        return self._intake.paused

    @property
    def busy(self) -> int:
        """How many deliveries it holds."""
        return len(self._executions)

    @property
    def resting(self) -> int:
        """How many of the runs it executes only wait for time to pass."""
        return 0 if self._executor is None else self._executor.resting

    async def __aenter__(self) -> Worker:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Enter the lifespan, connect, declare if so set, and begin to consume.

        Raises:
            BrokerUnavailable, AccessDenied: The broker cannot be reached, or refuses the user.
            TopologyMismatch: A queue on the broker differs from the code.
            ConfigurationError: A queue is missing and may not be declared.
        """
        try:
            self._started_ms = self._clock.now_ms()
            state = await self._resources.enter_async_context(self._lifespan())
            transport = self._transport = self._connect()
            self._resources.push_async_callback(transport.close)
            await transport.open(timeout=self._settings.connect_timeout)
            if self._settings.declare:
                await transport.declare(self._topology())
            reports = self._make_reports(transport)
            inflight = self._inflight = self._make_inflight(transport)
            self._resources.push_async_callback(inflight.close)
            self._executor = self._make_executor(transport, inflight, reports, state)
            keeping = asyncio.create_task(self._executor.keep())
            self._resources.callback(keeping.cancel)
            if any(task.takes_context for task in self.tasks):
                preparing = asyncio.create_task(inflight.prepare())
                self._resources.callback(preparing.cancel)
            self._resources.push_async_callback(self._steering.stop)
            await self._steering.start(transport)
            await self._intake.start(transport)
            telling = asyncio.create_task(self._tell(transport))
            self._resources.callback(telling.cancel)
        except BaseException:
            # What was delivered already is handed back before its pools close.
            await self.stop(grace=0)
            raise
        log.info("worker %s consumes %s", self.name, ", ".join(task.id for task in self.tasks))

    async def stop(self, *, grace: float | None = None) -> None:
        """Take no more work, let runs finish within the grace period, hand back the rest.

        What is handed back does not count as an attempt. Returns when everything is settled, or
        given up to the broker, which then counts it as a lost delivery.
        """
        grace = self._settings.grace if grace is None else grace
        try:
            await self._intake.stop()
            await self._drain(grace)
        finally:
            await self._resources.aclose()

    async def _drain(self, grace: float) -> None:
        """Wait for what is executing; in the end interrupt it, and then cancel it."""
        if self._executor is not None:
            self._executor.drain()
        if self._executions and grace > 0:
            log.info("worker %s lets %d run(s) finish", self.name, self.busy)
            await self._until_idle(grace)
        if self._executions and self._executor is not None:
            log.warning("worker %s hands back %d run(s)", self.name, self.busy)
            self._executor.interrupt()
            await self._until_idle(HAND_BACK_TIMEOUT)
        left = list(self._executions)
        for execution in left:
            execution.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._executor is not None:
            await self._executor.finish()

    async def _until_idle(self, timeout: float) -> None:
        """Wait until nothing executes, what is delivered meanwhile included."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._executions:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or not (await asyncio.wait(self._executions, timeout=left))[0]:
                return

    async def _tell(self, transport: Transport) -> None:
        """Tell the servers what is to be triggered when, and what the tasks take and return."""
        manifest = Manifest(
            worker=self.name,
            at_ms=self._clock.now_ms(),
            schedules={task.id: task.schedule_plain for task in self.tasks},
            schemas={
                task.id: {
                    "payload": schema_of(task.payload_type),
                    "result": schema_of(task.result_type),
                }
                for task in self.tasks
            },
        )
        route = self._settings.names.server_route(MANIFEST)
        await tell(transport, route, manifest, timeout=self._settings.publish_timeout)

    def _make_inflight(self, transport: Transport) -> Inflight:
        return Inflight(
            transport,
            names=self._settings.names,
            worker=self.name,
            timeout=self._settings.publish_timeout,
            receive=self._receive_back,
        )

    def _make_reports(self, transport: Transport) -> Reports:
        """Return how servers are told of what happens here; what runs write to their log begins."""
        reports = Reports(
            transport,
            names=self._settings.names,
            timeout=self._settings.publish_timeout,
            wanted=lambda: self._steering.standing.recording,
            blind=lambda: not self._steering.caught_up,
        )
        self._resources.push_async_callback(reports.finish)
        self._resources.enter_context(RunLog(reports, worker=self.name).attached())
        appearing = asyncio.create_task(self._appear(reports))

        async def leave() -> None:
            appearing.cancel()
            await asyncio.gather(appearing, return_exceptions=True)
            self._show(reports, "stopped")

        self._resources.push_async_callback(leave)
        return reports

    async def _appear(self, reports: Reports) -> None:
        """Say that it is here, at once and every while, or when somebody begins to listen."""
        while True:
            self._called.clear()
            self._show(reports, "working")
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await self._called.wait()

    def _show(self, reports: Reports, state: State) -> None:
        if not reports.wanted:
            return
        to_pause = self._steering.standing.paused
        tasks = {
            task: {"slots": window.slots, "busy": window.taken, "paused": task in to_pause}
            for task, window in self._windows.items()
        }
        presence = Presence(
            worker=self.name,
            state="draining" if self._intake.drained and state == "working" else state,
            at_ms=self._clock.now_ms(),
            started_ms=self._started_ms,
            tasks=tasks,
        )
        reports.send(self._settings.names.event_route(WORKER, self.name), presence.message())

    def _make_executor(
        self, transport: Transport, inflight: Inflight, reports: Reports, state: Any
    ) -> Executor:
        performer = Performer(
            worker=self.name,
            clock=self._clock,
            settings=self._settings,
            middleware=self._middleware,
            state=state,
        )
        keeper = Keeper(
            inflight,
            self._windows,
            clock=self._clock,
            consumer_timeout=self._settings.consumer_timeout,
        )
        return Executor(
            performer=performer,
            slots=Slots(self.concurrency, self._windows, self._telemetry),
            keeper=keeper,
            transport=transport,
            settings=self._settings,
            telemetry=self._telemetry,
            clock=self._clock,
            worker=self.name,
            standing=self._steering.standing,
            reports=reports,
        )

    def _obey(self, entry: Entry) -> None:
        """Do what an entry of the control log says, as far as it is not done by itself."""
        if entry.kind == "cancel" and self._executor is not None:
            self._executor.call_off()
        elif entry.kind in ("pause", "resume"):
            self._intake.change(entry.subject)
            self._called.set()
        elif entry.kind == "drain" and entry.subject == self.name:
            self._intake.drain()
            self._called.set()
        elif entry.kind == "recording":
            self._called.set()

    def _receive(self, task: Task[Any, Any], delivery: Delivery) -> None:
        assert self._executor is not None
        assert self._inflight is not None
        if self._inflight.adopt(delivery):
            return
        window = self._windows[task.id]
        window.take()
        execution = asyncio.create_task(self._executor.execute(delivery, task))
        self._executions[execution] = window
        execution.add_done_callback(self._executed)

    def _receive_back(self, delivery: Delivery) -> None:
        """Take a checkpoint that nobody waits for any more: as any message of its run."""
        for task in self.tasks:
            if task.id == delivery.message.type:
                self._receive(task, delivery)
                return
        log.error("a message in %s is of no task here; it stays there", delivery.queue)

    def _executed(self, execution: asyncio.Task[None]) -> None:
        self._executions.pop(execution).give_back()
        if not execution.cancelled() and (error := execution.exception()) is not None:
            # A defect of ours. The delivery stays unsettled, so nothing is lost; say it loudly.
            log.critical("an execution failed inside brokertask", exc_info=error)
