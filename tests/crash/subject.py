"""The app under test: run by real worker processes, and telling a journal what it does."""

from __future__ import annotations

import asyncio
import builtins
import os
import time
from pathlib import Path

from brokertask import App, Context, Queue, Retry
from tests.crash.journal import Pen

app = App("subject")
pen = Pen()
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
