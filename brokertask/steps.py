"""The steps of one attempt: which are remembered, which run, and what a resumed run may ask for.

A run that resumes executes its function again from the top. A step it has finished gives back its
result at once; the first one it has not finished is where it goes on. So the steps are all that
must be the same each time: their names, their order in a branch, the functions they call.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final, Never, TypeVar

from brokertask.claim import Claim
from brokertask.claims import Claims
from brokertask.clock import Clock, SystemClock
from brokertask.errors import (
    BrokertaskError,
    InvalidOption,
    MemoryFull,
    PayloadUnavailable,
    StepMismatch,
    UnsupportedType,
)
from brokertask.functions import InThread, qualified_name, result_type, running_loop
from brokertask.hosting import Host
from brokertask.memory import Memory, Metadata, Step
from brokertask.places import SLEEP, Asked, Places
from brokertask.results import packed, plain, restored
from brokertask.retry import Retry
from brokertask.telemetry import AttemptSpan
from brokertask.tries import Rest, Tries, inside
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


class Steps:
    """What a run remembers, as the attempt that has it in hands goes on.

    Attributes:
        memory: What the run remembers at this moment.
        defect: Why the attempt cannot go on, whatever its code makes of it.
        loop: The event loop that the attempt lives in; None outside of a worker.
    """

    def __init__(
        self,
        memory: Memory = Memory(),  # noqa: B008 (immutable)
        *,
        host: Host | None = None,
        span: AttemptSpan | None = None,
        clock: Clock | None = None,
        thread: InThread | None = None,
        max_bytes: int = 1_048_576,
        claims: Claims | None = None,
    ) -> None:
        self.memory = memory
        self.defect: BrokertaskError | None = None
        self.loop = running_loop()
        self.host = host
        self._span = span
        self.clock = clock or SystemClock()
        self._thread = thread
        self._max_bytes = max_bytes
        self.claims = claims or Claims()
        self._finished = {step.key: step for step in memory.steps}
        self._places = Places(memory.steps)
        self._closed = False
        self._changing = threading.Lock()
        self._unbegun: dict[str, Coroutine[Any, Any, Any]] = {}
        """Calls whose coroutines have not been awaited yet, by key."""
        self._workers: list[asyncio.Task[Any]] = []
        """The asyncio tasks in which steps run at this moment."""
        self._sleeping: list[int] = []
        self._waiting: list[str] = []
        self._served: set[asyncio.Task[Any]] = set()

    # Most runs have no steps, and need none of these.

    @cached_property
    def _rest(self) -> Rest:
        return Rest(self.clock)

    @cached_property
    def _tries(self) -> Tries:
        return Tries(self._places, span=self._span, thread=self._thread, rest=self._rest)

    @cached_property
    def _idle(self) -> asyncio.Event:
        return asyncio.Event()

    @cached_property
    def _hurry(self) -> asyncio.Event:
        return asyncio.Event()

    @property
    def resting(self) -> int:
        """How many steps and sleeps only wait for time to pass."""
        return self._rest.count

    def begin(self) -> None:
        """Take the current asyncio task for the one that the task's function runs in."""
        self._places.begin()

    def close(self) -> None:
        """Let no further step begin, and let go of threads that wait for one."""
        self._closed = True
        for task in self._served.difference(self._workers):
            task.cancel()

    def abandon(self) -> None:
        """End the steps that run: nobody else would, and another attempt begins them anew."""
        self.close()
        for task in {*self._served, *self._workers}:
            task.cancel()

    async def finish(self) -> None:
        """Let no further step begin, and return when those that run have ended."""
        self.close()
        if self._workers:
            await self._idle.wait()

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

    def put_metadata(self, change: Callable[[Metadata], Metadata]) -> None:
        """Remember what `change` makes of the metadata; from any thread.

        Raises:
            InvalidPayload: Something in it would not come back as what it is.
            MemoryFull: It does not fit.
        """

        def changed(memory: Memory) -> Memory:
            return replace(memory, metadata=plain(change(memory.metadata)))

        self._remember(changed, "metadata")

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
        asked = self.ask(name, qualified_name(function))
        called = partial(function, *arguments) if arguments else function
        return self.awaited(asked, self._step(asked, called, retry or _ONCE, timeout))

    def sleep(self, due: Callable[[int], int], *, name: str | None) -> Coroutine[Any, Any, None]:
        """Return what ends at an instant, `due` of the present; both in ms since the epoch."""
        asked = self.ask(name, SLEEP)
        return self.awaited(asked, self._sleep(asked, due))

    def forgotten(self) -> list[str]:
        """Return the keys of what was asked for and never awaited: it was not done."""
        created = inspect.CORO_CREATED
        found = {
            key: one
            for key, one in self._unbegun.items()
            if inspect.getcoroutinestate(one) == created
        }
        for one in found.values():
            one.close()
        return list(found)

    # -- what is asked for

    def ask(self, name: str | None, function: str) -> Asked:
        """Give a call its key and its place among those of the run."""
        if inside.get() is self._places:
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

    def awaited(self, asked: Asked, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return `work`, known of until it begins."""
        self._unbegun[asked.key] = work
        return work

    def admit(self, asked: Asked) -> None:
        """Let a call begin, or raise why it cannot."""
        self._unbegun.pop(asked.key, None)
        if self._closed:
            raise asyncio.CancelledError("the attempt is over")
        if (problem := asked.problem or self.defect) is not None:
            raise problem

    # -- steps

    async def _step(
        self, asked: Asked, function: Callable[[], Any], retry: Retry, timeout: float | None
    ) -> Any:
        self.admit(asked)
        kind = result_type(function)
        known = self._finished.get(asked.key)
        if known is None:
            with self.working(asked):
                value = await self._tries.call(asked.key, function, retry, timeout)
                with self._final():
                    result = packed(asked.key, kind, value)
                    # First: what does not come back must not be remembered.
                    value = restored(asked.key, kind, result)
                await self._finish(asked, result)
            return value
        if self._span is not None:
            self._span.remembered(asked.key)
        return restored(asked.key, kind, await self._result(known))

    @contextmanager
    def working(self, asked: Asked) -> Iterator[None]:
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

    @contextmanager
    def _final(self) -> Iterator[None]:
        """Let no `except` of the task hide that a result cannot be remembered."""
        try:
            yield
        except UnsupportedType as error:
            self.defect = self.defect or error
            raise

    async def _finish(self, asked: Asked, result: bytes) -> None:
        """Remember a finished step; it is safe when this returns."""
        claim = await self.stored(self.claims.put(result))
        self.remember(Step(asked.key, asked.function, asked.after, claim or result))
        if self.host is not None:
            await self.host.save()

    def remember(self, step: Step) -> None:
        """Remember a step that is finished, or a wait that has begun; from any thread.

        Raises:
            MemoryFull: It does not fit.
        """
        self._remember(lambda memory: memory.with_step(step), step.key)
        self._finished[step.key] = step

    def known(self, key: str) -> Step | None:
        """Return what is remembered by a key."""
        return self._finished.get(key)

    async def _result(self, known: Step) -> bytes:
        """Return the result of a finished step, in msgpack."""
        if isinstance(known.result, Claim):
            return await self.stored(self.claims.get(known.result))
        return known.result

    async def stored(self, asking: Awaitable[T]) -> T:
        """Return what the payload store answers.

        If it fails, the attempt must not go on as if it were the step that had failed.
        """
        try:
            return await asking
        except PayloadUnavailable as error:
            self.defect = self.defect or error
            raise

    def _remember(self, change: Callable[[Memory], Memory], what: str) -> None:
        # Threads change metadata while the event loop adds steps.
        with self._changing:
            self._replace(change(self.memory), what)

    def _replace(self, memory: Memory, what: str) -> None:
        size, before = memory.size, self.memory.size
        try:
            memory.check(self._max_bytes, what)
        except MemoryFull as error:
            self.defect = error
            raise
        if size > self._max_bytes * NEARLY_FULL >= before:
            warning = f"the run remembers {size} bytes, the limit is {self._max_bytes}"
            log.warning("%s", warning)
            if self.host is not None:
                self.host.warn(warning)
        self.memory = memory

    # -- sleeps

    async def _sleep(self, asked: Asked, due: Callable[[int], int]) -> None:
        self.admit(asked)
        known = self._finished.get(asked.key)
        if known is not None:
            due_ms = int(decode(await self._result(known), MSGPACK))
        else:
            due_ms = due(self.clock.now_ms())
            # Not saved by itself: it is with what follows it, and forgotten it only sleeps again.
            self.remember(Step(asked.key, asked.function, asked.after, encode(due_ms)))
        self._sleeping.append(due_ms)
        try:
            await self._sleep_until(due_ms)
        except BaseException:
            self._places.failed(asked)
            raise
        finally:
            self._sleeping.remove(due_ms)

    async def _sleep_until(self, due_ms: int) -> None:
        left = (due_ms - self.clock.now_ms()) / 1000
        if left <= 0:
            return
        if self.host is None or (left <= SLEEP_IN_PLACE and not self._hurry.is_set()):
            await self._rest.pass_by(left, None if self.host is None else self._hurry)
            if self.host is None or due_ms <= self.clock.now_ms():
                return
        await self._rested()
        if self._closed or self.defect is not None:
            # The code has ended meanwhile, or cannot go on: what it came to is not a sleep.
            raise asyncio.CancelledError("the attempt is over")
        if due_ms > self.clock.now_ms():
            await self._leave(self.host)

    async def wait(self, on: Sequence[str]) -> Never:
        """Leave the slot, once no step runs, until a server says that something came of it."""
        assert self.host is not None
        self._waiting += on
        try:
            await self._rested()
            if self._closed or self.defect is not None:
                raise asyncio.CancelledError("the attempt is over")
            await self._leave(self.host)
        finally:
            for one in on:
                self._waiting.remove(one)

    async def _leave(self, host: Host) -> Never:
        self.close()
        due_ms = min(self._sleeping, default=None)
        if self._waiting or due_ms is None:
            host.wait(tuple(self._waiting), due_ms)
        else:
            host.sleep(due_ms)
        # There comes the cancellation, unless nobody cancels this asyncio task with the main one.
        await asyncio.sleep(0)
        raise asyncio.CancelledError("the run leaves its slot")

    async def _rested(self) -> None:
        """Return when no step runs: cut, it would be done once more."""
        while True:
            if self._workers:
                await self._idle.wait()
            # What was asked for together with this, or goes on where a step has ended, begins; and
            # what was raised beside it comes to the task's own code.
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if not self._workers:
                return
