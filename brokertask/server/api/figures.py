"""How it is going: now, of late, and among the dead."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from brokertask.server import dead, figures, workers
from brokertask.server.api.operations import Call, Routes, Strict, TaskId
from brokertask.values import LAST_INSTANT_MS

routes: Final = Routes("figures")
DAY: Final = 86_400.0


class CountView(BaseModel):
    """How many."""

    model_config = ConfigDict(from_attributes=True)

    count: int
    capped: bool
    """There are more: counting stops at 10,000."""


class MinuteView(BaseModel):
    """The runs that ended within one minute."""

    model_config = ConfigDict(from_attributes=True)

    at_ms: int
    by_status: dict[str, int]


class Overview(BaseModel):
    """How it is going now."""

    by_status: dict[str, CountView]
    """Of runs that have not ended."""
    dead: CountView
    """Runs that failed, and were neither redriven nor, by a server, discarded."""
    oldest_queued_ms: int | None
    """When the run was triggered that waits for a worker the longest."""
    minutes: list[MinuteView]
    """The last hour, the first minute first."""
    since_ms: int
    """From when on the minutes are complete: where very many runs end, it is less than an hour."""
    workers: int
    """Those that work; how many slots they have, and how many of these are busy."""
    slots: int
    busy: int


class DoneView(BaseModel):
    """How a task did of late."""

    model_config = ConfigDict(from_attributes=True)

    task: str
    ended: int
    by_status: dict[str, int]
    retried: int
    """Those that took more than one attempt."""
    p50_ms: int | None
    """From trigger to end, waits and delays included, of completed runs; null: there are none."""
    p95_ms: int | None
    since_ms: int
    """From when on its ends are counted: later than asked where there are more than 20,000."""


class GroupView(BaseModel):
    """Dead runs of one task and one kind of error."""

    model_config = ConfigDict(from_attributes=True)

    task: str
    fingerprint: str | None
    """Numbers, ids and quoted parts of the message do not count; as `dead list --group` has it."""
    count: int
    first_ms: int
    last_ms: int
    again: int
    """Those that had been redriven, and died again."""
    buckets: list[int]
    """How many died in each 24th of the time from `since_ms` to `until_ms`."""
    sample: str
    """The id of one of them; the error and the reason are its."""
    error_type: str | None
    error_message: str | None
    reason: str | None


class Dead(BaseModel):
    """The dead runs, by groups, the largest first."""

    model_config = ConfigDict(from_attributes=True)

    groups: list[GroupView]
    since_ms: int
    until_ms: int
    capped: bool
    """There are more: the latest 50,000 are counted, and 200 groups shown."""


class WindowQuery(Strict):
    """How far back."""

    window: Annotated[float, Field(gt=0, le=365 * DAY)] = DAY
    """Seconds."""


class DeadQuery(Strict):
    """Which dead runs."""

    task: TaskId | None = None
    since_ms: Annotated[int, Field(ge=0, le=LAST_INSTANT_MS)] = 0
    """Died then or later."""


@routes.get("/overview")
async def show_overview(call: Call) -> Overview:
    """Show how it is going: what waits, runs, retries and is dead, and what ended by minute."""
    now_ms = call.now_ms
    async with call.resources.store.read() as connection:
        found = await figures.going(connection, now_ms=now_ms)
        there = await workers.listed(connection, now_ms=now_ms)
    working = [one for one in there if one["state"] == "working"]
    tasks = [told for one in working for told in one["tasks"].values()]
    return Overview(
        by_status={
            status: CountView.model_validate(count) for status, count in found.by_status.items()
        },
        dead=CountView.model_validate(found.dead),
        oldest_queued_ms=found.oldest_queued_ms,
        minutes=[MinuteView.model_validate(minute) for minute in found.minutes],
        since_ms=found.since_ms,
        workers=len(working),
        slots=sum(int(told.get("slots", 0)) for told in tasks),
        busy=sum(int(told.get("busy", 0)) for told in tasks),
    )


@routes.get("/figures")
async def list_figures(call: Call, query: WindowQuery) -> list[DoneView]:
    """List how each task did of late, those without an end left out."""
    since_ms = call.now_ms - round(query.window * 1000)
    async with call.resources.store.read() as connection:
        found = await figures.done(connection, since_ms=since_ms)
    return [DoneView.model_validate(one) for one in found]


@routes.get("/tasks/{task}/figures")
async def show_figures(call: Call, task: TaskId, query: WindowQuery) -> DoneView:
    """Show how a task did of late."""
    since_ms = call.now_ms - round(query.window * 1000)
    async with call.resources.store.read() as connection:
        found = await figures.done(connection, since_ms=since_ms, task=task)
    if found:
        return DoneView.model_validate(found[0])
    return DoneView(
        task=task,
        ended=0,
        by_status={},
        retried=0,
        p50_ms=None,
        p95_ms=None,
        since_ms=since_ms,
    )


@routes.get("/dead")
async def list_dead(call: Call, query: DeadQuery) -> Dead:
    """List dead runs by task and kind of error, the largest group first.

    As history knows them: one that was discarded without a server is still in it.
    """
    async with call.resources.store.read() as connection:
        found = await dead.grouped(
            connection, now_ms=call.now_ms, since_ms=query.since_ms, task=query.task
        )
    return Dead.model_validate(found)
