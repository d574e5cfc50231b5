"""Bare aio-pika on uvloop: a callback that reads the body and acks, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys

import aio_pika
import uvloop

from tests.bench.marks import QUEUE, Setup
from tests.bench.producing import serve_async

SETUP = Setup.read()
_begun = SETUP.started().mark


async def begin(channel):
    return await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": SETUP.kind})


async def noop(message) -> None:
    _begun(json.loads(message.body)["t"])
    await message.ack()


async def main() -> None:
    connection = await aio_pika.connect_robust(SETUP.url)
    channel = await connection.channel()
    queue = await begin(channel)
    if "work" in sys.argv:
        await channel.set_qos(SETUP.concurrency)
        await queue.consume(noop)
        await asyncio.Event().wait()

    def one(number: int, name: str):
        body = json.dumps({"t": number, "name": name}).encode()
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        return channel.default_exchange.publish(message, routing_key=QUEUE)

    await serve_async(one)
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main())
