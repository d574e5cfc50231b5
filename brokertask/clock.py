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

    def background(self) -> Clock:
        """Return the same time, for what is due again and again: nobody waits for it to end."""
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

    def background(self) -> Clock:
        """Return this clock."""
        return self


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
        return self._add(delay, _VirtualTimer(callback))

    async def sleep(self, delay: float) -> None:
        """Return once time was advanced by `delay` seconds."""
        await _sleep(self, delay)

    def _add(self, delay: float, timer: _VirtualTimer) -> Timer:
        due = self._now_ms + max(0, round(delay * 1000))
        heapq.heappush(self._timers, (due, next(self._order), timer))
        return timer

    def background(self) -> Clock:
        """Return the same time, with timers that `next_ms` can leave out."""
        return _Background(self)

    def next_ms(self, *, background: bool = True) -> int | None:
        """Return when the next timer is due, one of the background or not; None: there is none."""
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if background:
            return self._timers[0][0] if self._timers else None
        waited_for = (
            due for due, _, timer in self._timers if not (timer.cancelled or timer.background)
        )
        return min(waited_for, default=None)

    def advance_to(self, when_ms: int) -> None:
        """Move time forward to `when_ms`, firing every timer on the way, each at its own time."""
        while (due := self.next_ms()) is not None and due <= when_ms:
            _, _, timer = heapq.heappop(self._timers)
            self._now_ms = max(self._now_ms, due)
            timer.callback()
        self._now_ms = max(self._now_ms, when_ms)


class _Background:
    """Virtual time for what never ends."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        return self._clock._add(delay, _VirtualTimer(callback, background=True))

    async def sleep(self, delay: float) -> None:
        await _sleep(self, delay)

    def background(self) -> Clock:
        return self


async def _sleep(clock: Clock, delay: float) -> None:
    woken = asyncio.Event()
    timer = clock.call_later(delay, woken.set)
    try:
        await woken.wait()
    finally:
        timer.cancel()


class _VirtualTimer:
    def __init__(self, callback: Callable[[], None], *, background: bool = False) -> None:
        self.callback = callback
        self.background = background
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
