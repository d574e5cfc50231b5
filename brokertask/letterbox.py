"""One dead-letter queue, looked into until enough was found; what was taken in stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from brokertask.deadletter import DeadLetter
from brokertask.errors import BrokerUnavailable
from brokertask.transport.base import Delivery, Transport

MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""How much a selection keeps of one queue; what is behind it is for the next selection."""
QUIET: Final = 1.0
"""So long without an arrival, and the broker is asked whether there is more to come."""
MAX_QUIETS: Final = 30


@dataclass(frozen=True, slots=True)
class Held:
    """A dead letter, and the right to settle it, unless it was only looked at."""

    letter: DeadLetter
    delivery: Delivery | None


class Letterbox:
    """Takes in one queue until all that was ready was seen, or enough was found."""

    def __init__(
        self,
        task: str,
        ready: int,
        room: int,
        takes: Callable[[DeadLetter], bool],
        *,
        bodies: bool,
    ) -> None:
        self.seen = 0
        self.held: list[Held] = []
        self._task = task
        self._ready = ready
        self._room = room
        self._takes = takes
        self._bodies = bodies
        self._bytes = 0
        self._first: Delivery | None = None
        self._frozen = False
        self._arrived = asyncio.Event()

    def receive(self, delivery: Delivery) -> None:
        """Look at one delivery. Those not kept stay with the broker's books until the close."""
        if self._frozen or self._enough:
            return
        if self._first is None or not self._first.live:
            # The connection was lost meanwhile: everything is delivered again, from the start.
            self._first, self.seen, self._bytes = delivery, 0, 0
            self.held.clear()
        self.seen += 1
        letter = DeadLetter.read(delivery.message, task=self._task)
        if self._takes(letter):
            if self._bodies:
                self._bytes += len(delivery.message.body)
                self.held.append(Held(letter, delivery))
            else:
                self.held.append(Held(_brief(letter), None))
        self._arrived.set()

    async def fill(self, transport: Transport, queue: str) -> bool:
        """Return once there is enough; False if another reader has some of it."""
        quiets = 0
        while not self._enough:
            self._arrived.clear()
            try:
                async with asyncio.timeout(QUIET):
                    await self._arrived.wait()
                quiets = 0
            except TimeoutError:
                depth = await transport.depth(queue)
                if depth is None or depth.ready == 0:
                    break
                quiets += 1
                if quiets == MAX_QUIETS:
                    raise BrokerUnavailable(
                        f"queue {queue!r} says it holds {depth.ready} more and delivers none; "
                        "has it lost its leader?"
                    ) from None
        complete = self._enough
        self._frozen = True
        return complete

    @property
    def _enough(self) -> bool:
        return (
            self.seen >= self._ready
            or len(self.held) >= self._room
            or self._bytes >= MAX_HELD_BYTES
        )


def _brief(letter: DeadLetter) -> DeadLetter:
    """Return what a list shows of it."""
    last = letter.error
    errors = (replace(last, traceback=""),) if last else ()
    return replace(letter, payload=b"", envelope=None, errors=errors)
