"""Streams of the embedded broker: what they hold is read, and not taken, by each who follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from brokertask.envelope import Message
from brokertask.topology import Queue
from brokertask.transport.base import OFFSET
from brokertask.transport.memory.queues import Host, Item, Parcel, StoredQueue


class StoredStream(StoredQueue):
    """A stream: every reader gets all of it."""

    def __init__(self, host: Host, queue: Queue) -> None:
        super().__init__(host, queue)
        self._max_bytes = self._limit("x-max-length-bytes")
        self._bytes = 0
        # Beyond all that an earlier stream of this name has had, in this process or before it.
        self._places = host.clock.now_ms() * 1000

    def add(self, parcel: Parcel) -> None:
        """Store a message at the end, and forget the first if there is too much."""
        self._places += 1
        self._bytes += len(parcel.message.body)
        item = Item(parcel, self._places, None)
        self.ready.append(item)
        for reader in list(self.readers):
            reader.deliver(item)
        while self._max_bytes is not None and self._bytes > self._max_bytes:
            self._bytes -= len(self.ready.popleft().parcel.message.body)

    def pump(self) -> None:
        """Give every reader what it has not had."""
        if not self.deleted and self._host.up:
            for reader in list(self.readers):
                for item in self.ready:
                    reader.deliver(item)


class Follower:
    """A consumer of a stream: it knows how far it is, so that nothing comes twice."""

    free = True

    def __init__(
        self,
        stream: StoredStream,
        receive: Callable[[Message], None],
        *,
        after: int | None,
        restore: Callable[[], None],
        closed: Callable[[Follower], None],
    ) -> None:
        self.queue: StoredQueue = stream
        self._receive = receive
        self._place = 0 if after is None else after
        self._restore = restore
        self._closed = closed
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        stream.join(self)

    def deliver(self, item: Item) -> None:
        """Take an item, unless it was had before."""
        if item.place > self._place and not self._stopped:
            self._place = item.place
            self._loop.call_soon(self._hand_over, item)

    def _hand_over(self, item: Item) -> None:
        if not self._stopped:
            message = item.message()
            self._receive(replace(message, headers={**message.headers, OFFSET: item.place}))

    def lose(self) -> None:
        """Lose the connection: there is nothing that was not settled."""

    def lose_queue(self) -> None:
        """Have a stream that was deleted made again."""
        if not self._stopped:
            self._loop.call_soon(self._restore)

    def move(self, queue: StoredQueue) -> None:
        """Follow the stream that has taken the place of a deleted one."""
        self.queue, self._place = queue, 0
        if not self._stopped:
            queue.join(self)

    async def limit(self, prefetch: int) -> None:
        """Do nothing: what is only read needs no limit."""

    async def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        self.queue.leave(self)

    async def close(self) -> None:
        """Stop."""
        await self.stop()
        self._closed(self)
