"""Keeps the messages of the runs in hands: with what they have finished, and not too old.

A finished step is worth nothing while only this process knows of it, and a message that is held
for longer than the broker's consumer timeout is taken back. Both are met by one move: the run's
present state becomes its message (`inflight`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from brokertask.attempt import Attempt
from brokertask.clock import Clock
from brokertask.inflight import Inflight
from brokertask.window import Window

log = logging.getLogger("brokertask.worker")

LEASE: Final = 1 / 3
"""The part of the broker's consumer timeout after which a message that is held is renewed."""


class Keeper:
    """Moves attempts to newer messages: after a step, and before the broker loses its patience."""

    def __init__(
        self,
        inflight: Inflight,
        windows: Mapping[str, Window],
        *,
        clock: Clock,
        consumer_timeout: float,
    ) -> None:
        self._inflight = inflight
        self._windows = windows
        self._clock = clock
        self._limit = consumer_timeout * LEASE
        self._moves: set[asyncio.Task[bool]] = set()

    async def save(self, attempt: Attempt) -> None:
        """Return when what the attempt remembers now is on the broker's disk.

        If its message is lost, and somebody else has the run, it ends here: cancelled.
        """
        attempt.changes += 1
        # In a task of ours: cancelled half-way, nobody would know which message is the latest.
        if await asyncio.shield(self._spawn(attempt, attempt.changes)):
            return
        if not attempt.lease.ending:
            log.warning("run %s was taken away; it stops here", attempt.envelope.run_id)
            attempt.interrupt("lost")
            await asyncio.sleep(0)
        raise asyncio.CancelledError("lost")

    async def renew(self, attempts: Callable[[], Collection[Attempt]]) -> None:
        """Renew, until cancelled, what of the present attempts has been held for long."""
        while True:
            await asyncio.sleep(self._limit / 4)
            for attempt in attempts():
                if self._old(attempt):
                    self._spawn(attempt, None)

    def _old(self, attempt: Attempt) -> bool:
        return asyncio.get_running_loop().time() - attempt.lease.since > self._limit

    def _spawn(self, attempt: Attempt, change: int | None) -> asyncio.Task[bool]:
        move = asyncio.create_task(self._move(attempt, change))
        self._moves.add(move)
        move.add_done_callback(self._moves.discard)
        return move

    async def _move(self, attempt: Attempt, change: int | None) -> bool:
        """Put the run's present state into the inflight queue; False if the run is not ours now.

        One at a time, so that steps which end meanwhile share the next. A `change` that is saved
        by then needs nothing; None is for the lease alone.
        """
        async with attempt.lease.moving:
            if change is not None and change <= attempt.saved:
                return True
            if attempt.lease.ending:
                return False
            if change is None and not self._old(attempt):
                return True
            covered, now = attempt.changes, attempt.now
            following = now.again(attempt=now.attempt, now_ms=self._clock.now_ms())
            window = self._windows[attempt.task.id]
            if not await self._inflight.move(attempt.lease, following, window=window):
                return False
            attempt.saved = covered
            return True
