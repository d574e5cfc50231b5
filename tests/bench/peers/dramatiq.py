"""Dramatiq: `dramatiq`, with its own middleware and confirmed publishes."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from tests.bench.marks import QUEUE, Setup
from tests.bench.producing import serve

SETUP = Setup.read()
_begun = SETUP.started().mark

broker = RabbitmqBroker(url=SETUP.url, confirm_delivery=SETUP.confirm)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=QUEUE, actor_name="noop")
def noop(t: int, name: str) -> None:
    _begun(t)


if __name__ == "__main__":
    serve(lambda number, name: noop.send(number, name))
