"""The app under test: run by real worker processes, and telling a journal what it does."""

from __future__ import annotations

import asyncio
import builtins
import os
import time
from pathlib import Path
from typing import Any, cast

from brokertask import App, Context, Queue, Retry
from brokertask.envelope import Envelope, Message
from brokertask.topology import Route
from brokertask.transport.base import Transport
from tests.crash.journal import Pen

pen = Pen()


class Subject(App):
    """An app whose processes tell the journal of each checkpoint that the broker confirmed."""

    def connect(self) -> Transport:
        return cast("Transport", Confirmed(super().connect()))


class Confirmed:
    """A transport, and a line for each confirm of a message in the inflight queue."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    async def publish(self, route: Route, message: Message, **options: Any) -> None:
        await self._transport.publish(route, message, **options)
        if route.exchange == app.settings.names.inflight:
            envelope = Envelope.read(message, task=route.key, max_bytes=1_000_000)
            context = Context(run_id=envelope.run_id, task=route.key, attempt=envelope.attempt)
            for step in envelope.memory.steps[-1:]:
                pen.write(f"confirmed:{step.key}", context)


app = Subject("subject")
SOON = Retry(max_attempts=3, min_delay=0.1, factor=1, jitter=False)


async def opened(gate: str) -> None:
    while not Path(gate).exists():  # noqa: ASYNC110, ASYNC240 - a file sets no event
        await asyncio.sleep(0.02)


@app.task(retry=SOON)
async def quick(number: int, ctx: Context) -> int:
    with pen.told(ctx):
        return number


@app.task(retry=Retry(max_attempts=10, min_delay=0.1, factor=1, jitter=False), concurrency=20)
async def slow(seconds: float, ctx: Context) -> float:
    with pen.told(ctx):
        await asyncio.sleep(seconds)
    return seconds


@app.task(retry=SOON, concurrency=3)
async def held(gate: str, ctx: Context) -> str:
    """Run until the file `gate` exists."""
    with pen.told(ctx):
        await opened(gate)
    return gate


@app.task(retry=SOON, concurrency=1)
async def only_one(seconds: float, ctx: Context) -> None:
    with pen.told(ctx):
        await asyncio.sleep(seconds)


@app.task(retry=SOON, concurrency=1)
async def exiting(code: int, ctx: Context) -> None:
    pen.write("started", ctx)
    os._exit(code)


@app.task(retry=SOON, concurrency=1)
async def blocking(seconds: float, ctx: Context) -> None:
    """Block the event loop, as an async task must not."""
    with pen.told(ctx):
        time.sleep(seconds)  # noqa: ASYNC251 - this is the mistake it makes


@app.task(retry=SOON, concurrency=2)
def threaded(seconds: float, ctx: Context) -> None:
    with pen.told(ctx):
        time.sleep(seconds)


@app.task(retry=SOON)
async def raising(kind: str, ctx: Context) -> None:
    """Raise the exception of that name, which no handler expects."""
    error = getattr(builtins, kind, asyncio.CancelledError)
    with pen.told(ctx):
        raise error("raised by the task")


@app.task(retry=SOON)
async def failing(_: None, ctx: Context) -> None:
    with pen.told(ctx):
        raise ValueError("always")


@app.task(retry=SOON)
async def flaky(failures: int, ctx: Context) -> int:
    """Fail in the first `failures` attempts."""
    with pen.told(ctx):
        if ctx.attempt <= failures:
            raise ValueError(f"attempt {ctx.attempt}")
    return ctx.attempt


@app.task(retry=SOON, concurrency=3)
async def flaky_held(gate: str, ctx: Context) -> None:
    """Run until the file `gate` exists; the first attempt then fails."""
    with pen.told(ctx):
        await opened(gate)
        if ctx.attempt == 1:
            raise ValueError("the first attempt")


@app.task(
    retry=Retry(max_attempts=5, factor=2, min_delay=1, max_delay=60, jitter=False), concurrency=50
)
async def backing_off(_: None, ctx: Context) -> None:
    with pen.told(ctx):
        raise ValueError("always")


@app.task(retry=SOON, concurrency=1, queue=Queue(max_length=2))
async def bounded(gate: str, ctx: Context) -> None:
    """Run until the file `gate` exists; the first attempt then fails."""
    with pen.told(ctx):
        await opened(gate)
        if ctx.attempt == 1:
            raise ValueError("the first attempt")


STEPS = ("one", "two", "three", "four", "five")
PATIENT = Retry(max_attempts=50, min_delay=0.1, factor=1, jitter=False)


@app.task(retry=PATIENT, concurrency=10)
async def stepping(seconds: float, ctx: Context) -> list[str]:
    """Five steps, each told when it is done, and when it is safe."""
    return await _five_steps(seconds, ctx)


@app.task(retry=PATIENT, concurrency=10, checkpoint="retry")
async def stepping_lightly(seconds: float, ctx: Context) -> list[str]:
    return await _five_steps(seconds, ctx)


async def _five_steps(seconds: float, ctx: Context) -> list[str]:
    async def work(name: str) -> str:
        await asyncio.sleep(seconds)
        pen.write(f"did:{name}", ctx)
        return f"{name} of {ctx.run_id}"

    with pen.told(ctx):
        results = []
        for name in STEPS:
            results.append(await ctx.step(name, work, name))
            pen.write(f"safe:{name}", ctx)
        if results != [f"{name} of {ctx.run_id}" for name in STEPS]:
            raise AssertionError(f"the results of the steps are {results}")
    return results


@app.task(retry=SOON, concurrency=1)
async def stepping_held(gate: str, ctx: Context) -> str:
    """One step, and another that lasts until the file `gate` exists."""

    async def first() -> str:
        pen.write("did:first", ctx)
        return ctx.worker

    async def second() -> None:
        pen.write("began:second", ctx)
        await opened(gate)
        pen.write("did:second", ctx)

    with pen.told(ctx):
        worker = await ctx.step("first", first)
        await ctx.step("second", second)
    return worker


@app.task(retry=SOON, concurrency=1)
async def napping(seconds: float, ctx: Context) -> str:
    """A step, a sleep, another step; returns where the first was done."""

    async def before() -> str:
        pen.write("did:before", ctx)
        return ctx.worker

    async def after() -> None:
        pen.write("did:after", ctx)

    with pen.told(ctx):
        worker = await ctx.step("before", before)
        await ctx.sleep(seconds)
        await ctx.step("after", after)
    return worker


@app.task(retry=Retry(max_attempts=4, min_delay=0.1, factor=1, jitter=False), timeout=60)
async def summarising(gate: str, ctx: Context) -> list[int]:
    """Fetch a document, ask an AI that answers at the third time of asking, fan out."""

    async def fetch() -> list[str]:
        pen.write("did:fetch", ctx)
        return ["one", "two", "three"]

    async def ask() -> str:
        pen.write("began:ask", ctx)
        if ctx.attempt <= 2:
            await asyncio.sleep(60)
        await opened(gate)
        return "a summary"

    async def fan_out(parts: list[str]) -> list[str]:
        pen.write("did:fan out", ctx)
        return [run.run_id for run in await quick.trigger_many([len(part) for part in parts])]

    with pen.told(ctx):
        text = await ctx.step("fetch", fetch)
        await ctx.step("ask", ask, timeout=1 if ctx.attempt <= 2 else None)
        return [len(run_id) for run_id in await ctx.step("fan out", fan_out, text)]
