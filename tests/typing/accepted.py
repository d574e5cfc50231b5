"""What mypy and pyright must infer. Only checked, never run; a wrong `assert_type` is an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, assert_type

from pydantic import BaseModel
from typing_extensions import TypedDict

from brokertask import (
    App,
    CallNext,
    Client,
    Context,
    Debounce,
    Event,
    Failure,
    First,
    Queue,
    Rejected,
    Retry,
    Run,
    Schedule,
    Settings,
    Singleton,
    Task,
    Tick,
    TimedOut,
)

app = App("typing", settings=Settings(amqp_url="memory:"))


class Document(BaseModel):
    path: str


@dataclass
class Report:
    sections: int


class Movie(TypedDict):
    title: str


# --- every shape of a function, with and without options ----------------------------------------


@app.task
async def nothing() -> int:
    return 1


@app.task
async def context_only(ctx: Context) -> str:
    return ctx.run_id


@app.task
async def payload_only(document: Document) -> Report:
    return Report(len(document.path))


@app.task
async def both(document: Document, ctx: Context) -> None: ...


@app.task
def plain_nothing() -> int:
    return 1


@app.task
def plain_context(ctx: Context) -> str:
    return ctx.run_id


@app.task
def plain_payload(document: Document) -> Report:
    return Report(len(document.path))


@app.task
def plain_both(document: Document, ctx: Context) -> bytes:
    return b""


@app.task(
    id="everything",
    retry=Retry(max_attempts=5, min_delay="1s", max_delay=timedelta(minutes=1), on=(OSError,)),
    concurrency=5,
    timeout="5m",
    queue=Queue(max_length=10),
    middleware=(),
)
async def configured(numbers: list[int], ctx: Context) -> dict[str, float]:
    return {}


@app.task(timeout=5)
def plain_configured(number: int) -> bool:
    return bool(number)


@app.task(concurrency=1)
async def optional(title: str | None) -> Movie | None:
    return None


assert_type(nothing, Task[None, int])
assert_type(context_only, Task[None, str])
assert_type(payload_only, Task[Document, Report])
assert_type(both, Task[Document, None])
assert_type(plain_nothing, Task[None, int])
assert_type(plain_context, Task[None, str])
assert_type(plain_payload, Task[Document, Report])
assert_type(plain_both, Task[Document, bytes])
assert_type(configured, Task[list[int], dict[str, float]])
assert_type(plain_configured, Task[int, bool])
assert_type(optional, Task[str | None, Movie | None])


# --- what is done with them ---------------------------------------------------------------------


def heard(event: Event) -> None:
    assert_type(event.result, bytes | None)


async def triggered(client: Client) -> None:
    run = await payload_only.trigger(Document(path="a"), delay="5m", expires=60, tags=["a"])
    assert_type(run, Run[Report])
    assert_type(run.run_id, str)
    assert_type(await run.result(timeout="1m"), Report)
    run.watch(heard)

    assert_type(await nothing.trigger(), Run[int])
    assert_type(await nothing.trigger(run_id="mine"), Run[int])
    assert_type(await (await both.trigger(Document(path="a"))).result(), None)
    assert_type(await payload_only.trigger_many([Document(path="a")]), list[Run[Report]])
    async for streamed in payload_only.trigger_stream([Document(path="a")], tags=["x"]):
        assert_type(streamed, Run[Report])
    assert_type(await (await optional.trigger(None)).result(), Movie | None)

    untyped = await client.trigger("elsewhere", {"path": "a"}, delay=timedelta(hours=1))
    assert_type(untyped.task, str)


def triggered_without_a_loop() -> None:
    assert_type(payload_only.trigger_sync(Document(path="a")), Run[Report])
    assert_type(plain_nothing.trigger_sync().result_sync(timeout=5), int)


async def called() -> None:
    assert_type(await payload_only(Document(path="a")), Report)
    assert_type(await plain_payload(Document(path="a")), Report)
    assert_type(await nothing(), int)
    assert_type(await both(Document(path="a"), ctx=Context(run_id="r", task="both")), None)


# --- steps and sleeps ---------------------------------------------------------------------------


async def fetch(path: str) -> bytes:
    return path.encode()


async def fetch_with(path: str, tries: int = 3, *, fast: bool = False) -> bytes:
    return path.encode()


def count(data: bytes, start: int = 0) -> int:
    return len(data) - start


def promise(path: str) -> Awaitable[bytes]:
    return fetch(path)


async def notify() -> None: ...


class Shop:
    async def order(self, number: int) -> Report:
        return Report(number)

    def price(self, number: int, discount: float = 0.0) -> float:
        return number - discount

    @classmethod
    async def opened(cls) -> bool:
        return True


async def stepped(ctx: Context, shop: Shop, documents: list[Document]) -> None:
    assert_type(await ctx.step("fetch", fetch, "a"), bytes)
    assert_type(await ctx.step("fetch", fetch_with, "a"), bytes)
    assert_type(await ctx.step("fetch", fetch_with, "a", 5), bytes)
    assert_type(await ctx.step("count", count, b"a"), int)
    assert_type(await ctx.step("count", count, b"a", 1, retry=Retry(), timeout="5s"), int)
    assert_type(await ctx.step("promise", promise, "a"), bytes)
    await ctx.step("notify", notify, timeout=timedelta(seconds=5))
    assert_type(await ctx.step("order", shop.order, 1), Report)
    assert_type(await ctx.step("price", shop.price, 1, 0.5), float)
    assert_type(await ctx.step("opened", Shop.opened), bool)
    assert_type(await ctx.step("lambda", lambda: 5), int)
    assert_type(await ctx.step("lambda", lambda: fetch("a")), bytes)
    assert_type(await ctx.step("partial", partial(fetch_with, "a", fast=True)), bytes)
    assert_type(await ctx.step("report", Report, 5), Report)
    assert_type(await ctx.step("length", len, documents), int)
    step: Coroutine[Any, Any, bytes] = ctx.step("fetch", fetch, "a")
    await step


async def slept(ctx: Context) -> None:
    await ctx.sleep(5)
    await ctx.sleep("1h30m", name="cooling")
    await ctx.sleep(timedelta(days=1))
    await ctx.sleep_until(datetime(2026, 1, 1, tzinfo=UTC))
    assert_type(ctx.once_key("charge"), str)
    assert_type(ctx.cancelled, str | None)
    ctx.progress(1, 2.5)


def stepped_in_a_thread(ctx: Context, shop: Shop) -> None:
    assert_type(ctx.step_sync("count", count, b"a"), int)
    assert_type(ctx.step_sync("price", shop.price, 1, 0.5, timeout=5), float)
    assert_type(ctx.step_sync("fetch", fetch, "a", retry=Retry()), bytes)
    ctx.sleep_sync("1h")


def as_function(ctx: Context, function: Callable[[str], Awaitable[bytes]]) -> Awaitable[bytes]:
    return ctx.step("given", function, "a")


# --- hooks and middleware -----------------------------------------------------------------------


@payload_only.on_success
async def succeeded(ctx: Context, report: Report) -> None: ...


@payload_only.on_failure
async def failed(ctx: Context, error: BaseException) -> None: ...


@app.middleware
async def timed(ctx: Context, call_next: CallNext) -> object:
    return await call_next(ctx)


def as_parameter(task: Task[Document, Report]) -> Awaitable[Run[Report]]:
    return task.trigger(Document(path="a"))


as_parameter(payload_only)
as_parameter(plain_payload)


# --- waits ----------------------------------------------------------------------------------------


@app.task
async def waiting(document: Document, ctx: Context) -> None:
    call, run = payload_only.call(document), await payload_only.trigger(document)
    assert_type(await ctx.wait_for(call), Report)
    assert_type(await ctx.wait_for(run), Report)
    assert_type(await ctx.wait_for(nothing.call()), int)
    assert_type(await ctx.wait_for(call, timeout="1h"), Report | TimedOut)
    assert_type(await ctx.wait_for(payload_only.map([document])), list[Report | Failure])
    assert_type(await ctx.wait_for(call, call), list[Report])
    assert_type(await ctx.wait_for(call, call, timeout=1), list[Report | TimedOut])
    assert_type(await ctx.wait_for(call, call, first=True), First[Report])
    decision = await ctx.wait_for(ctx.token("approval", Document, timeout="7d"))
    assert_type(decision, Document | TimedOut | Rejected)
    if decision:
        assert_type(decision, Document)
    paid = await ctx.wait_for(ctx.event("paid", where={"number": 7}))
    if paid:
        assert_type(paid["amount"], Any)


# --- keys and schedules ---------------------------------------------------------------------------


@app.task(schedule=Schedule(cron="0 3 * * *", tz="Europe/Berlin", catch_up="last"))
async def nightly(tick: Tick) -> None: ...


@app.task(schedule=Schedule(every="15m", overlap="skip", jitter=30))
async def often() -> int:
    return 1


async def with_keys(document: Document) -> None:
    assert_type(await payload_only.trigger(document, idempotency_key="a"), Run[Report])
    assert_type(await nothing.trigger(idempotency_key="a", idempotency_ttl="1h"), Run[int])
    await payload_only.trigger(document, debounce=Debounce("a", "10s", mode="leading"))
    await app.client.trigger("other", 1, singleton=Singleton("a"))
    app.client.trigger_sync("other", 1, idempotency_key="a")
