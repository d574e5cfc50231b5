"""What mypy and pyright must refuse: each line that is marked, and no other. Never run.

`test_checkers` takes the marks away and compares the lines; mypy's own run compares the codes.
"""

from __future__ import annotations

from pydantic import BaseModel

from brokertask import App, Context, Debounce, Retry, Run, Schedule, Settings, Task

app = App("typing", settings=Settings(amqp_url="memory:"))


class Document(BaseModel):
    path: str


@app.task
async def process(document: Document) -> int:
    return len(document.path)


@app.task
def plain(document: Document, ctx: Context) -> int:
    return len(document.path)


@app.task
async def nothing() -> str:
    return ""


async def wrong_payloads() -> None:
    await process.trigger("a.txt")  # type: ignore[arg-type]
    await process.trigger({"path": "a.txt"})  # type: ignore[arg-type]
    await process.trigger()  # type: ignore[call-arg]
    await plain.trigger(5)  # type: ignore[arg-type]
    await nothing.trigger(5)  # type: ignore[call-overload]
    await process.trigger_many([Document(path="a"), "b"])  # type: ignore[list-item]
    await process.trigger_many(Document(path="a"))  # type: ignore[arg-type]
    await process("a.txt")  # type: ignore[arg-type]


def wrong_payloads_without_a_loop() -> None:
    process.trigger_sync("a.txt")  # type: ignore[arg-type]
    process.trigger_sync()  # type: ignore[call-arg]


async def wrong_options() -> None:
    await process.trigger(Document(path="a"), dealy=5)  # type: ignore[call-arg]
    await process.trigger(Document(path="a"), delay=[])  # type: ignore[arg-type]
    await process.trigger(Document(path="a"), tags=5)  # type: ignore[arg-type]
    await process.trigger_many([], run_ids=["a"])  # type: ignore[call-arg]
    await app.client.trigger("a", 1, dealy=5)  # type: ignore[call-arg]
    await process.trigger(Document(path="a"), idempotency_key=7)  # type: ignore[arg-type]
    await process.trigger(Document(path="a"), singleton=True)  # type: ignore[arg-type]
    await process.trigger_many([], idempotency_key="a")  # type: ignore[call-arg]
    Debounce("a", "10s", mode="middle")  # type: ignore[arg-type]
    Schedule(cron="0 3 * * *", catch_up="none")  # type: ignore[arg-type]
    app.task(schedule="0 3 * * *")  # type: ignore[call-overload]


async def wrong_results() -> None:
    text: str = await (await process.trigger(Document(path="a"))).result()  # type: ignore[assignment]
    runs: list[Run[str]] = await process.trigger_many([])  # type: ignore[assignment]
    print(text, runs)


def wrong_declarations() -> None:
    app.task(retires=3)  # type: ignore[call-overload]
    app.task(retry=3)  # type: ignore[call-overload]
    app.task(concurrency="5")  # type: ignore[call-overload]
    app.task(timeout=[])  # type: ignore[call-overload]
    app.task("name")  # type: ignore[call-overload]
    Retry(5)  # type: ignore[call-arg]
    Retry(max_attempt=5)  # type: ignore[call-arg]
    Retry(on=ValueError())  # type: ignore[arg-type]
    Settings(namespace=5)  # type: ignore[arg-type]


async def fetch(path: str, tries: int = 3) -> bytes:
    return path.encode()


def count(data: bytes) -> int:
    return len(data)


async def wrong_steps(ctx: Context) -> None:
    await ctx.step("fetch", fetch)  # type: ignore[arg-type, call-arg]
    await ctx.step("fetch", fetch, 5)  # type: ignore[arg-type]
    await ctx.step("fetch", fetch, path="a")  # type: ignore[call-overload]
    await ctx.step("fetch", fetch("a"))  # type: ignore[call-overload]
    await ctx.step(fetch, "a")  # type: ignore[call-overload]
    await ctx.step("count", count, "a")  # type: ignore[arg-type]
    await ctx.step("count", count, b"a", retry=3)  # type: ignore[call-overload]
    await ctx.step("count", count, b"a", retires=3)  # type: ignore[call-overload]
    text: str = await ctx.step("fetch", fetch, "a")  # type: ignore[arg-type]
    print(text)


def wrong_steps_in_a_thread(ctx: Context) -> None:
    ctx.step_sync("count", count, "a")  # type: ignore[arg-type]
    text: str = ctx.step_sync("count", count, b"a")  # type: ignore[assignment]
    print(text)


async def wrong_sleeps(ctx: Context) -> None:
    await ctx.sleep([])  # type: ignore[arg-type]
    await ctx.sleep_until(5)  # type: ignore[arg-type]
    await ctx.sleep(5, "cooling")  # type: ignore[call-arg]
    ctx.progress("half")  # type: ignore[arg-type]
    app.task(checkpoint="never")  # type: ignore[call-overload]


async def wrong_hook(ctx: Context, result: bytes) -> None: ...


process.on_success(wrong_hook)  # type: ignore[arg-type]
other: Task[str, int] = process  # type: ignore[assignment]
