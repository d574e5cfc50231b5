"""The publishes of one channel that the broker has not answered yet, each with its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from brokertask.topology import Route


@dataclass(slots=True, eq=False)
class Unconfirmed:
    """A publish that is on its way."""

    route: Route
    message_id: str
    timeout: float
    deadline: float
    answer: asyncio.Future[None]


class Confirms:
    """Numbers publishes from 1 as the broker does, and finds the one that an answer is for.

    One timer serves all deadlines: it goes off at the earliest, and looks through what is left,
    which is no more than a window. A late answer to a publish that was given up is for nobody.
    """

    def __init__(self, *, expire: Callable[[Unconfirmed], None], done: Callable[[], None]) -> None:
        self._expire = expire
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._last = 0
        self._waiting: dict[int, Unconfirmed] = {}
        self._ids: dict[str, Unconfirmed] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, publish: Unconfirmed) -> None:
        """Count a publish; it is written in the same turn, in this order."""
        self._last += 1
        self._waiting[self._last] = publish
        self._ids[publish.message_id] = publish
        if self._timer is None or publish.deadline < self._timer.when():
            self._set_timer(publish.deadline)

    def of(self, message_id: str) -> Unconfirmed | None:
        """Return the one publish of this id that is on its way, if there is one."""
        return self._ids.get(message_id)

    def returned(self, message_id: str) -> Unconfirmed | None:
        """Return the one that no queue took. It stays counted: its confirm follows."""
        return self._ids.pop(message_id, None)

    def confirm(self, number: int, *, multiple: bool) -> Iterator[Unconfirmed]:
        """Take out what an answer is for: one, or all up to it."""
        waiting = self._waiting
        if not multiple:
            if (publish := waiting.pop(number, None)) is not None:
                yield self._out(publish)
            return
        while waiting and (first := next(iter(waiting))) <= number:
            yield self._out(waiting.pop(first))

    def end(self) -> Iterator[Unconfirmed]:
        """Take out everything."""
        if self._timer is not None:
            self._timer.cancel()
        yield from self.confirm(self._last, multiple=True)

    def _out(self, publish: Unconfirmed) -> Unconfirmed:
        if self._ids.get(publish.message_id) is publish:
            del self._ids[publish.message_id]
        self._done()
        return publish

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self._loop.time()
        for number, publish in list(self._waiting.items()):
            if publish.deadline <= now:
                del self._waiting[number]
                self._expire(self._out(publish))
        if self._waiting:
            self._set_timer(min(publish.deadline for publish in self._waiting.values()))
