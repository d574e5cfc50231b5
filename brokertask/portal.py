"""The background thread of the process, with an event loop for callers that have none."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol, TypeVar
from weakref import WeakSet

from anyio.from_thread import BlockingPortal, start_blocking_portal

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
        self._running: BlockingPortal | None = None
        self._stop: Callable[[], object] = lambda: None
        self._guests: WeakSet[Guest] = WeakSet()

    def invite(self, guest: Guest) -> None:
        """Remember who is to be closed at exit, and told of a fork."""
        self._guests.add(guest)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the thread's loop and return its result."""
        with self._lock:
            if self._running is None:
                starting = start_blocking_portal("asyncio", name="brokertask portal")
                self._running = starting.__enter__()
                self._stop = lambda: starting.__exit__(None, None, None)
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
            self._stop()

    def after_fork(self) -> None:
        """Begin anew in a child: it has neither the thread nor a right to the connections."""
        self._lock = threading.Lock()
        self._running = None
        for guest in list(self._guests):
            guest.forget()


portal: Final = Portal()
os.register_at_fork(after_in_child=portal.after_fork)
atexit.register(portal.close)
