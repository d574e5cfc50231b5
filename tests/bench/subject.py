"""brokertask's own program: the task that all the peers have, too.

Run by `brokertask worker tests.bench.subject:app`; as a program it is the producer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import uvloop
from pydantic import BaseModel

from brokertask import App, Context, RetryAfter, Settings, Task
from tests.bench.marks import Setup
from tests.bench.producing import serve_async


class Named(BaseModel):
    t: int
    name: str


SETUP: Final = Setup.read()
# Results are for who waits for them, and no peer has a backend for them here. The harness declares
# the topology, so that the queue can be of the kind that a peer's is.
app: Final = App("bench", settings=Settings(amqp_url=SETUP.url, results=False, declare=False))
_begun: Final = SETUP.started().mark
_sent: Final = SETUP.sent().mark


async def noop(payload: Named) -> None:
    _begun(payload.t)


def noop_in_a_thread(payload: Named) -> None:
    _begun(payload.t)


async def noop_at_second(payload: Named, ctx: Context) -> None:
    if ctx.attempt == 1:
        _sent(payload.t)
        raise RetryAfter(SETUP.retry_after)
    _begun(payload.t)


def _function() -> Callable[..., Any]:
    if SETUP.retry_after:
        return noop_at_second
    return noop_in_a_thread if SETUP.sync else noop


tasks: Final[list[Task[Any, Any]]] = [
    app.task(id=f"noop-{number}" if number else "noop", concurrency=SETUP.concurrency)(_function())
    for number in range(SETUP.tasks)
]


def one(number: int, name: str) -> Awaitable[object]:
    return tasks[number % len(tasks)].trigger(Named(t=number, name=name))


async def batch(numbers: Iterable[int], name: str) -> None:
    shares: dict[int, list[int]] = {}
    for number in numbers:
        shares.setdefault(number % len(tasks), []).append(number)
    for at, share in shares.items():
        await tasks[at].trigger_many(Named(t=number, name=name) for number in share)


async def main() -> None:
    async with app:
        await serve_async(one, batch)


if __name__ == "__main__":
    uvloop.run(main())
