"""What a worker consumes: the queues of its tasks, but for those that are paused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from brokertask.errors import BrokertaskError
from brokertask.task import Task
from brokertask.topology import Names
from brokertask.transport.base import Consumer, Delivery, Transport
from brokertask.window import Window

log = logging.getLogger("brokertask.worker")

RETRY: Final = 1.0
Receive: TypeAlias = Callable[[Task[Any, Any], Delivery], None]


class Intake:
    """Consumes the queues of a worker's tasks, each as long as it is not to be paused."""

    def __init__(
        self,
        tasks: Sequence[Task[Any, Any]],
        windows: Mapping[str, Window],
        *,
        names: Names,
        to_pause: Collection[str],
        receive: Receive,
    ) -> None:
        self._to_pause = to_pause
        self.drained = False
        self._tasks = {task.id: task for task in tasks}
        self._windows = windows
        self._names = names
        self._receive = receive
        self._transport: Transport | None = None
        self._consumers: dict[str, list[Consumer]] = {}
        self._former: dict[str, list[Consumer]] = {}
        """Those of before a pause, which may still hold what is in hands."""
        self._changing = {task: asyncio.Lock() for task in self._tasks}
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def begun(self) -> bool:
        """Whether it was started and not stopped."""
        return self._transport is not None

    @property
    def paused(self) -> frozenset[str]:
        """The tasks that are not consumed."""
        return frozenset(self._tasks.keys() - self._consumers.keys() if self.begun else ())

    async def start(self, transport: Transport) -> None:
        """Consume all queues but those of paused tasks.

        Raises:
            ConfigurationError: A queue is missing.
            AccessDenied: This user may not read one.
        """
        for task in self._tasks:
            if not self._held(task):
                await self._begin(transport, task)
        self._transport = transport
        for task in self._tasks:
            # It may have been paused or resumed meanwhile.
            self.change(task)

    def change(self, task: str) -> None:
        """Begin to consume a task's queue, or end it, if it was resumed or paused."""
        if task in self._tasks and self._transport is not None:
            change = asyncio.create_task(self._fit(task, self._transport))
            self._changes.add(change)
            change.add_done_callback(self._changes.discard)

    def drain(self) -> None:
        """Consume nothing from now on, whatever is resumed; what has begun goes on."""
        self.drained = True
        for task in self._tasks:
            self.change(task)

    async def stop(self) -> None:
        """Take nothing more; what was delivered can be settled."""
        self._transport = None
        for change in list(self._changes):
            change.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        consumers = [one for some in self._consumers.values() for one in some]
        self._consumers.clear()
        stops = (consumer.stop() for consumer in consumers)
        for problem in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(problem, Exception):
                log.error("a consumer does not stop in order", exc_info=problem)

    def _held(self, task: str) -> bool:
        return self.drained or task in self._to_pause

    async def _fit(self, task: str, transport: Transport) -> None:
        """Bring a task's consumers to what holds for it; again and again if that fails."""
        async with self._changing[task]:
            while (task in self._consumers) == self._held(task):
                try:
                    if self._held(task):
                        await self._end(task)
                    else:
                        await self._begin(transport, task)
                except BrokertaskError as error:
                    log.warning("%s cannot be resumed yet: %s", task, error)
                    await asyncio.sleep(RETRY)

    async def _begin(self, transport: Transport, task: str) -> None:
        declared, window = self._tasks[task], self._windows[task]
        queues = [self._names.queue(task)]
        if declared.options.queue.max_length is not None:
            # Both queues feed the same slots; between them up to twice the prefetch is held.
            queues.append(self._names.intake(task))
        begun: list[Consumer] = []
        try:
            for queue in queues:
                begun.append(await self._consume(transport, queue, declared))  # noqa: PERF401
        except BaseException:
            for consumer in begun:
                await consumer.stop()
            raise
        window.read_by(begun)
        self._consumers[task] = begun

    async def _consume(self, transport: Transport, queue: str, task: Task[Any, Any]) -> Consumer:
        receive, slots = partial(self._receive, task), self._windows[task.id].slots
        return await transport.consume(queue, receive, prefetch=slots, limited=task.checkpoints)

    async def _end(self, task: str) -> None:
        """Consume no more of a task; what it has in hands goes on."""
        ended, window = self._consumers[task], self._windows[task]
        window.read_by(())
        for consumer in ended:
            await consumer.stop()
        del self._consumers[task]
        former = self._former.setdefault(task, [])
        former += ended
        while former and not window.taken:
            await former.pop().close()
        log.info("%s is not consumed any more", task)
