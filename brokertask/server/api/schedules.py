"""Schedules: those in the code of workers, and those that are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, JsonValue, StringConstraints

from brokertask.schedule import CatchUp, Overlap, Schedule
from brokertask.server.api.operations import PRINTABLE, Call, DurationText, Routes, Strict, TaskId
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of
from brokertask.server.api.problems import Problem
from brokertask.server.schedules import MAX_NAME, Answer, Schedules, Shown

routes: Final = Routes("schedules")
Name: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_NAME, pattern=PRINTABLE)
]


class ScheduleView(BaseModel):
    """A schedule."""

    name: str
    task: str
    spec: dict[str, JsonValue]
    """`cron` and `tz`, or `every`; `catch_up`, `overlap`, `jitter`."""
    declared: bool
    """It is in the code of a worker, and is changed there."""
    paused: bool
    due_ms: int | None
    run_id: str | None
    """Its latest run."""
    run_ms: int | None


class TickView(BaseModel):
    """What became of a tick."""

    tick_ms: int
    outcome: str
    """`triggered`, `overlapped` or `missed`."""
    run_id: str | None
    until_ms: int | None
    """Of missed ones: the last of them."""
    decided_ms: int


class ScheduleDetail(ScheduleView):
    """A schedule, what it has done and what it will."""

    next_ms: list[int]
    """When it is due next, as if it were not paused."""
    ticks: list[TickView]
    """The latest first."""


class NewSchedule(Strict):
    """A schedule to make, or to change."""

    name: Name
    """There is one of a name: the same again changes nothing."""
    task: TaskId
    cron: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Minute, hour, day of month, month, day of week; or `every`."""
    every: DurationText | None = None
    tz: Annotated[str, StringConstraints(max_length=80)] = "UTC"
    payload: JsonValue = None
    sends_tick: bool = False
    """Its runs get a `Tick` in place of the payload."""
    catch_up: CatchUp = "skip"
    catch_up_window: DurationText = "1d"
    overlap: Overlap = "allow"
    jitter: DurationText = 0.0


class Done(BaseModel):
    """What came of an action."""

    answer: Literal["done", "unchanged"]


class Began(BaseModel):
    """A run that begins."""

    run_id: str


@routes.get("/schedules")
async def list_schedules(call: Call, query: PageQuery) -> Page[ScheduleView]:
    """List schedules, by name."""
    after = keys_of(query.cursor, (str,))[0] if query.cursor else ""
    found = await Schedules(call.resources).listed(after=after, limit=query.limit + 1)
    page = found[: query.limit]
    return Page(
        items=[ScheduleView(**_fields(one)) for one in page],
        next=cursor_of(page[-1].name) if len(found) > query.limit else None,
    )


@routes.get("/schedules/{name}")
async def show_schedule(call: Call, name: Name) -> ScheduleDetail:
    """Show a schedule, the ticks it has had, and when it is due next."""
    schedules = Schedules(call.resources)
    found = await schedules.show(name)
    if found is None:
        raise _unknown()
    return ScheduleDetail(
        **_fields(found),
        next_ms=await schedules.next_fire_times(name) or [],
        ticks=[TickView.model_validate(tick) for tick in await schedules.history(name)],
    )


@routes.post("/schedules", problems=("conflict",))
async def put_schedule(call: Call, body: NewSchedule) -> Done:
    """Make a schedule, or change the one of that name."""
    given = body.model_dump(exclude={"name", "task", "sends_tick"})
    schedule = Schedule(**given)
    schedules = Schedules(call.resources)
    return _done(await schedules.put(body.name, body.task, schedule, sends_tick=body.sends_tick))


@routes.delete("/schedules/{name}", problems=("conflict",))
async def delete_schedule(call: Call, name: Name) -> None:
    """Delete a schedule that was made at run time; its runs go on."""
    _done(await Schedules(call.resources).delete(name))


@routes.post("/schedules/{name}/pause")
async def pause_schedule(call: Call, name: Name) -> Done:
    """Let no tick run from now on."""
    return _done(await Schedules(call.resources).pause(name))


@routes.post("/schedules/{name}/resume")
async def resume_schedule(call: Call, name: Name) -> Done:
    """Go on with the next tick; those of the pause are not run."""
    return _done(await Schedules(call.resources).resume(name))


@routes.post("/schedules/{name}/run", status=201)
async def run_schedule(call: Call, name: Name) -> Began:
    """Trigger a run beside the ticks."""
    run_id = await Schedules(call.resources).run_now(name)
    if run_id is None:
        raise _unknown()
    return Began(run_id=run_id)


def _fields(found: Shown) -> Mapping[str, Any]:
    return {name: getattr(found, name) for name in ScheduleView.model_fields}


def _done(answer: Answer) -> Done:
    match answer:
        case "done" | "unchanged":
            return Done(answer=answer)
        case "declared":
            raise Problem("conflict", "it is in the code of a worker: change it there")
        case "unknown":
            raise _unknown()


def _unknown() -> Problem:
    return Problem("not_found", "there is no such schedule")
