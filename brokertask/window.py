"""How many runs of one task a worker takes from the broker: never more than it has slots for.

As long as each run is settled by the delivery it came with, prefetch = slots does it. A run whose
message was moved to the inflight queue keeps its slot, while its first delivery is acked and the
broker would send another, that no other worker could have then. So the consumers are limited to
the free slots before that ack, and as long as moved runs go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from brokertask.transport.base import Consumer


class Window:
    """The consumers of one task, and what they may still bring.

    Attributes:
        slots: How many runs there may be at a time.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._taken = 0
        self._expected = 0
        self._consumers: Sequence[Consumer] = ()
        self._limited = False
        self._stale = False
        self._adjusting = asyncio.Lock()
        self._raising: asyncio.Task[None] | None = None

    @property
    def taken(self) -> int:
        """How many runs are in hands."""
        return self._taken

    def read_by(self, consumers: Sequence[Consumer]) -> None:
        """Count on these from now on, each with a prefetch of as many as there are slots."""
        self._consumers = consumers
        self._later()

    def take(self) -> None:
        """Count a run that came."""
        self._taken += 1

    def occupy(self) -> None:
        """Count code that has lost its run, and keeps its slot all the same."""
        self._taken += 1
        self._limited = True
        self._later()

    def give_back(self) -> None:
        """Count a run as over."""
        self._taken -= 1
        self._later()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Leave room for a run that has its slot, and whose message was lost and comes again."""
        self._expected += 1
        self._limited = True
        self._later()
        try:
            yield
        finally:
            self._expected -= 1
            self._later()

    async def limit(self) -> None:
        """Return when the broker sends no more than there are free slots."""
        self._limited = True
        await self._adjust()

    def _later(self) -> None:
        self._stale = True
        if self._limited and self._raising is None:
            self._raising = asyncio.create_task(self._raise())

    async def _raise(self) -> None:
        try:
            while self._stale:
                await self._adjust()
        finally:
            self._raising = None

    async def _adjust(self) -> None:
        async with self._adjusting:
            self._stale = False
            free = max(0, self.slots - self._taken + self._expected)
            # With nothing in hands, prefetch = slots is exact again, until the next run moves.
            self._limited = self._taken > 0
            for consumer in self._consumers:
                await consumer.limit(free)
