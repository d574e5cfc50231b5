"""A connection in the broker's own event loop: what each call of the port does there."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

import msgpack

from brokertask.envelope import Message
from brokertask.errors import (
    BrokerBlocked,
    BrokertaskError,
    BrokerUnavailable,
    ConfigurationError,
    InvalidPayload,
)
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Delivery, Depth, Difference, Receive, own_headers
from brokertask.transport.declared import Declared
from brokertask.transport.memory.broker import MemoryBroker
from brokertask.transport.memory.queues import Item, Parcel, StoredQueue
from brokertask.transport.memory.streams import Follower, StoredStream

log = logging.getLogger("brokertask.memory")

LISTEN_PREFETCH: Final = 1_000
UNLIMITED: Final = sys.maxsize
MAX_SHORT_TEXT: Final = 255
"""AMQP's limit for routing keys and properties, in bytes of UTF-8."""


class Connection:
    """The port of `transport.base`, for the loop that the broker lives in."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._consumers: list[_Consumer | Follower] = []
        self.declared = Declared()
        self._opened = False

    @property
    def connected(self) -> bool:
        """Whether it is open and the broker runs."""
        return self._opened and self._broker.up

    async def open(self, *, timeout: float) -> None:
        """Connect; see `Transport.open`."""
        try:
            async with asyncio.timeout(timeout):
                await self._broker.running.wait()
        except TimeoutError:
            raise _down() from None
        if not self._opened:
            self._opened = True
            self._broker.attach(self)

    @property
    def unsettled(self) -> int:
        """How many deliveries its consumers have neither acked nor given back."""
        return sum(one.unsettled for one in self._consumers if isinstance(one, _Consumer))

    async def close(self) -> None:
        """Give back what is unsettled, and disconnect. Safe to call twice."""
        self._opened = False
        consumers, self._consumers = self._consumers, []
        for consumer in consumers:
            await consumer.close()
        self._broker.detach(self)

    def lose(self) -> None:
        """Lose every delivery, as when a connection is cut."""
        for consumer in self._consumers:
            consumer.lose()

    def lose_queue(self, queue: StoredQueue) -> None:
        """Lose what was delivered from a deleted queue."""
        for consumer in self._consumers:
            if consumer.queue is queue:
                consumer.lose_queue()

    def forget(self, consumer: _Consumer | Follower) -> None:
        """Tell a closed consumer nothing any more."""
        if consumer in self._consumers:
            self._consumers.remove(consumer)

    def find_queue(self, queue: StoredQueue) -> None:
        """Have the consumers of a queue that was deleted read the new one."""
        for consumer in self._consumers:
            if consumer.queue.name == queue.name:
                consumer.move(queue)

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        """Store a message; see `Transport.publish`. The time-out is real time on any clock."""
        parcel = _pack(route, message)
        if not (self.connected and self._broker.flowing.is_set()):
            await self._until_ready(timeout)
        self._broker.publish(parcel, mandatory=mandatory)
        # A real broker's answer takes a round trip, in which other tasks run.
        await asyncio.sleep(0)

    async def _until_ready(self, timeout: float) -> None:
        broker = self._broker
        try:
            async with asyncio.timeout(timeout):
                while self._opened and not (broker.up and broker.flowing.is_set()):
                    await broker.running.wait()
                    await broker.flowing.wait()
        except TimeoutError:
            if broker.up:
                raise BrokerBlocked(
                    "an alarm on the embedded broker stops all publishing; nothing was sent"
                ) from None
        if not self.connected:
            raise _down()

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        """Subscribe; see `Transport.consume`. Limits lose nothing here in either case."""
        stored = self._connection().queue(queue)
        consumer = _Consumer(self, stored, receive, prefetch or UNLIMITED)
        self._consumers.append(consumer)
        return consumer

    async def declare(self, topology: Topology) -> None:
        """Make what is missing; see `Transport.declare`."""
        self._connection().declare(topology)
        self.declared.remember(topology)

    async def delete(self, queue: str) -> None:
        """Delete a queue with what it holds; see `Transport.delete`."""
        broker = self._connection()
        self.declared.forget(queue)
        broker.delete(queue)

    def restore(self, topology: Topology) -> None:
        """Make again what somebody deleted under a consumer."""
        try:
            self._broker.declare(topology)
        except BrokertaskError as error:
            log.error("a deleted queue cannot be restored: %s", error)

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what is missing or different; changes nothing."""
        return self._connection().compare(topology)

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, or None if it does not exist."""
        return self._connection().depth(queue)

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver what `bindings` route; see `Transport.listen`."""
        own = Topology((), (queue,), bindings)
        listener = _Listener(self, self._connection(), own, receive)
        self._consumers.append(listener)
        return listener

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None
    ) -> Consumer:
        """Deliver all that a stream holds; see `Transport.follow`."""
        stored = self._connection().queue(stream)
        if not isinstance(stored, StoredStream):
            raise ConfigurationError(f"{stream!r} is a queue, and no stream")
        follower = Follower(
            stored,
            receive,
            after=after,
            restore=lambda: self.restore(self.declared.topology),
            closed=self.forget,
        )
        self._consumers.append(follower)
        return follower

    def _connection(self) -> MemoryBroker:
        if not self.connected:
            raise _down()
        return self._broker


class _Delivery:
    def __init__(self, consumer: _Consumer, item: Item) -> None:
        self.item = item
        self.message = item.message()
        self.key = item.parcel.keys[0]
        self.lost = item.lost
        self.live = True
        self._consumer = consumer

    @property
    def queue(self) -> str:
        return self._consumer.queue.name

    @property
    def redelivered(self) -> bool:
        return self.lost > 0

    async def ack(self) -> None:
        self._consumer.settle(self)

    async def requeue(self) -> None:
        if self.live:
            self._consumer.give_back([self])
            self._consumer.queue.pump()


class _Consumer:
    """A subscription: `held` are its unsettled deliveries, oldest first.

    Those from before the present limit are `earlier`: they take no room in it.
    """

    def __init__(
        self, connection: Connection, queue: StoredQueue, receive: Receive, limit: int
    ) -> None:
        self.queue = queue
        self._connection = connection
        self._receive = receive
        self._limit = self._whole = limit
        self._earlier: dict[_Delivery, None] = {}
        self._held: dict[_Delivery, None] = {}
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._read()

    @property
    def free(self) -> bool:
        return len(self._held) < self._limit

    @property
    def unsettled(self) -> int:
        return len(self._earlier) + len(self._held)

    def deliver(self, item: Item) -> None:
        delivery = _Delivery(self, item)
        self._held[delivery] = None
        self._loop.call_soon(self._hand_over, delivery)

    def _hand_over(self, delivery: _Delivery) -> None:
        if delivery.live:
            self._receive(delivery)

    def settle(self, delivery: _Delivery) -> None:
        if delivery.live:
            self._release(delivery)
            self.queue.pump()

    def give_back(self, deliveries: list[_Delivery]) -> None:
        for delivery in deliveries:
            self._release(delivery)
        self.queue.give_back([delivery.item for delivery in deliveries])

    def _release(self, delivery: _Delivery) -> None:
        delivery.live = False
        self._earlier.pop(delivery, None)
        self._held.pop(delivery, None)

    def lose(self) -> None:
        # Before what it held comes again, as to a consumer that resumes.
        paused, self._limit = self._limit <= 0, self._whole
        self.give_back([*self._earlier, *self._held])
        if paused and not self._loop.is_closed():
            self._read()

    def lose_queue(self) -> None:
        for delivery in [*self._earlier, *self._held]:
            self._release(delivery)
        self._loop.call_soon(self._read)

    def move(self, queue: StoredQueue) -> None:
        self.queue = queue
        self._read()

    @property
    def _reading(self) -> bool:
        # As for RabbitMQ, one that is paused is no reader.
        return self._limit > 0 and not self._stopped

    def _read(self) -> None:
        if not self._reading:
            self.queue.leave(self)
        elif self.queue.deleted:
            self._connection.restore(self._topology())
        else:
            self.queue.join(self)

    def _topology(self) -> Topology:
        """Return what makes its queue anew."""
        return self._connection.declared.topology

    async def limit(self, prefetch: int) -> None:
        self._earlier |= self._held
        self._held.clear()
        self._limit = prefetch
        self._read()
        await self._arrival()

    async def stop(self) -> None:
        self._stopped = True
        self._read()
        await self._arrival()

    async def _arrival(self) -> None:
        """Return when what is on its way has arrived, as before a broker's cancel-ok."""
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self.stop()
        self.lose()
        self.queue.pump()
        self._connection.forget(self)


class _Listener(_Consumer):
    """A consumer of a queue of its own, which settles on receipt."""

    def __init__(
        self,
        connection: Connection,
        broker: MemoryBroker,
        own: Topology,
        receive: Callable[[Message], None],
    ) -> None:
        self._broker = broker
        self._own = own
        self._receive_message = receive
        broker.declare(own)
        (queue,) = own.queues
        super().__init__(connection, broker.queue(queue.name), self._take, LISTEN_PREFETCH)

    def _take(self, delivery: Delivery) -> None:
        assert isinstance(delivery, _Delivery)
        self.settle(delivery)
        self._receive_message(delivery.message)

    def _topology(self) -> Topology:
        return self._own

    async def limit(self, prefetch: int) -> None:
        """Do nothing: what is settled on receipt needs no limit."""

    async def close(self) -> None:
        await super().close()
        self._broker.delete(self.queue.name)


def _pack(route: Route, message: Message) -> Parcel:
    keys = (route.key, *route.also)
    headers = own_headers(message.headers)
    seconds = None if message.timestamp_ms is None else message.timestamp_ms // 1000
    try:
        for text in (*keys, message.message_id, message.type, message.correlation_id):
            if text is not None and len(text.encode()) > MAX_SHORT_TEXT:
                raise ValueError(f"{text[:20]!r}… is longer than {MAX_SHORT_TEXT} bytes")
        packed = cast("bytes", msgpack.packb(headers))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidPayload(f"a message property cannot be sent: {error}") from None
    kept = replace(
        message,
        body=bytes(message.body),
        headers={},
        timestamp_ms=None if seconds is None else seconds * 1000,
    )
    return Parcel(kept, packed, route.exchange, keys)


def _down() -> BrokerUnavailable:
    return BrokerUnavailable("there is no connection to the embedded broker; nothing was sent")
