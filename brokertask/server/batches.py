"""What a queue of servers delivers, in batches: as many as have come while the last was done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final

from brokertask.transport.base import Consumer, Delivery, Transport

AHEAD: Final = 2
"""How many batches the broker may deliver at a time: one is done, one waits."""


class Batches:
    """Consumes a queue inside its block; what nobody has settled goes back at its end."""

    def __init__(self, transport: Transport, queue: str, size: int) -> None:
        self._transport = transport
        self._queue = queue
        self._size = size
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._consumer: Consumer | None = None

    async def __aenter__(self) -> Batches:
        self._consumer = await self._transport.consume(
            self._queue, self._arrived.put_nowait, prefetch=AHEAD * self._size
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._consumer is not None:
            await self._consumer.close()

    async def __aiter__(self) -> AsyncIterator[list[Delivery]]:
        """Yield deliveries, at least one at a time; the caller settles them."""
        while True:
            batch = [await self._arrived.get()]
            while len(batch) < self._size and not self._arrived.empty():
                batch.append(self._arrived.get_nowait())
            live = [delivery for delivery in batch if delivery.live]
            if live:
                yield live
