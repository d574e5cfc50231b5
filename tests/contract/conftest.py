"""The same tests against every transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import pytest

from brokertask.envelope import Message
from brokertask.errors import Unroutable
from brokertask.settings import DataPlane
from brokertask.topology import (
    Binding,
    Names,
    Queue,
    QueueOptions,
    Route,
    TaskQueue,
    Topology,
    topology,
)
from brokertask.transport.base import Consumer, Delivery, Depth, Transport
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.transport.socket import SocketServer, SocketTransport, serve
from infra.rabbitmq.node import Node

Connect: TypeAlias = Callable[[], Awaitable[Transport]]
Cut: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Item = TypeVar("Item", Delivery, Message)

NAMES = Names("bt")
WORK = NAMES.queue("a")
TRIGGER = NAMES.trigger_route("a")
SECONDS = 10.0
"""How long a test waits for what must happen; only a failing test takes that long."""


def small(*tasks: TaskQueue, rungs: tuple[int, ...] = ()) -> Topology:
    """Return the topology of `tasks`, with only some rungs of the delay ladder."""
    whole = topology(NAMES, tasks or [TaskQueue("a")])
    rest = {NAMES.rung(milliseconds) for milliseconds in rungs}
    kept = tuple(
        queue
        for queue in whole.queues
        if queue.name in rest or not queue.name.startswith(f"{NAMES.delay}.")
    )
    names = {queue.name for queue in kept}
    bindings = tuple(binding for binding in whole.bindings if binding.queue in names)
    return Topology(whole.exchanges, kept, bindings, whole.absent_bindings)


def limited(task: str, delivery_limit: int) -> TaskQueue:
    return TaskQueue(task, QueueOptions(delivery_limit=delivery_limit))


def own_queue(name: str, *keys: str) -> tuple[Queue, tuple[Binding, ...]]:
    """Return a queue to listen on, bound to the events by `keys`."""
    queue = Queue(name, {"x-queue-type": "classic", "x-expires": 600_000})
    return queue, tuple(Binding(NAMES.events, name, key) for key in keys)


class Inbox(Generic[Item]):
    """What a consumer received; pass it as `receive`."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def __call__(self, item: Item) -> None:
        self._items.put_nowait(item)

    async def next(self) -> Item:
        async with asyncio.timeout(SECONDS):
            return await self._items.get()

    async def take(self, count: int) -> list[Item]:
        return [await self.next() for _ in range(count)]

    def __len__(self) -> int:
        return self._items.qsize()


async def send(transport: Transport, *bodies: bytes) -> None:
    """Trigger task a once with each body."""
    for body in bodies:
        await transport.publish(TRIGGER, Message(body=body), timeout=SECONDS)


async def subscribe(
    transport: Transport, queue: str = WORK, *, prefetch: int = 10
) -> tuple[Consumer, Inbox[Delivery]]:
    inbox = Inbox[Delivery]()
    return await transport.consume(queue, inbox, prefetch=prefetch), inbox


async def consume(
    transport: Transport, queue: str = WORK, *, prefetch: int = 10
) -> Inbox[Delivery]:
    _, inbox = await subscribe(transport, queue, prefetch=prefetch)
    return inbox


async def ready(transport: Transport, queue: str = WORK) -> int:
    depth = await transport.depth(queue)
    assert depth is not None, f"there is no queue {queue}"
    return depth.ready


async def until_ready(transport: Transport, count: int, queue: str = WORK) -> None:
    """Return once the broker says that `count` messages wait in `queue`."""
    async with asyncio.timeout(SECONDS):
        while await ready(transport, queue) != count:  # noqa: ASYNC110 - a broker sets no event
            await asyncio.sleep(0.01)


async def until_depth(transport: Transport, depth: Depth, queue: str = WORK) -> None:
    """Return once the broker says so; a consumer that has just gone may still be counted."""
    async with asyncio.timeout(SECONDS):
        while await transport.depth(queue) != depth:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    """Return once something is true that sets no event."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def send_when_routed(transport: Transport, route: Route, body: bytes) -> None:
    """Publish once there is a queue for it."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await transport.publish(route, Message(body=body), timeout=SECONDS)
            except Unroutable:
                await asyncio.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker of one kind: how to connect to it, and how it loses every connection."""

    make: Callable[[], Transport]
    cut: Cut


def _in_process(stack: AsyncExitStack) -> Broker:
    broker = MemoryBroker()
    stack.callback(broker.close)

    async def cut() -> None:
        broker.drop_connections()

    return Broker(lambda: MemoryTransport(broker), cut)


async def _behind_a_socket(stack: AsyncExitStack, path: Path) -> Broker:
    broker = MemoryBroker()
    stack.callback(broker.close)
    servers: list[SocketServer] = [await serve(broker, path)]

    async def close() -> None:
        await servers.pop().close()

    async def cut() -> None:
        await close()
        servers.append(await serve(broker, path))

    stack.push_async_callback(close)
    return Broker(lambda: SocketTransport(path), cut)


def _rabbitmq(node: Node, url: str, data_plane: DataPlane) -> Broker:
    async def cut() -> None:
        await asyncio.to_thread(node.close_connections)

    return Broker(lambda: RabbitTransport(url, data_plane=data_plane), cut)


@pytest.fixture(params=["memory", "socket", "rabbitmq", "rabbitmq by aio-pika"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    """An empty broker of each kind."""
    async with AsyncExitStack() as stack:
        if request.param.startswith("rabbitmq"):
            node, url = (request.getfixturevalue(name) for name in ("rabbitmq_node", "amqp_url"))
            yield _rabbitmq(node, url, "direct" if request.param == "rabbitmq" else "aio-pika")
        elif request.param == "socket":
            yield await _behind_a_socket(stack, tmp_path / "broker" / "dev.sock")
        else:
            yield _in_process(stack)


@pytest.fixture
async def cut(broker: Broker) -> Cut:
    """A function that cuts every connection; the transports are to come back by themselves."""
    return broker.cut


@pytest.fixture
async def connect(broker: Broker) -> AsyncIterator[Connect]:
    """A function that returns one more open transport to the same broker."""
    async with AsyncExitStack() as stack:

        async def connect() -> Transport:
            transport = broker.make()
            await transport.open(timeout=SECONDS)
            stack.push_async_callback(transport.close)
            return transport

        yield connect


@pytest.fixture
async def transport(connect: Connect) -> Transport:
    """An open transport to an empty broker."""
    return await connect()
