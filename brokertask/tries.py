"""Calls the function of a step, as often as its Retry says, within one attempt of its run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from brokertask.clock import Clock
from brokertask.durations import readable
from brokertask.functions import InThread, call
from brokertask.raised import name_of
from brokertask.retry import Retry
from brokertask.telemetry import AttemptSpan

log = logging.getLogger("brokertask.task")

inside: ContextVar[object] = ContextVar("brokertask_inside_step", default=None)
"""Whose step is being performed here."""


class Rest:
    """Lets time pass.

    Attributes:
        count: How many wait for nothing else at this moment.
    """

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self._clock = clock

    async def pass_by(self, delay: float, hurry: asyncio.Event | None = None) -> None:
        """Let `delay` seconds pass, or less if there is a hurry."""
        self.count += 1
        waits = [asyncio.ensure_future(self._clock.sleep(delay))]
        if hurry is not None:
            waits.append(asyncio.ensure_future(_until(hurry)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.count -= 1
            for wait in waits:
                wait.cancel()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


class StepSpan(Protocol):
    """Where a step tells of its own retries."""

    def retried(self, error: BaseException, delay: float) -> None:
        """Say that it failed, and is tried again after `delay` seconds."""
        ...


class Tries:
    """The calls of one attempt's steps, which are `owner`'s."""

    def __init__(
        self,
        owner: object,
        *,
        span: AttemptSpan | None,
        thread: InThread | None,
        rest: Rest,
    ) -> None:
        self._owner = owner
        self._span = span
        self._thread = thread
        self._rest = rest

    async def call(
        self, key: str, function: Callable[[], Any], retry: Retry, timeout: float | None
    ) -> Any:
        """Call a step's function until it returns, or its own retries are spent."""
        with self._traced(key) as span:
            number = 1
            while True:
                try:
                    return await self._once(key, function, timeout)
                except Exception as error:
                    decision = retry.decide(number, error)
                    if decision.delay is None:
                        raise
                    if span is not None:
                        span.retried(error, decision.delay)
                    delay = decision.delay
                    told = (number, key, name_of(error), readable(delay))
                    log.warning("try %d of step %r failed: %s; again in %s", *told)
                number += 1
                await self._rest.pass_by(delay)

    async def _once(self, key: str, function: Callable[[], Any], timeout: float | None) -> Any:
        limit, before = asyncio.timeout(timeout), inside.set(self._owner)
        try:
            async with limit:
                return await call(function, thread=self._thread)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"step {key!r} took longer than {timeout:g} s") from error
        except (SystemExit, KeyboardInterrupt) as error:
            # In an asyncio task of its own it would end the worker's event loop.
            raise RuntimeError(f"step {key!r} raised {type(error).__name__}") from error
        finally:
            inside.reset(before)

    @contextmanager
    def _traced(self, key: str) -> Iterator[StepSpan | None]:
        if self._span is None:
            yield None
        else:
            with self._span.step(key) as span:
                yield span
