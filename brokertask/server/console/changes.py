"""Changes: that something has changed which tells of nothing by itself, found by looking at it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, TypeVar

from brokertask.server.api.problems import Problem
from brokertask.server.api.stream import BEATING

T = TypeVar("T")

CHANGED: Final = b"event: changed\ndata: {}\n\n"
OVER: Final = b"event: completed\ndata: {}\n\n"


async def changes(
    look: Callable[[], Awaitable[T]],
    *,
    every: float,
    over: Callable[[T], bool] = lambda _: False,
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events: `changed` whenever it is, and `completed` when it is over.

    Args:
        look: Returns what may change.
        every: Seconds between two looks.
        over: Whether it changes no more.

    Raises:
        Problem: It cannot be looked at, from the beginning; later the stream just ends.
        BrokertaskError: It cannot be looked at.
    """
    shown: T | None = None
    while True:
        try:
            found = await look()
        except Problem:
            if shown is None:
                raise
            return
        if over(found):
            yield OVER
            return
        yield BEATING if found == shown else CHANGED
        shown = found
        await asyncio.sleep(every)
