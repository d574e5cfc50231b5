"""`MemoryTransport`: the port on an embedded broker of this process, from any event loop.

The broker lives in the loop that connected first. Others, such as the background thread of
`trigger_sync`, have every call done there and every delivery brought over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from brokertask.envelope import Message
from brokertask.errors import BrokerUnavailable
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Delivery, Depth, Difference, Receive
from brokertask.transport.memory.broker import MemoryBroker
from brokertask.transport.memory.connection import Connection

T = TypeVar("T")


class MemoryTransport:
    """A connection to a `MemoryBroker`: see `transport.base.Transport` for what each call does."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._connection = Connection(broker)
        self._bridge: _Bridge | None = None

    @property
    def connected(self) -> bool:
        """Whether it is open and the broker runs."""
        return self._connection.connected

    @property
    def carries_losses(self) -> bool:
        """Never, as on RabbitMQ 3."""
        return False

    @property
    def settling(self) -> float:
        """Nothing, its queues included, survives the process."""
        return 0.0

    @property
    def unsettled(self) -> int:
        """How many deliveries its consumers have neither acked nor given back."""
        return self._connection.unsettled

    async def open(self, *, timeout: float) -> None:
        """Connect."""
        here = asyncio.get_running_loop()
        home = self._broker.live_in(here)
        self._bridge = None if home is here else _Bridge(home, here)
        await self._at_home(self._connection.open(timeout=timeout))

    async def close(self) -> None:
        """Give back what is unsettled, and disconnect. Safe to call twice."""
        await self._at_home(self._connection.close())

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        """Store a message. The time-out is real time on any clock."""
        await self._at_home(
            self._connection.publish(route, message, timeout=timeout, mandatory=mandatory)
        )

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        """Subscribe."""
        consume, bridge = self._connection.consume, self._bridge
        if bridge is None:
            return await consume(queue, receive, prefetch=prefetch, limited=limited)

        def bring(delivery: Delivery) -> None:
            bridge.bring(receive, _BroughtDelivery(delivery, bridge))

        there = consume(queue, bring, prefetch=prefetch, limited=limited)
        return _DistantConsumer(await bridge.cross(there), bridge)

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver what `bindings` route, over a queue of its own."""
        bridge = self._bridge
        if bridge is None:
            return await self._connection.listen(queue, bindings, receive)

        def bring(message: Message) -> None:
            bridge.bring(receive, message)

        there = self._connection.listen(queue, bindings, bring)
        return _DistantConsumer(await bridge.cross(there), bridge)

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None = None
    ) -> Consumer:
        """Deliver all that a stream holds, and what comes from now on."""
        bridge = self._bridge
        if bridge is None:
            return await self._connection.follow(stream, receive, after=after)

        def bring(message: Message) -> None:
            bridge.bring(receive, message)

        there = self._connection.follow(stream, bring, after=after)
        return _DistantConsumer(await bridge.cross(there), bridge)

    async def declare(self, topology: Topology) -> None:
        """Make what is missing."""
        await self._at_home(self._connection.declare(topology))

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what is missing or different; changes nothing."""
        return await self._at_home(self._connection.compare(topology))

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, or None if it does not exist."""
        return await self._at_home(self._connection.depth(queue))

    async def delete(self, queue: str) -> None:
        """Delete a queue with what it holds."""
        await self._at_home(self._connection.delete(queue))

    async def _at_home(self, work: Coroutine[Any, Any, T]) -> T:
        return await (work if self._bridge is None else self._bridge.cross(work))


class _Bridge:
    """From the loop of another thread to the broker's, and back."""

    def __init__(self, home: asyncio.AbstractEventLoop, here: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._here = here

    async def cross(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` in the broker's loop and return its result."""
        if not self._home.is_running():
            work.close()
            raise BrokerUnavailable("the embedded broker's event loop has ended")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._home))

    def bring(self, receive: Callable[[T], None], what: T) -> None:
        """Hand something to a receiver in the other loop, if that still runs."""
        if self._here.is_running():
            self._here.call_soon_threadsafe(receive, what)


class _BroughtDelivery:
    def __init__(self, delivery: Delivery, bridge: _Bridge) -> None:
        self.message = delivery.message
        self.queue = delivery.queue
        self.key = delivery.key
        self.redelivered = delivery.redelivered
        self.lost = delivery.lost
        self._delivery = delivery
        self._bridge = bridge

    @property
    def live(self) -> bool:
        return self._delivery.live

    async def ack(self) -> None:
        if self.live:
            await self._bridge.cross(self._delivery.ack())

    async def requeue(self) -> None:
        if self.live:
            await self._bridge.cross(self._delivery.requeue())


class _DistantConsumer:
    def __init__(self, consumer: Consumer, bridge: _Bridge) -> None:
        self._consumer = consumer
        self._bridge = bridge

    async def limit(self, prefetch: int) -> None:
        await self._bridge.cross(self._consumer.limit(prefetch))

    async def stop(self) -> None:
        await self._bridge.cross(self._consumer.stop())

    async def close(self) -> None:
        await self._bridge.cross(self._consumer.close())
