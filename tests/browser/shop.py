"""A shop whose tasks succeed, fail, wait and take their time, with a server and a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from brokertask import App, Context, Retry, Settings, Task
from tests.api.stage import Stage, stage
from tests.flow.deciding import until


class Order(BaseModel):
    """What the form of a task is made from."""

    customer: str
    number: int
    express: bool = False
    notes: list[str] = []


@dataclass(slots=True)
class Shop:
    """What tests of the console stand on.

    Attributes:
        api: The server, with its API.
        url: Where the console is.
        tasks: The tasks by name.
        open: Set: `hold` ends.
        broken: Whether `flaky` fails.
    """

    api: Stage
    url: str
    tasks: dict[str, Task[Any, Any]] = field(default_factory=dict)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = True


async def look(order: str) -> str:
    return order


@asynccontextmanager
async def shop(app: App | None = None) -> AsyncIterator[Shop]:
    owner = app or App("shop", settings=Settings(amqp_url="memory:"))
    made = Shop.__new__(Shop)

    @owner.task(retry=Retry(max_attempts=1))
    async def flaky(order: str) -> str:
        if made.broken:
            raise ConnectionError(f"no way to the bank for {order}")
        return f"paid {order}"

    @owner.task
    async def hold(order: str, ctx: Context) -> str:
        await ctx.step("look", look, order)
        await made.open.wait()
        return order

    @owner.task
    async def echo(value: Any) -> Any:
        return value

    @owner.task
    async def order(wanted: Order) -> Order:
        return wanted

    async with stage(owner) as api:
        assert api.server.site is not None
        made.api, made.url = api, f"http://127.0.0.1:{api.server.site.port}/"
        made.tasks = {"flaky": flaky, "hold": hold, "echo": echo, "order": order}
        made.open, made.broken = asyncio.Event(), True
        async with owner.worker(), api.client() as client:

            async def heard() -> bool:
                return bool((await client.get("/workers")).json())

            # Before, it does not tell when runs begin: it knows of no server that records.
            await until(heard)
            yield made
            made.open.set()
