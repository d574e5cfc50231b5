"""FastStream: `faststream run`; it acks when the handler has returned. Its log is off."""

from __future__ import annotations

import uvloop
from faststream import FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from pydantic import BaseModel

from tests.bench.marks import QUEUE, Setup
from tests.bench.producing import serve_async


class Named(BaseModel):
    t: int
    name: str


SETUP = Setup.read()
_begun = SETUP.started().mark
_KIND = QueueType.QUORUM if SETUP.kind == "quorum" else QueueType.CLASSIC
_QUEUE = RabbitQueue(QUEUE, durable=True, queue_type=_KIND)

broker = RabbitBroker(
    SETUP.url, default_channel=Channel(prefetch_count=SETUP.concurrency), logger=None
)
app = FastStream(broker, logger=None)


async def noop(payload: Named) -> None:
    _begun(payload.t)


def noop_in_a_thread(payload: Named) -> None:
    _begun(payload.t)


broker.subscriber(_QUEUE)(noop_in_a_thread if SETUP.sync else noop)


def one(number: int, name: str):
    return broker.publish(Named(t=number, name=name), queue=_QUEUE, persist=True)


async def main() -> None:
    await broker.connect()
    await broker.declare_queue(_QUEUE)
    await serve_async(one)
    await broker.stop()


if __name__ == "__main__":
    uvloop.run(main())
