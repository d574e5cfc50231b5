"""The producer's side of a measured program: it enqueues as it is told, line by line.

Each order is a line of JSON on its standard input, each answer one on its output; at the end of
the input it ends. Standard library only, as `marks`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal, TypeAlias

from tests.bench.marks import Setup

Mode: TypeAlias = Literal["one", "many", "batch", "paced"]
One: TypeAlias = Callable[[int, str], object]
OneAsync: TypeAlias = Callable[[int, str], Awaitable[object]]
BatchAsync: TypeAlias = Callable[[Iterable[int], str], Awaitable[object]]

IN_FLIGHT: Final = 100


@dataclass(frozen=True, slots=True)
class Order:
    """Enqueue `count` tasks from number `first` on.

    `one`: each after the confirm of the one before. `many`: 100 in flight, where a producer can.
    `batch`: with the call made for many, where there is one. `paced`: one every `interval`
    seconds, with the instant of each call marked.
    """

    mode: Mode
    first: int
    count: int
    size: int = 60
    interval: float = 0.0

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def json(self) -> str:
        """The order as Python programs read it."""
        return json.dumps(asdict(self))

    @property
    def words(self) -> str:
        """The order as `client.c` reads it."""
        return f"{self.mode} {self.first} {self.count} {self.size}"

    @property
    def name(self) -> str:
        """The payload's text."""
        return ("a name as long as those of people and of things are " * (self.size // 52 + 1))[
            : self.size
        ]


def _said(seconds: float | None) -> None:
    print(json.dumps(seconds), flush=True)


def serve(one: One) -> None:
    """Follow orders with a call that blocks; `many` and `batch` are one after the other, too."""
    _said(None)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        name, begun = order.name, time.perf_counter()
        if order.mode == "paced":
            for number in _paced(order):
                one(number, name)
        else:
            for number in order.numbers:
                one(number, name)
        _said(time.perf_counter() - begun)


async def serve_async(one: OneAsync, batch: BatchAsync | None = None) -> None:
    """Follow orders with a call that is awaited; without a `batch`, that is as `many`."""
    loop = asyncio.get_running_loop()
    _said(None)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = Order(**json.loads(line))
        begun = time.perf_counter()
        if order.mode == "one":
            for number in order.numbers:
                await one(number, order.name)
        elif order.mode == "paced":
            await _pace(order, one)
        elif order.mode == "batch" and batch is not None:
            await batch(order.numbers, order.name)
        else:
            await _in_flight(order, one)
        _said(time.perf_counter() - begun)


async def _in_flight(order: Order, one: OneAsync) -> None:
    numbers, name = iter(order.numbers), order.name

    async def work() -> None:
        for number in numbers:
            await one(number, name)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def _paced(order: Order) -> Iterator[int]:
    sent, due = Setup.read().sent(), time.monotonic()
    for number in order.numbers:
        due += order.interval
        time.sleep(max(0.0, due - time.monotonic()))
        sent.mark(number)
        yield number


async def _pace(order: Order, one: OneAsync) -> None:
    sent, loop, name = Setup.read().sent(), asyncio.get_running_loop(), order.name
    due = loop.time()
    for number in order.numbers:
        due += order.interval
        await asyncio.sleep(max(0.0, due - loop.time()))
        sent.mark(number)
        await one(number, name)
