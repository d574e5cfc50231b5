"""The steps of one attempt: which are remembered, which run, and what a resumed run may ask for.

A run that resumes executes its function again from the top. A step it has finished gives back its
result at once; the first one it has not finished is where it goes on. So the steps are all that
must be the same each time: their names, their order in a branch, the functions they call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import anyio

from brokertask.claim import Claim
from brokertask.claims import Claims
from brokertask.clock import Clock, SystemClock
from brokertask.errors import (
    InvalidOption,
    MemoryFull,
    PayloadUnavailable,
    StepMismatch,
)
from brokertask.functions import call, qualified_name, result_type
from brokertask.memory import Memory, Metadata, Step
from brokertask.places import SLEEP, Asked, Places
from brokertask.results import packed, restored
from brokertask.retry import Retry
from brokertask.telemetry import AttemptSpan
from brokertask.values import MSGPACK, decode, encode

log = logging.getLogger("brokertask.task")
T = TypeVar("T")

SLEEP_IN_PLACE: Final = 5.0
"""A sleep of up to so many seconds keeps its slot: leaving and coming back costs about as much as
three messages and the replay of the run."""
NEARLY_FULL: Final = 0.8
TURNS: Final = 5
"""Turns of the event loop in which all that is ready to happen beside a sleep has happened."""
_ONCE: Final = Retry(max_attempts=1)
_inside: ContextVar[Steps | None] = ContextVar("brokertask_steps_inside", default=None)
"""Whose step is being performed here."""


class StepSpan(Protocol):
    """Where a step tells of its own retries."""

    def retried(self, error: BaseException, delay: float) -> None:
        """Say that it failed, and is tried again after `delay` seconds."""
        ...


class Host(Protocol):
    """What the steps of an attempt need of whoever performs it."""

    async def save(self) -> None:
        """Return when the memory, as it is now, survives a crash of this process."""
        ...

    def sleep(self, due_ms: int) -> None:
        """Let the run leave its slot until then: cancels the task's code."""
        ...


class Steps:
    """What a run remembers, as the attempt that has it in hands goes on.

    Attributes:
        memory: What the run remembers at this moment.
        defect: Why the attempt cannot go on, whatever its code makes of it.
        resting: How many steps and sleeps only wait for time to pass.
    """

    def __init__(
        self,
        memory: Memory = Memory(),  # noqa: B008 (immutable)
        *,
        host: Host | None = None,
        span: AttemptSpan | None = None,
        clock: Clock | None = None,
        threads: anyio.CapacityLimiter | None = None,
        max_bytes: int = 1_048_576,
        claims: Claims | None = None,
    ) -> None:
        self.memory = memory
        self.defect: StepMismatch | MemoryFull | PayloadUnavailable | None = None
        self.resting = 0
        self._host = host
        self._span = span
        self._clock = clock or SystemClock()
        self._threads = threads
        self._max_bytes = max_bytes
        self._claims = claims or Claims()
        self._finished = {step.key: step for step in memory.steps}
        self._places = Places(memory.steps)
        self._closed = False
        self._workers: list[asyncio.Task[Any]] = []
        """The asyncio tasks in which steps run at this moment."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurry = asyncio.Event()
        self._sleeping: list[int] = []
        self._served: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """Take the current asyncio task for the one that the task's function runs in."""
        self._places.begin()

    def close(self) -> None:
        """Let no further step begin, and let go of threads that wait for one."""
        self._closed = True
        for task in self._served:
            task.cancel()

    async def finish(self) -> None:
        """Let no further step begin, and return when those that run have ended.

        Cancelled, it ends them: nobody else would, and another attempt begins them anew.
        """
        self.close()
        try:
            await self._idle.wait()
        except asyncio.CancelledError:
            for task in self._workers:
                task.cancel()
            raise

    async def serve(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` for a thread, which is let go when the attempt ends."""
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        try:
            return await work
        finally:
            self._served.discard(task)

    def drain(self) -> None:
        """Let no sleep keep the slot from now on."""
        self._hurry.set()

    def put_metadata(self, metadata: Metadata) -> None:
        """Remember `metadata` in place of what there was.

        Raises:
            InvalidPayload: Something in it has no form on the wire.
            MemoryFull: It does not fit.
        """
        # A copy, as it comes back: what the caller keeps of it must not change the memory.
        copy = decode(encode({"metadata": metadata}), MSGPACK)["metadata"]
        self._remember(replace(self.memory, metadata=copy), "metadata")

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        retry: Retry | None,
        timeout: float | None,
    ) -> Coroutine[Any, Any, Any]:
        """Return what gives the step's result, remembered or new; it has its place from now on."""
        return self._step(
            self._ask(name, qualified_name(function)),
            partial(function, *arguments) if arguments else function,
            retry or _ONCE,
            timeout,
        )

    def sleep(self, due: Callable[[int], int], *, name: str | None) -> Coroutine[Any, Any, None]:
        """Return what ends at an instant, `due` of the present; both in ms since the epoch."""
        return self._sleep(self._ask(name, SLEEP), due)

    # -- what is asked for

    def _ask(self, name: str | None, function: str) -> Asked:
        if _inside.get() is self:
            # Remembered, the outer one would not ask for it, and the places would shift.
            return Asked(
                name or SLEEP,
                function,
                problem=InvalidOption(f"{name or SLEEP!r} is within a step"),
            )
        asked = self._places.ask(name, function)
        if isinstance(asked.problem, StepMismatch) and not self._closed:
            self.defect = self.defect or asked.problem
        return asked

    def _admit(self, asked: Asked) -> None:
        if self._closed:
            raise asyncio.CancelledError("the attempt is over")
        if (problem := asked.problem or self.defect) is not None:
            raise problem

    # -- steps

    async def _step(
        self, asked: Asked, function: Callable[[], Any], retry: Retry, timeout: float | None
    ) -> Any:
        self._admit(asked)
        kind = result_type(function)
        known = self._finished.get(asked.key)
        if known is None:
            with self._working(asked):
                value = await self._try(asked, function, retry, timeout)
                result = packed(asked.key, kind, value)
                # First: what does not come back must not be remembered.
                value = restored(asked.key, kind, result)
                await self._finish(asked, result)
            return value
        if self._span is not None:
            self._span.remembered(asked.key)
        return restored(asked.key, kind, await self._result(known))

    @contextmanager
    def _working(self, asked: Asked) -> Iterator[None]:
        """Hold up the end of the attempt and its sleep: what a step does must not be lost."""
        task = asyncio.current_task()
        assert task is not None
        self._workers.append(task)
        self._idle.clear()
        try:
            yield
        except BaseException:
            self._places.failed(asked)
            raise
        finally:
            self._workers.remove(task)
            if not self._workers:
                self._idle.set()

    async def _try(
        self, asked: Asked, function: Callable[[], Any], retry: Retry, timeout: float | None
    ) -> Any:
        """Call a step's function until it returns or its own retries are spent."""
        with self._traced(asked.key) as span:
            number = 1
            while True:
                try:
                    return await self._call(asked.key, function, timeout)
                except Exception as error:
                    decision = retry.decide(number, error)
                    if decision.delay is None:
                        raise
                    if span is not None:
                        span.retried(error, decision.delay)
                    delay = decision.delay
                number += 1
                await self._rest(delay)

    async def _call(self, key: str, function: Callable[[], Any], timeout: float | None) -> Any:
        limit, inside = asyncio.timeout(timeout), _inside.set(self)
        try:
            async with limit:
                return await call(function, threads=self._threads)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"step {key!r} took longer than {timeout:g} s") from error
        except (SystemExit, KeyboardInterrupt) as error:
            # In an asyncio task of its own it would end the worker's event loop.
            raise RuntimeError(f"step {key!r} raised {type(error).__name__}") from error
        finally:
            _inside.reset(inside)

    @contextmanager
    def _traced(self, key: str) -> Iterator[StepSpan | None]:
        if self._span is None:
            yield None
        else:
            with self._span.step(key) as span:
                yield span

    async def _finish(self, asked: Asked, result: bytes) -> None:
        """Remember a finished step; it is safe when this returns."""
        claim = await self._stored(self._claims.put(result))
        step = Step(asked.key, asked.function, asked.after, claim or result)
        self._remember(replace(self.memory, steps=(*self.memory.steps, step)), asked.key)
        self._finished[step.key] = step
        if self._host is not None:
            await self._host.save()

    async def _result(self, known: Step) -> bytes:
        """Return the result of a finished step, in msgpack."""
        if isinstance(known.result, Claim):
            return await self._stored(self._claims.get(known.result))
        return known.result

    async def _stored(self, asking: Awaitable[T]) -> T:
        """Return what the payload store answers.

        If it fails, the attempt must not go on as if it were the step that had failed.
        """
        try:
            return await asking
        except PayloadUnavailable as error:
            self.defect = self.defect or error
            raise

    def _remember(self, memory: Memory, what: str) -> None:
        size, before = memory.size, self.memory.size
        if size > self._max_bytes:
            largest = ", ".join(f"{key!r} {size} bytes" for key, size in memory.largest())
            self.defect = MemoryFull(
                f"with {what!r} the run remembers {size} bytes, the limit is {self._max_bytes} "
                f"(max_memory_bytes); the largest steps: {largest or 'none'}. Let steps return "
                "references to large data, or raise the limit"
            )
            raise self.defect
        if size > self._max_bytes * NEARLY_FULL >= before:
            log.warning("a run remembers %d bytes, the limit is %d", size, self._max_bytes)
        self.memory = memory

    # -- sleeps

    async def _sleep(self, asked: Asked, due: Callable[[int], int]) -> None:
        self._admit(asked)
        known = self._finished.get(asked.key)
        if known is not None:
            due_ms = int(decode(await self._result(known), MSGPACK))
        else:
            due_ms = due(self._clock.now_ms())
            step = Step(asked.key, asked.function, asked.after, encode(due_ms))
            # Not saved by itself: it is with what follows it, and forgotten it only sleeps again.
            self._remember(replace(self.memory, steps=(*self.memory.steps, step)), asked.key)
            self._finished[step.key] = step
        self._sleeping.append(due_ms)
        try:
            await self._sleep_until(due_ms)
        except BaseException:
            self._places.failed(asked)
            raise
        finally:
            self._sleeping.remove(due_ms)

    async def _sleep_until(self, due_ms: int) -> None:
        left = (due_ms - self._clock.now_ms()) / 1000
        if left <= 0:
            return
        if self._host is None or (left <= SLEEP_IN_PLACE and not self._hurry.is_set()):
            await self._rest(left, None if self._host is None else self._hurry)
            if self._host is None or due_ms <= self._clock.now_ms():
                return
        await self._rested()
        if self._closed or self.defect is not None:
            # The code has ended meanwhile, or cannot go on: what it came to is not a sleep.
            raise asyncio.CancelledError("the attempt is over")
        if due_ms > self._clock.now_ms():
            self.close()
            self._host.sleep(min(self._sleeping))
            # There comes the cancellation, unless this is an asyncio task that nobody cancels with
            # the one that the function runs in.
            await asyncio.sleep(0)
            raise asyncio.CancelledError(SLEEP)

    async def _rested(self) -> None:
        """Return when no step runs: cut, it would be done once more."""
        while True:
            await self._idle.wait()
            # What was asked for together with this, or goes on where a step has ended, begins; and
            # what was raised beside it comes to the task's own code.
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if not self._workers:
                return

    async def _rest(self, delay: float, hurry: asyncio.Event | None = None) -> None:
        """Let `delay` seconds pass, or less if there is a hurry."""
        self.resting += 1
        waits = [asyncio.ensure_future(self._clock.sleep(delay))]
        if hurry is not None:
            waits.append(asyncio.ensure_future(_until(hurry)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.resting -= 1
            for wait in waits:
                wait.cancel()


async def _until(event: asyncio.Event) -> None:
    await event.wait()
