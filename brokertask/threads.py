"""The threads of a worker, in which its sync functions run.

    run ─► queue ─► a thread: function ─► `_done` ─► one wake-up of the event loop for all of them

A result costs the event loop a wake-up, a system call, only if none is on its way already; so
under load many functions share one. Threads are made when none is idle, and stay.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    """A function on its way to a thread, and then what it came to."""

    function: Callable[[], Any]
    context: Context
    ended: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Threads:
    """Threads of one event loop.

    Attributes:
        slots: How many functions that have to wait for each other may run at a time.
    """

    def __init__(self, limit: int) -> None:
        self.slots = asyncio.Semaphore(limit)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[_Job] = deque()
        self._waking = False
        self._lock = threading.Lock()
        self._idle = 0
        self._count = 0
        self._closed = False

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in a thread, in this context, once there is a slot for it.

        Cancelled, it does not wait for the thread, which Python cannot end, and which counts no
        more.
        """
        async with self.slots:
            return await self.run_at_once(function)

    async def run_at_once(self, function: Callable[[], T]) -> T:
        """Do what `run` does, in addition to all that have slots."""
        loop = asyncio.get_running_loop()
        job = _Job(function, copy_context(), loop.create_future())
        if self._idle:
            self._idle -= 1
        else:
            self._count += 1
            name = f"brokertask thread {self._count}"
            # What cannot be ended must not keep the process from its end.
            threading.Thread(target=self._work, args=(loop,), name=name, daemon=True).start()
        self._jobs.put(job)
        if self._closed:
            self._jobs.put(None)
        result: T = await job.ended
        return result

    def close(self) -> None:
        """Let the threads end, each with its function; what is still to come gets new ones."""
        for _ in range(self._count):
            self._jobs.put(None)
        self._idle, self._closed = 0, True

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.ended.cancelled():
                try:
                    job.result = job.context.run(job.function)
                except BaseException as error:
                    job.error = error
            with self._lock:
                self._done.append(job)
                waking, self._waking = self._waking, True
            # Not to be held on to while this thread waits for the next one.
            del job
            if not waking:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            done, self._done = self._done, deque()
            self._waking = False
        if not self._closed:
            self._idle += len(done)
        for job in done:
            if not job.ended.done():
                _end(job)


def _end(job: _Job) -> None:
    if job.error is None:
        job.ended.set_result(job.result)
    elif isinstance(job.error, StopIteration):
        # A future cannot hold one: it would end the coroutine that waits for it.
        wrapped = RuntimeError("a function in a thread raised StopIteration")
        wrapped.__cause__ = job.error
        job.ended.set_exception(wrapped)
    else:
        job.ended.set_exception(job.error)
