"""taskiq with taskiq-aio-pika: `taskiq worker`; it acks when the task has been executed."""

from __future__ import annotations

import uvloop
from taskiq_aio_pika import AioPikaBroker, Queue, QueueType

from tests.bench.marks import QUEUE, Setup
from tests.bench.producing import serve_async

SETUP = Setup.read()
_begun = SETUP.started().mark
_KIND = QueueType.QUORUM if SETUP.kind == "quorum" else QueueType.CLASSIC

broker = AioPikaBroker(
    SETUP.url,
    qos=SETUP.concurrency,
    task_queues=[Queue(name=QUEUE, type=_KIND)],
)


async def noop(t: int, name: str) -> None:
    _begun(t)


def noop_in_a_thread(t: int, name: str) -> None:
    _begun(t)


task = broker.register_task(noop_in_a_thread if SETUP.sync else noop, task_name="noop")


async def main() -> None:
    await broker.startup()
    await serve_async(task.kiq)
    await broker.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
