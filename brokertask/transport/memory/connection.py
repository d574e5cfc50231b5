"""A connection in the broker's own event loop: what each call of the port does there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

import msgpack

from brokertask.envelope import Message
from brokertask.errors import BrokerBlocked, BrokerUnavailable, InvalidPayload
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Delivery, Depth, Difference, Receive, own_headers
from brokertask.transport.memory.broker import MemoryBroker
from brokertask.transport.memory.queues import Item, Parcel, StoredQueue

LISTEN_PREFETCH: Final = 1_000
MAX_SHORT_TEXT: Final = 255
"""AMQP's limit for routing keys and properties, in bytes of UTF-8."""


class Connection:
    """The port of `transport.base`, for the loop that the broker lives in."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._consumers: list[_Consumer] = []
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
            self._broker.attach(self.lose)

    async def close(self) -> None:
        """Give back what is unsettled, and disconnect. Safe to call twice."""
        self._opened = False
        consumers, self._consumers = self._consumers, []
        for consumer in consumers:
            await consumer.close()
        self._broker.detach(self.lose)

    def lose(self) -> None:
        """Lose every delivery, as when a connection is cut."""
        for consumer in self._consumers:
            consumer.lose()

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

    async def consume(self, queue: str, receive: Receive, *, prefetch: int) -> Consumer:
        """Subscribe; see `Transport.consume`."""
        consumer = _Consumer(self._connection().queue(queue), receive, prefetch)
        self._consumers.append(consumer)
        return consumer

    async def declare(self, topology: Topology) -> None:
        """Make what is missing; see `Transport.declare`."""
        self._connection().declare(topology)

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
        broker = self._connection()
        broker.declare(Topology((), (queue,), bindings))
        listener = _Listener(broker, broker.queue(queue.name), receive)
        self._consumers.append(listener)
        return listener

    def _connection(self) -> MemoryBroker:
        if not self.connected:
            raise _down()
        return self._broker


class _Delivery:
    def __init__(self, consumer: _Consumer, item: Item) -> None:
        self.item = item
        self.message = item.message()
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
    """A subscription: `held` are its unsettled deliveries, oldest first."""

    def __init__(self, queue: StoredQueue, receive: Receive, prefetch: int) -> None:
        self.queue = queue
        self._receive = receive
        self._prefetch = prefetch
        self._held: dict[_Delivery, None] = {}
        self._loop = asyncio.get_running_loop()
        queue.readers.append(self)
        queue.pump()

    @property
    def free(self) -> bool:
        return len(self._held) < self._prefetch

    def deliver(self, item: Item) -> None:
        delivery = _Delivery(self, item)
        self._held[delivery] = None
        self._loop.call_soon(self._hand_over, delivery)

    def _hand_over(self, delivery: _Delivery) -> None:
        if delivery.live:
            self._receive(delivery)

    def settle(self, delivery: _Delivery) -> None:
        if delivery.live:
            delivery.live = False
            del self._held[delivery]
            self.queue.pump()

    def give_back(self, deliveries: list[_Delivery]) -> None:
        for delivery in deliveries:
            delivery.live = False
            del self._held[delivery]
        self.queue.give_back([delivery.item for delivery in deliveries])

    def lose(self) -> None:
        self.give_back(list(self._held))

    async def stop(self) -> None:
        if self in self.queue.readers:
            self.queue.readers.remove(self)
        # What is on its way arrives before this returns, as before a broker's cancel-ok.
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self.stop()
        self.lose()
        self.queue.pump()


class _Listener(_Consumer):
    """A consumer of a queue of its own, which settles on receipt."""

    def __init__(
        self, broker: MemoryBroker, queue: StoredQueue, receive: Callable[[Message], None]
    ) -> None:
        self._broker = broker
        self._receive_message = receive
        super().__init__(queue, self._take, LISTEN_PREFETCH)

    def _take(self, delivery: Delivery) -> None:
        assert isinstance(delivery, _Delivery)
        self.settle(delivery)
        self._receive_message(delivery.message)

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
