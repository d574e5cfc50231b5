"""Celery: `celery worker`, with late acks; remote control, events and results are off."""

from __future__ import annotations

from celery import Celery

from tests.bench.marks import QUEUE, Setup
from tests.bench.producing import serve

SETUP = Setup.read()
_begun = SETUP.started().mark

app = Celery("bench", broker=SETUP.url)
app.conf.update(
    broker_transport_options={"confirm_publish": SETUP.confirm},
    task_acks_late=True,
    task_default_queue=QUEUE,
    task_ignore_result=True,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
)


@app.task(name="noop")
def noop(t: int, name: str) -> None:
    _begun(t)


if __name__ == "__main__":
    serve(lambda number, name: noop.delay(number, name))
