"""Virtual time moves only when told, and fires what is due on the way."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from brokertask.clock import Clock, SystemClock, VirtualClock

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000


async def test_virtual_time_stands_still() -> None:
    clock = VirtualClock(start_ms=5)
    await asyncio.sleep(0)
    assert clock.now_ms() == 5


async def test_timers_fire_in_order_and_at_their_own_time() -> None:
    clock = VirtualClock(start_ms=0)
    fired: list[tuple[str, int]] = []

    def fire(name: str) -> None:
        fired.append((name, clock.now_ms()))

    for name, delay in (("late", 3600), ("soon", 1), ("also soon", 1), ("now", 0)):
        clock.call_later(delay, partial(fire, name))
    assert clock.next_ms() == 0
    clock.advance_to(HOUR_MS)
    assert fired == [("now", 0), ("soon", 1000), ("also soon", 1000), ("late", HOUR_MS)]
    assert clock.now_ms() == HOUR_MS
    assert clock.next_ms() is None


async def test_a_timer_waits_for_its_time() -> None:
    clock = VirtualClock(start_ms=0)
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(clock.now_ms()))
    clock.advance_to(999)
    assert fired == []
    clock.advance_to(1000)
    assert fired == [1000]


async def test_a_cancelled_timer_never_fires() -> None:
    clock = VirtualClock(start_ms=0)
    fired: list[str] = []
    cancelled = clock.call_later(1, lambda: fired.append("cancelled"))
    clock.call_later(2, lambda: fired.append("kept"))
    cancelled.cancel()
    assert clock.next_ms() == 2000
    clock.advance_to(HOUR_MS)
    assert fired == ["kept"]
    cancelled.cancel()


async def test_a_timer_set_by_a_timer_fires_on_the_same_way() -> None:
    clock = VirtualClock(start_ms=0)
    fired: list[int] = []

    def again() -> None:
        fired.append(clock.now_ms())
        clock.call_later(1, again)

    clock.call_later(1, again)
    clock.advance_to(3_500)
    assert fired == [1000, 2000, 3000]
    assert clock.now_ms() == 3_500


async def test_time_never_goes_back() -> None:
    clock = VirtualClock(start_ms=1000)
    clock.advance_to(500)
    assert clock.now_ms() == 1000
    clock.call_later(-5, lambda: None)
    assert clock.next_ms() == 1000


async def test_sleep_ends_with_the_time() -> None:
    clock = VirtualClock(start_ms=0)
    sleeper = asyncio.create_task(clock.sleep(3600))
    await asyncio.sleep(0)
    clock.advance_to(HOUR_MS - 1)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.advance_to(HOUR_MS)
    async with asyncio.timeout(5):
        await sleeper


async def test_a_cancelled_sleep_leaves_no_timer() -> None:
    clock = VirtualClock(start_ms=0)
    sleeper = asyncio.create_task(clock.sleep(3600))
    await asyncio.sleep(0)
    assert clock.next_ms() == HOUR_MS
    sleeper.cancel()
    await asyncio.gather(sleeper, return_exceptions=True)
    assert clock.next_ms() is None


async def test_the_system_clock_is_real() -> None:
    clock: Clock = SystemClock()
    before = time.time() * 1000 - 1
    fired = asyncio.Event()
    clock.call_later(0.001, fired.set)
    cancelled: list[int] = []
    clock.call_later(0.001, lambda: cancelled.append(1)).cancel()
    async with asyncio.timeout(5):
        await fired.wait()
        await clock.sleep(0.001)
    assert before <= clock.now_ms() <= time.time() * 1000
    assert cancelled == []
