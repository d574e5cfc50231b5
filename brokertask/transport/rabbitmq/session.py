"""One channel's life as a consumer: its readers, and the deliveries they are handed.

AMQP has no way to change a prefetch but to cancel one reader and begin another. What a quorum queue
has on its way to a reader that is cancelled goes back counted as lost, as if a worker had died of
it. So a limit is as many readers as there is room, each with room for one: a reader that holds its
delivery is cancelled before that is settled, when nothing can be on its way. Measured on RabbitMQ
3.10.8, with a limit of 5, 200 messages a second and half of the slots outliving their delivery:
none of 1,500 messages was counted as lost; one reader with a prefetch had 146, and up to 9 at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.topology import UNLIMITED_DELIVERIES
from brokertask.transport.base import Receive
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT, Lane
from brokertask.transport.rabbitmq.waiting import close_quietly, quietly


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """So many readers with room for so many deliveries each; as one object, as it was asked once.

    A room of 0 is no limit, as in AMQP.
    """

    readers: int
    room: int


class Reader:
    """What AMQP calls a consumer: the broker hands it deliveries while it has room."""

    __slots__ = ("held", "retired", "room", "session", "tag")

    def __init__(self, session: Session, room: int) -> None:
        self.session = session
        self.room = room
        self.tag = ""
        self.held = 0
        self.retired = False

    @property
    def full(self) -> bool:
        """Nothing is on its way to it, nor will be before something of it is settled."""
        return 0 < self.room <= self.held


Handle: TypeAlias = Callable[[Message, str, int, bool, Reader], None]
"""Called with a message, its routing key and tag, whether it is redelivered, and whose it is."""


class Session:
    """A channel with its readers; what they were handed can be settled only within it."""

    def __init__(self, lane: Lane, queue: str, handle: Handle, *, no_ack: bool) -> None:
        self.lane = lane
        self.channel = lane.channel
        self.alive = True
        self.ended = asyncio.Event()
        self._queue = queue
        self._handle = handle
        self._no_ack = no_ack
        self._wanted: Limit | None = None
        self._reached: Limit | None = None
        self._prefetch: int | None = None
        self._consuming = False
        self._readers: list[Reader] = []
        self._retired: list[Reader] = []
        self._none_retired = asyncio.Event()
        self._none_retired.set()
        self._fitting = asyncio.Lock()
        self._fitter: asyncio.Task[None] | None = None
        self.channel.closing.add_done_callback(lambda _: self.end())
        self.channel.on_consumer_cancel_callbacks.add(self._cancelled)

    @property
    def up(self) -> bool:
        """It has reached a limit, and the broker keeps to it."""
        return self._reached is not None and not self.ended.is_set()

    async def begin(self, limit: Limit) -> None:
        """Consume within a limit, or raise as aiormq does."""
        self._wanted = limit
        await self._fit()

    async def change(self, limit: Limit) -> None:
        """Return when the broker knows this limit, or a later one, or when the session has ended.

        One task tells it for all who ask, so that a cancelled caller cuts no RPC short: that
        would close the channel and give back all that is held.
        """
        self._wanted = limit
        if self.ended.is_set():
            return
        self._retire()
        while self._behind:
            if self._fitter is None or self._fitter.done():
                name = f"brokertask limit {self._queue}"
                self._fitter = asyncio.create_task(self._fit_or_give_up(), name=name)
            # Not the task itself: a session that is closed cancels it, not those who wait.
            await asyncio.wait({self._fitter})

    async def close(self) -> None:
        """Close the channel, which gives back what is not settled."""
        self.end()
        await close_quietly(self.channel)
        if self._fitter is not None:
            self._fitter.cancel()
            await asyncio.gather(self._fitter, return_exceptions=True)

    def end(self) -> None:
        """Count every delivery as lost."""
        self.alive = False
        self.lane.end()
        self._give_up()

    async def may_settle(self, reader: Reader) -> None:
        """Return when nothing more can come to a reader that was retired."""
        if reader.retired:
            await self._none_retired.wait()

    def _give_up(self) -> None:
        self.ended.set()
        self._none_retired.set()

    def _cancelled(self, _: Basic.Cancel) -> None:
        # Only the broker's own cancels come here. Whichever reader it is for, even one that we
        # have just cancelled as well: the queue, or its hold on what was delivered, is gone.
        self._give_up()

    def _retire(self) -> None:
        """Have the readers replaced that hold something: settled, it makes no room any more."""
        for reader in [reader for reader in self._readers if reader.held]:
            reader.retired = True
            self._readers.remove(reader)
            self._retired.append(reader)
            self._none_retired.clear()

    @property
    def _behind(self) -> bool:
        return self._reached is not self._wanted and not self.ended.is_set()

    async def _fit_or_give_up(self) -> None:
        with quietly():
            await self._fit()
        if self._behind:
            self._give_up()

    async def _fit(self) -> None:
        async with self._fitting:
            while self._behind and self._wanted is not None:
                await self._approach(self._wanted)

    async def _approach(self, limit: Limit) -> None:
        """Come one step closer to a limit, or note that it is reached."""
        if self._retired:
            await self._cancel(self._retired[0])
            del self._retired[0]
            if not self._retired:
                self._none_retired.set()
        elif (reader := self._superfluous(limit)) is not None:
            self._readers.remove(reader)
            await self._cancel(reader)
        elif len(self._readers) < limit.readers:
            await self._consume(limit.room)
        else:
            self._reached = limit

    def _superfluous(self, limit: Limit) -> Reader | None:
        if len(self._readers) > limit.readers:
            return max(self._readers, key=lambda reader: reader.full)
        return next((reader for reader in self._readers if reader.room != limit.room), None)

    async def _cancel(self, reader: Reader) -> None:
        # Without a wait, what is on its way would come to nobody and stay unsettled.
        await self.lane.cancel(reader.tag, wait=not (reader.retired and reader.full))

    async def _consume(self, room: int) -> None:
        if room != self._prefetch and not self._no_ack:
            await self.channel.basic_qos(prefetch_count=room, timeout=RPC_TIMEOUT)
            self._prefetch = room
        reader = Reader(self, room)

        def receive(message: Message, key: str, tag: int, redelivered: bool) -> None:
            self._handle(message, key, tag, redelivered, reader)

        # Whether the queue is there and may be read, the first answer tells.
        first, self._consuming = not self._consuming, True
        self._readers.append(reader)
        reader.tag = await self.lane.consume(self._queue, receive, no_ack=self._no_ack, wait=first)


class RabbitDelivery:
    """A delivery on one channel; see `transport.base.Delivery`."""

    __slots__ = ("_reader", "_settled", "_tag", "key", "lost", "message", "queue", "redelivered")

    def __init__(
        self, message: Message, key: str, tag: int, redelivered: bool, reader: Reader, queue: str
    ) -> None:
        self.message = message
        self.queue = queue
        self.key = key
        self.redelivered = redelivered
        self.lost = _lost(message.headers)
        self._tag = tag
        self._reader = reader
        self._settled = False
        reader.held += 1

    @property
    def live(self) -> bool:
        """Whether it can still be settled."""
        return not self._settled and self._reader.session.alive

    async def ack(self) -> None:
        """Settle it."""
        if self.live:
            await self._settle()
            await self._reader.session.lane.ack(self._tag)

    async def requeue(self) -> None:
        """Give it back to its queue."""
        if self.live:
            await self._settle()
            await self._reader.session.lane.reject(self._tag)

    async def _settle(self) -> None:
        self._settled = True
        reader = self._reader
        if reader.retired:
            await reader.session.may_settle(reader)
        reader.held -= 1


def _lost(headers: Mapping[str, object]) -> int:
    """Return how often a quorum queue delivered this before in vain.

    A publisher may have written the header, with any number in it.
    """
    count = headers.get("x-delivery-count", 0)
    return min(max(0, count), UNLIMITED_DELIVERIES) if isinstance(count, int) else 0


def to_deliveries(queue: str, receive: Receive) -> Handle:
    """Return what hands each message on as a delivery to settle."""

    def handle(message: Message, key: str, tag: int, redelivered: bool, reader: Reader) -> None:
        receive(RabbitDelivery(message, key, tag, redelivered, reader, queue))

    return handle


def to_messages(receive: Callable[[Message], None]) -> Handle:
    """Return what hands on messages only."""
    return lambda message, *_: receive(message)
