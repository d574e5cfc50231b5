"""An app on virtual time whose every turn of the event loop is the same each time it is run.

`Harness` looks at the real clock now and then. Where a fault is to strike at each turn in turn, or
an example is to be shrunk, nothing may depend on how fast the machine is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Final, TypeAlias

from brokertask import App, Event, Run, Settings, Worker
from brokertask.clock import VirtualClock
from brokertask.deadletter import DeadLetter
from brokertask.envelope import Message
from brokertask.topology import IN_PLACE_MS, Binding, Queue, Route
from brokertask.transport.memory import MemoryBroker, MemoryTransport

OVER: Final = ("completed", "failed", "expired")
QUIET: Final = 8
"""Turns without anything to do after which time passes."""
PATIENCE: Final = 20.0


class StagedTransport(MemoryTransport):
    """A connection whose confirms come some turns of the event loop after the message has."""

    def __init__(self, broker: MemoryBroker, latency: int) -> None:
        super().__init__(broker)
        self._latency = latency

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        await super().publish(route, message, timeout=timeout, mandatory=mandatory)
        for _ in range(self._latency):
            await asyncio.sleep(0)

    def cut(self) -> None:
        """Lose this connection alone, and have it again."""
        self._connection.lose()
        for name in self._broker.queues:
            self._broker.queue(name).pump()


class StagedApp(App):
    """An app on a broker of its own, that knows its connections."""

    def __init__(self, *, latency: int = 0) -> None:
        super().__init__("rehearsal", settings=Settings(amqp_url="memory:"))
        self.clock_on_stage = VirtualClock()
        self.broker = MemoryBroker(self.clock_on_stage)
        self.transports: list[StagedTransport] = []
        self._latency = latency

    def connect(self) -> StagedTransport:
        transport = StagedTransport(self.broker, self._latency)
        self.transports.append(transport)
        return transport


class Rehearsal:
    """An app with one worker at a time, on a broker that can be made to fail.

    Attributes:
        worker: The present one.
        transport: Its connection.
        events: Every event, in order.
    """

    def __init__(self, app: StagedApp) -> None:
        self.app = app
        self.clock = app.clock_on_stage
        self.broker = app.broker
        self.events: list[Event] = []
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Rehearsal:
        stack = self._resources
        stack.callback(self.broker.close)
        stack.enter_context(self.app.on(self.broker))
        listening = MemoryTransport(self.broker)
        await listening.open(timeout=1)
        stack.push_async_callback(listening.close)
        await self.start_worker()
        queue = Queue("rehearsal", {"x-queue-type": "classic"})
        events = Binding(self.app.settings.names.events, queue.name, "#")
        await listening.listen(
            queue, (events,), lambda message: self.events.append(Event.read(message))
        )
        stack.push_async_callback(self.app.client.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.worker.stop(grace=0)
        await self._resources.aclose()

    async def start_worker(self) -> None:
        self._others = asyncio.all_tasks()
        self.worker: Worker = self.app.worker()
        await self.worker.start()
        self.transport = self.app.transports[-1]

    async def drain(self) -> None:
        """Stop the worker as a deployment does that has no time, and start another."""
        await self.worker.stop(grace=0)
        await self.start_worker()

    async def crash(self) -> None:
        """End the worker in the middle of everything, and start another."""
        doomed = asyncio.all_tasks() - self._others - {asyncio.current_task()}
        for task in doomed:
            task.cancel()
        await self.transport.close()
        await asyncio.gather(*doomed, return_exceptions=True)
        await self.worker.stop(grace=0)
        await self.start_worker()

    async def pass_turns(self, count: int) -> None:
        """Let the event loop turn; after some turns in which nobody works, time passes."""
        quiet = 0
        for _ in range(count):
            await asyncio.sleep(0)
            due = self.clock.next_ms()
            # A run that waits out the last milliseconds of its delay counts as busy.
            soon = due is not None and due <= self.clock.now_ms() + IN_PLACE_MS
            quiet = quiet + 1 if soon or self.worker.busy <= self.worker.resting else 0
            if quiet >= QUIET and due is not None:
                self.clock.advance_to(due)
                quiet = 0

    async def until_over(self, run: Run[Any]) -> None:
        """Return when a run has ended, with the turns and the time that it takes."""
        async with asyncio.timeout(PATIENCE):
            while not self.over(run):
                await self.pass_turns(QUIET * 2)

    def over(self, run: Run[Any]) -> bool:
        return any(event.run_id == run.run_id and event.event in OVER for event in self.events)

    def last(self, run: Run[Any]) -> Event:
        return [event for event in self.events if event.run_id == run.run_id][-1]

    def dead_letters(self, task: str) -> list[DeadLetter]:
        queue = self.app.settings.names.dead_queue(task)
        return [DeadLetter.read(message, task=task) for message in self.broker.messages(queue)]

    async def left(self) -> dict[str, int]:
        """Let a day pass, stop the worker, and return what is left in any queue."""
        self.clock.advance_to(self.clock.now_ms() + 86_400_000)
        await self.pass_turns(20 * QUIET)
        await self.worker.stop(grace=0)
        queues = [name for name in self.broker.queues if name != self.app.settings.names.control]
        counts = {name: len(self.broker.messages(name)) for name in queues}
        return {name: count for name, count in counts.items() if count}


Fault: TypeAlias = Callable[[Rehearsal], Awaitable[None]]


async def cut(rehearsal: Rehearsal) -> None:
    """Lose the connection, and have it again."""
    rehearsal.broker.drop_connections()


async def cut_twice(rehearsal: Rehearsal) -> None:
    """Lose what came back right after the connection was lost."""
    rehearsal.broker.drop_connections()
    await asyncio.sleep(0)
    rehearsal.broker.drop_connections()


async def late_cut(rehearsal: Rehearsal) -> None:
    """Lose the connection when what comes back to an inflight queue is long expired."""
    rehearsal.clock.advance_to(rehearsal.clock.now_ms() + 60_000)
    rehearsal.broker.drop_connections()


async def restart(rehearsal: Rehearsal) -> None:
    """Have the broker go down for a while."""
    rehearsal.broker.stop()
    for _ in range(30):
        await asyncio.sleep(0)
    rehearsal.broker.start()


async def alarm(rehearsal: Rehearsal) -> None:
    """Have nothing published for a while."""
    rehearsal.broker.block()
    for _ in range(30):
        await asyncio.sleep(0)
    rehearsal.broker.unblock()


async def drain(rehearsal: Rehearsal) -> None:
    """Have a deployment that hands everything back."""
    await rehearsal.drain()


async def crash(rehearsal: Rehearsal) -> None:
    """Kill the worker."""
    await rehearsal.crash()
