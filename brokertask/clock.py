"""The wall clock, and one that tests turn by hand. Only delays and due times read it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Protocol


class Timer(Protocol):
    """Something that is going to happen, unless cancelled."""

    def cancel(self) -> None:
        """Keep it from happening; does nothing when it already did."""
        ...


class Clock(Protocol):
    """Where the present and the future come from."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` in the event loop after `delay` seconds."""
        ...

    async def sleep(self, delay: float) -> None:
        """Return after `delay` seconds."""
        ...


class SystemClock:
    """Real time."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` in the event loop after `delay` seconds."""
        return asyncio.get_running_loop().call_later(delay, callback)

    async def sleep(self, delay: float) -> None:
        """Return after `delay` seconds."""
        await asyncio.sleep(delay)


class VirtualClock:
    """Time that stands still until `advance` moves it; hours of delays pass in microseconds."""

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = start_ms
        self._order = count()
        self._timers: list[tuple[int, int, _VirtualTimer]] = []

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        return self._now_ms

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once time was advanced by `delay` seconds."""
        timer = _VirtualTimer(callback)
        due = self._now_ms + max(0, round(delay * 1000))
        heapq.heappush(self._timers, (due, next(self._order), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        """Return once time was advanced by `delay` seconds."""
        woken = asyncio.Event()
        timer = self.call_later(delay, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()

    def next_ms(self) -> int | None:
        """Return when the next timer is due, or None if there is none."""
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance_to(self, when_ms: int) -> None:
        """Move time forward to `when_ms`, firing every timer on the way, each at its own time."""
        while (due := self.next_ms()) is not None and due <= when_ms:
            _, _, timer = heapq.heappop(self._timers)
            self._now_ms = max(self._now_ms, due)
            timer.callback()
        self._now_ms = max(self._now_ms, when_ms)


class _VirtualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
