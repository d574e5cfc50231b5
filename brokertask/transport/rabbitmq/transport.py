"""`RabbitTransport`: the port of `transport.base` on two links to one broker."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from aiormq.abc import AbstractChannel

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError
from brokertask.settings import DataPlane
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Depth, Difference, Receive
from brokertask.transport.declared import Declared
from brokertask.transport.rabbitmq.consumer import RabbitConsumer
from brokertask.transport.rabbitmq.declarer import Declarer, declare_one
from brokertask.transport.rabbitmq.follower import RabbitFollower
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.publisher import Publisher
from brokertask.transport.rabbitmq.session import to_deliveries, to_messages

CONNECT_TIMEOUT: Final = 30.0
FAREWELL_TIMEOUT: Final = 3.0


class RabbitTransport:
    """A process's access to a RabbitMQ: see `transport.base.Transport` for what each call does.

    An alarm on the broker blocks the connection that publishes; consuming and acking go on over
    the other. Connections are made when first needed: a publisher has one.
    """

    def __init__(
        self,
        url: str,
        *,
        heartbeat: int = 30,
        name: str = "brokertask",
        data_plane: DataPlane = "direct",
        reconnected: Callable[[], None] = lambda: None,
    ) -> None:
        direct = data_plane == "direct"
        self._publishing, self._consuming = (
            Link(
                url,
                heartbeat=heartbeat,
                name=f"{name} {role}",
                direct=direct,
                reconnected=reconnected,
            )
            for role in ("publish", "consume")
        )
        self._publisher = Publisher(self._publishing)
        self._declarer = Declarer(self._publishing)
        self._consumers: list[RabbitConsumer | RabbitFollower] = []
        self._declared = Declared()
        self._restoring = asyncio.Lock()
        self._major = 0

    @property
    def connected(self) -> bool:
        """Whether links and consumers are up at this moment."""
        return (
            self._publishing.up
            and self._consuming.up
            and all(consumer.up for consumer in self._consumers)
        )

    @property
    def server(self) -> str:
        """What the broker calls itself, with its version; empty while not connected."""
        return self._publishing.server

    @property
    def carries_losses(self) -> bool:
        """From RabbitMQ 4.0 on."""
        # Of the latest broker that was connected to: a delivery may come when it is gone.
        if (version := re.search(r"(\d+)\.", self.server)) is not None:
            self._major = int(version[1])
        return self._major >= 4

    @property
    def settling(self) -> float:
        """Two seconds: the name of a new quorum queue is written to disk within one or so.

        A broker that is killed before comes back with the queue, but without a leader, and what it
        confirmed is gone. Source: `ra_directory` of Ra 2 opens its table with `auto_save` 500 ms,
        which writes once the table has rested for such an interval.
        """
        return 2.0

    async def open(self, *, timeout: float) -> None:
        """Connect for publishing."""
        await self._publishing.connection(timeout=timeout)

    async def close(self) -> None:
        """Give back what is unsettled, and disconnect."""
        consumers, self._consumers = self._consumers, []
        await asyncio.gather(*(consumer.close() for consumer in consumers))
        await self._publisher.close()
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        """Publish persistently and return when the broker confirms it."""
        await self._publisher.publish(route, message, timeout=timeout, mandatory=mandatory)

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        """Deliver messages of `queue` to `receive`."""
        consumer = RabbitConsumer(
            self._consuming,
            queue,
            to_deliveries(queue, receive),
            prefetch=prefetch,
            limited=limited,
            restore=self._restore,
        )
        await consumer.start(timeout=CONNECT_TIMEOUT)
        self._consumers.append(consumer)
        return consumer

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver what `bindings` route, over a queue of this process's own."""

        async def prepare(channel: AbstractChannel) -> None:
            await declare_one(channel, queue)
            for binding in bindings:
                await channel.queue_bind(
                    binding.queue, binding.exchange, binding.key, timeout=RPC_TIMEOUT
                )

        consumer = RabbitConsumer(
            self._consuming,
            queue.name,
            to_messages(receive),
            prefetch=0,
            no_ack=True,
            prepare=prepare,
        )
        await consumer.start(timeout=CONNECT_TIMEOUT)
        listener = _Listener(self, consumer, queue.name)
        self._consumers.append(consumer)
        return listener

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None = None
    ) -> Consumer:
        """Deliver all that a stream holds, and what comes from now on."""
        follower = RabbitFollower(
            self._consuming, stream, receive, after=after, restore=self._restore
        )
        await follower.start(timeout=CONNECT_TIMEOUT)
        self._consumers.append(follower)
        return follower

    async def declare(self, topology: Topology) -> None:
        """Make everything of `topology` that is missing; remembered for when a queue is deleted."""
        await self._declarer.declare(topology, timeout=CONNECT_TIMEOUT)
        self._declared.remember(topology)

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what on the broker is missing or different."""
        return await self._declarer.compare(topology, timeout=CONNECT_TIMEOUT)

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, by a passive declare."""

        async def ask(channel: AbstractChannel) -> Depth:
            answer = await channel.queue_declare(queue, passive=True, timeout=RPC_TIMEOUT)
            return Depth(ready=answer.message_count or 0, consumers=answer.consumer_count or 0)

        return await self._declarer.ask(ask, timeout=CONNECT_TIMEOUT)

    async def delete(self, queue: str) -> None:
        """Delete a queue with all that it holds; no consumer of this transport restores it."""

        async def ask(channel: AbstractChannel) -> None:
            await channel.queue_delete(queue, timeout=RPC_TIMEOUT)

        self._declared.forget(queue)
        await self._declarer.ask(ask, timeout=CONNECT_TIMEOUT)

    async def _restore(self) -> None:
        """Make again what somebody deleted under us, if it was ours to make."""
        async with self._restoring:
            await self._declarer.declare(self._declared.topology, timeout=CONNECT_TIMEOUT)


class _Listener:
    """A consumer whose queue goes with it."""

    def __init__(self, transport: RabbitTransport, consumer: RabbitConsumer, queue: str) -> None:
        self._transport = transport
        self._consumer = consumer
        self._queue = queue

    async def limit(self, prefetch: int) -> None:
        """Do nothing: what is settled on receipt needs no limit."""

    async def stop(self) -> None:
        await self._consumer.stop()

    async def close(self) -> None:
        await self._consumer.close()
        if self._consumer in self._transport._consumers:
            self._transport._consumers.remove(self._consumer)
        # Without a broker to ask, the queue goes by its x-expires.
        with suppress(BrokertaskError, TimeoutError):
            async with asyncio.timeout(FAREWELL_TIMEOUT):
                await self._transport.delete(self._queue)
