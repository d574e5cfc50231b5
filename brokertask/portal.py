"""The background thread of the process, with an event loop for callers that have none."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Protocol, TypeVar
from weakref import WeakSet

import anyio
from anyio.from_thread import BlockingPortal

T = TypeVar("T")


class Guest(Protocol):
    """Who keeps connections in the portal's loop."""

    async def close(self) -> None:
        """Close what it has in the loop that calls."""
        ...

    def forget(self) -> None:
        """Drop every connection without touching it: after a fork they are the parent's."""
        ...


class Portal:
    """Made at the first call, one for the process; safe to use from threads and after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._running: BlockingPortal | None = None
        self._thread = threading.current_thread()
        self._guests: WeakSet[Guest] = WeakSet()

    def invite(self, guest: Guest) -> None:
        """Remember who is to be closed at exit, and told of a fork."""
        self._guests.add(guest)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the thread's loop and return its result."""
        if os.getpid() != self._pid:
            # Forked by something that is not Python, as uWSGI is: no hook was called.
            self.after_fork()
        with self._lock:
            if self._running is None:
                self._running, self._thread = _start()
            running = self._running
        return running.call(work)

    def close(self) -> None:
        """Close what plain threads have opened, and the thread."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            for guest in list(self._guests):
                with suppress(Exception):
                    running.call(guest.close)
            running.call(running.stop)
            self._thread.join()

    def after_fork(self) -> None:
        """Begin anew in a child: it has neither the thread nor a right to the connections."""
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._running = None
        for guest in list(self._guests):
            guest.forget()


def _start() -> tuple[BlockingPortal, threading.Thread]:
    # anyio's start_blocking_portal is a generator: when a forked child drops it, it waits for
    # ever for the parent's thread.
    started: Future[BlockingPortal] = Future()
    thread = threading.Thread(
        target=anyio.run, args=(_serve, started), name="brokertask portal", daemon=True
    )
    thread.start()
    return started.result(), thread


async def _serve(started: Future[BlockingPortal]) -> None:
    async with BlockingPortal() as serving:
        started.set_result(serving)
        await serving.sleep_until_stopped()


portal: Final = Portal()
os.register_at_fork(after_in_child=portal.after_fork)
atexit.register(portal.close)
