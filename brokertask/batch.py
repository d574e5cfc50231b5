"""Many publishes at once, in order, with no more of them in memory than that takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeAlias, TypeVar

from brokertask.errors import PublishError

Item = TypeVar("Item")
Sent = TypeVar("Sent")
Source: TypeAlias = Iterable[Item] | AsyncIterable[Item]

IN_FLIGHT: Final = 256
"""Publishes of one batch that wait for their confirm at a time."""
PART: Final = 1_000
"""Items that are read before the first of them is sent: their round trips then cost little."""


async def send_each(
    items: Sequence[Item], send: Callable[[Item], Awaitable[Sent]]
) -> list[Sent | PublishError]:
    """Begin to send the items in their order, and return what came of each.

    Raises what `send` does, unless it is a `PublishError`.
    """
    results: list[Sent | PublishError | None] = [None] * len(items)
    waiting = enumerate(items)

    async def work() -> None:
        for place, item in waiting:
            try:
                results[place] = await send(item)
            except PublishError as error:
                results[place] = error

    async with asyncio.TaskGroup() as group:
        for _ in range(min(IN_FLIGHT, len(items))):
            group.create_task(work())
    return [result for result in results if result is not None]


async def as_they_come(items: Source[Item]) -> AsyncIterator[Item]:
    """Yield items of either kind."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def parts(items: Source[Item]) -> AsyncIterator[list[Item]]:
    """Yield items some at a time, and read on only when those are dealt with."""
    part: list[Item] = []
    async for item in as_they_come(items):
        part.append(item)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part
