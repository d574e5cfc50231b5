from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import NoReturn

import pytest

from brokertask.threads import Threads

pytestmark = pytest.mark.anyio

spoken: ContextVar[str] = ContextVar("spoken", default="nothing")


class Held:
    """Functions that wait in their threads until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0
        self._began = threading.Condition()

    def wait(self) -> str:
        with self._began:
            self.running += 1
            self._began.notify_all()
        assert self.go.wait(30)
        return threading.current_thread().name

    async def began(self, count: int) -> None:
        def until() -> None:
            with self._began:
                assert self._began.wait_for(lambda: self.running >= count, 30)

        await asyncio.to_thread(until)


@pytest.fixture
def held() -> Held:
    return Held()


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def function() -> NoReturn:
        raise error

    return function


async def test_a_function_runs_in_a_thread_and_in_the_context_of_its_caller() -> None:
    threads = Threads(1)
    spoken.set("hello")
    assert await threads.run(lambda: (spoken.get(), threading.current_thread())) != (
        "hello",
        threading.current_thread(),
    )
    assert await threads.run(spoken.get) == "hello"
    await threads.run(lambda: spoken.set("changed there"))
    assert spoken.get() == "hello"
    threads.close()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
async def test_what_is_raised_there_is_raised_here(error: BaseException) -> None:
    threads = Threads(1)
    with pytest.raises(type(error)) as caught:
        await threads.run(raising(error))
    assert caught.value is error
    threads.close()


async def test_a_stop_iteration_does_not_end_who_waits_for_it() -> None:
    threads = Threads(1)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(raising(StopIteration(1)))
    threads.close()


async def test_no_more_than_the_limit_run_and_the_others_come_after(held: Held) -> None:
    threads = Threads(2)
    runs = [asyncio.create_task(threads.run(held.wait)) for _ in range(5)]
    await held.began(2)
    assert held.running == 2
    # Who holds a slot is not held up by those who wait for one.
    assert await threads.run_at_once(lambda: "at once") == "at once"
    assert held.running == 2
    held.go.set()
    assert len(await asyncio.gather(*runs)) == 5
    threads.close()


async def test_an_idle_thread_is_used_again() -> None:
    threads = Threads(40)
    names = {await threads.run(lambda: threading.current_thread().name) for _ in range(20)}
    assert len(names) == 1
    threads.close()


async def test_many_functions_all_get_their_own_results() -> None:
    threads = Threads(40)

    def double(number: int) -> Callable[[], int]:
        return lambda: number * 2

    results = await asyncio.gather(*(threads.run(double(number)) for number in range(2_000)))
    assert results == [number * 2 for number in range(2_000)]
    threads.close()


async def test_a_cancelled_caller_waits_for_no_thread_and_gives_back_its_slot(held: Held) -> None:
    threads = Threads(1)
    stuck = asyncio.create_task(threads.run(held.wait))
    await held.began(1)
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    assert await threads.run(lambda: "next") == "next"
    held.go.set()
    threads.close()


async def test_a_caller_that_is_cancelled_before_a_thread_has_it_is_not_served(held: Held) -> None:
    threads = Threads(1)
    first = asyncio.create_task(threads.run(held.wait))
    await held.began(1)
    called: list[int] = []
    waiting = asyncio.create_task(threads.run(lambda: called.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    held.go.set()
    await first
    assert await threads.run(lambda: "next") == "next"
    assert not called
    threads.close()


async def test_threads_end_when_they_are_closed_and_hold_on_to_nothing() -> None:
    class Large:
        pass

    def made() -> tuple[threading.Thread, weakref.ref[Large]]:
        large = Large()
        return threading.current_thread(), weakref.ref(large)

    threads = Threads(1)
    thread, large = await threads.run(made)
    assert thread.is_alive()
    assert large() is None
    threads.close()
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()


async def test_what_is_left_behind_can_go_on_after_the_close(held: Held) -> None:
    threads = Threads(1)
    left = asyncio.create_task(threads.run(held.wait))
    await held.began(1)
    threads.close()
    held.go.set()
    await left
    for _ in range(3):
        assert await threads.run(lambda: "still") == "still"


def test_a_thread_outlives_its_event_loop(held: Held) -> None:
    working: list[threading.Thread] = []

    async def leave() -> Threads:
        def function() -> None:
            working.append(threading.current_thread())
            held.wait()

        threads = Threads(1)
        task = asyncio.create_task(threads.run(function))
        await held.began(1)
        task.cancel()
        return threads

    threads = asyncio.run(leave())
    held.go.set()
    threads.close()
    working[0].join(30)
    assert not working[0].is_alive()
