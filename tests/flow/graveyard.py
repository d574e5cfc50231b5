"""Dead letters to put into a broker, and what is left in its queues."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from brokertask.deadletter import bury, bury_raw
from brokertask.envelope import Envelope, Message
from brokertask.errors import Reason
from brokertask.memory import Memory
from brokertask.outcome import AttemptError, Failed
from brokertask.topology import Names, QueueOptions, TaskQueue, Topology
from brokertask.transport.base import Delivery, Transport
from brokertask.values import encode
from tests.contract.conftest import SECONDS, Inbox, ready, small, until_ready

NAMES = Names("bt")
NOW_MS = 1_700_000_000_000
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def trigger(run_id: str, payload: object = None, **values: object) -> Envelope:
    """A run as it was triggered, an hour before `NOW_MS`."""
    envelope = Envelope(
        run_id=run_id,
        task="charge",
        payload=encode(payload),
        triggered_ms=NOW_MS - 3_600_000,
        trace={"traceparent": TRACE},
        app_id="checkout",
    )
    return replace(envelope, **values)  # type: ignore[arg-type]


def failure(
    kind: str = "GatewayTimeout", message: str = "504 upstream", attempt: int = 1
) -> AttemptError:
    return AttemptError(attempt, kind, message, NOW_MS, "worker-a1", f"Traceback: {kind}")


def dead(
    envelope: Envelope,
    reason: Reason = "max_attempts",
    error: AttemptError | None = None,
    *,
    died_ms: int = NOW_MS,
) -> Message:
    """What a worker buries after the last of two attempts."""
    last = error or failure(attempt=2)
    tried = envelope.again(attempt=2, now_ms=died_ms, memory=Memory((failure(),)))
    return bury(tried, Failed(reason, last), now_ms=died_ms)


def dead_raw(message: Message, error: AttemptError | None = None) -> Message:
    """What a worker buries when it can't read a message at all."""
    failed = Failed("undecodable", error or failure("EnvelopeError", "not application/msgpack", 0))
    return bury_raw(message, failed, task="charge", now_ms=NOW_MS)


async def put(transport: Transport, *messages: Message, task: str = "charge") -> None:
    """Publish to the dead-letter exchange, in order."""
    for message in messages:
        await transport.publish(NAMES.dead_route(task), message, timeout=SECONDS)


def graveyard(*tasks: str, max_length: int | None = None) -> Topology:
    """The topology of some tasks, without the delay ladder."""
    return small(*(TaskQueue(task, QueueOptions(max_length=max_length)) for task in tasks))


async def in_dead(transport: Transport, task: str = "charge") -> int:
    return await ready(transport, NAMES.dead_queue(task))


async def at_work(transport: Transport, task: str = "charge") -> int:
    return await ready(transport, NAMES.queue(task))


async def until_dead(transport: Transport, count: int, task: str = "charge") -> None:
    await until_ready(transport, count, NAMES.dead_queue(task))


async def take(transport: Transport, queue: str, count: int) -> list[Message]:
    """Take messages out of a queue for good."""
    inbox = Inbox[Delivery]()
    consumer = await transport.consume(queue, inbox, prefetch=count)
    deliveries = await inbox.take(count)
    for delivery in deliveries:
        await delivery.ack()
    await consumer.close()
    return [delivery.message for delivery in deliveries]


async def bury_by_broker(transport: Transport, message: Message, deliveries: int) -> None:
    """Publish a trigger and give it back until the broker has buried it."""
    await transport.publish(NAMES.trigger_route("charge"), message, timeout=SECONDS)
    gone = asyncio.Event()
    seen = 0

    def receive(delivery: Delivery) -> None:
        nonlocal seen
        seen += 1
        asyncio.get_running_loop().create_task(delivery.requeue())
        if seen == deliveries:
            gone.set()

    consumer = await transport.consume(NAMES.queue("charge"), receive, prefetch=1)
    async with asyncio.timeout(SECONDS):
        await gone.wait()
    await until_dead(transport, 1)
    await consumer.close()
