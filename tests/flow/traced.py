"""The app of test_trace.py, run by a real worker."""

from __future__ import annotations

from brokertask import App, Context, Retry

app = App("traced")
RETRY = Retry(max_attempts=3, min_delay=1.2, max_delay=1.2, jitter=False)


@app.task(retry=RETRY)
async def flaky(succeed_at: int, ctx: Context) -> int:
    if ctx.attempt < succeed_at:
        raise ConnectionError("upstream 503")
    return ctx.attempt


@app.task
async def fans_out(count: int) -> None:
    await leaf.trigger_many(range(count))


@app.task
async def leaf(number: int) -> int:
    return number
