"""The same tests against every transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import pytest

from brokertask.envelope import Message
from brokertask.topology import Binding, Names, Queue, QueueOptions, TaskQueue, Topology, topology
from brokertask.transport.base import Delivery, Transport
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.transport.socket import SocketTransport, serve

Connect: TypeAlias = Callable[[], Awaitable[Transport]]
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


async def consume(
    transport: Transport, queue: str = WORK, *, prefetch: int = 10
) -> Inbox[Delivery]:
    inbox = Inbox[Delivery]()
    await transport.consume(queue, inbox, prefetch=prefetch)
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


@pytest.fixture(params=["memory", "socket", "rabbitmq"])
async def connect(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Connect]:
    """A function that returns one more open transport to the same broker."""
    async with AsyncExitStack() as stack:
        if request.param == "rabbitmq":
            url: str = request.getfixturevalue("amqp_url")
            make: Callable[[], Transport] = lambda: RabbitTransport(url)  # noqa: E731
        else:
            broker = MemoryBroker()
            stack.callback(broker.close)
            path = tmp_path / "broker" / "dev.sock"
            if request.param == "socket":
                stack.push_async_callback((await serve(broker, path)).close)
                make = lambda: SocketTransport(path)  # noqa: E731
            else:
                make = lambda: MemoryTransport(broker)  # noqa: E731

        async def connect() -> Transport:
            transport = make()
            await transport.open(timeout=SECONDS)
            stack.push_async_callback(transport.close)
            return transport

        yield connect


@pytest.fixture
async def transport(connect: Connect) -> Transport:
    """An open transport to an empty broker."""
    return await connect()
