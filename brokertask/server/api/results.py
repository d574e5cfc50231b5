"""What became of a run: its result, its events as they come, and a new start for a dead one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Final

from pydantic import BaseModel, Field, JsonValue
from sqlalchemy import select

from brokertask.deadletter import Filter
from brokertask.deadletters import Result, Selection
from brokertask.envelope import Message
from brokertask.events import COMPLETED, ENDS, Event
from brokertask.server.api.hub import Heard, Hub
from brokertask.server.api.operations import Call, Routes, RunId, Strict, TaskId, Text
from brokertask.server.api.problems import Kind, Problem
from brokertask.server.api.shown import shown_body
from brokertask.server.api.stream import BEAT, BEATING, EVENT_STREAM, Stopping, Stream, sent
from brokertask.server.redactor import redact
from brokertask.server.resources import Resources
from brokertask.server.store.schema import endings, runs
from brokertask.values import MSGPACK, encode

routes: Final = Routes("runs")
_NIL: Final = b"\xc0"


class ErrorView(BaseModel):
    """What an attempt ended with."""

    type: str
    message: str


class Ending(BaseModel):
    """How a run ended."""

    run_id: str
    task: str
    status: str
    """`completed`, `failed`, `expired` or `cancelled`."""
    at_ms: int
    attempt: int
    result: JsonValue = None
    reason: str | None = None
    """Of one that failed: why it is in the dead-letter queue."""
    error: ErrorView | None = None


class EventView(BaseModel):
    """Something that happened to a run. Payloads and results are not in it."""

    event: str
    run_id: str
    task: str
    attempt: int
    at_ms: int
    worker: str
    delay_ms: int | None = None
    reason: str | None = None
    warning: str | None = None
    waits: list[str] | None = None
    done: float | None = None
    total: float | None = None
    metadata: dict[str, JsonValue] | None = None
    error: ErrorView | None = None


class ResultQuery(Strict):
    """How long to wait for it."""

    wait: Annotated[float, Field(ge=0, le=60)] = 0.0
    """Up to so many seconds, if the run goes on."""


class EventsQuery(Strict):
    """Which events."""

    task: TaskId | None = None
    event: Text | None = None


class Redrive(Strict):
    """How a dead run begins again."""

    payload: JsonValue = None
    """In place of its own, if `replace` is true; then it begins anew."""
    replace: bool = False
    forget: bool = False
    """Without the steps that it has finished."""
    reason: Text = ""
    """For the audit log."""


class Redriven(BaseModel):
    """A run that is at work again."""

    run_id: str
    task: str


@routes.get("/runs/{run_id}/result", reveals=True, problems=("conflict", "broker_unavailable"))
async def show_result(call: Call, run_id: RunId, query: ResultQuery) -> Ending:
    """Show how a run ended, with its result.

    With `wait` it answers as soon as the run has ended. One that goes on, or is not known, is
    `not_found`.
    """
    resources = call.resources
    found = await _ending(resources, run_id)
    if found is None and query.wait > 0:
        async with _hub(call).watch(lambda event: event.run_id == run_id) as heard:
            with suppress(TimeoutError):
                async with asyncio.timeout(query.wait):
                    while (found := await _ending(resources, run_id)) is None:
                        await _next(heard, 1.0)
    if found is None:
        raise Problem("not_found", "no end of such a run is known: it goes on, or there is none")
    return await _shown(resources, found)


@routes.get("/runs/{run_id}/events", media=EVENT_STREAM, problems=("broker_unavailable",))
async def follow_run(call: Call, run_id: RunId) -> Stream:
    """Follow a run: server-sent events, each named after what happened, until the run has ended.

    What happened before is not repeated, but for its end.
    """
    return Stream(_follow(call, run_id), call.state[Stopping])


@routes.get("/events", media=EVENT_STREAM, problems=("broker_unavailable",))
async def follow_runs(call: Call, query: EventsQuery) -> Stream:
    """Follow all runs, or those of a task: server-sent events as they happen.

    The event `lost` says that some were missed, and ends the stream: ask anew.
    """

    def wanted(event: Event) -> bool:
        return query.task in (None, event.task) and query.event in (None, event.event)

    async def parts() -> AsyncGenerator[bytes, None]:
        async with _hub(call).watch(wanted) as heard:
            yield BEATING
            async for part in _heard(heard):
                yield part

    return Stream(parts(), call.state[Stopping])


@routes.post("/runs/{run_id}/redrive", problems=("conflict", "broker_unavailable"))
async def redrive_run(call: Call, run_id: RunId, body: Redrive) -> Redriven:
    """Put a dead run back to work: first attempt, behind its finished steps."""
    resources = call.resources
    event = await _ending(resources, run_id)
    if event is None:
        raise Problem("not_found", "no end of such a run is known")
    payload = encode(body.payload) if body.replace else None
    result = await redrive(resources, event.task, run_id, payload=payload, forget=body.forget)
    if result is None:
        raise Problem("conflict", "the run is not in the dead-letter queue of its task")
    if result.status != "redriven":
        kind: Kind = "unknown_outcome" if result.status == "unknown" else "conflict"
        raise Problem(kind, result.detail, run_id=run_id)
    return Redriven(run_id=run_id, task=event.task)


async def redrive(
    resources: Resources, task: str, run_id: str, *, payload: bytes | None, forget: bool
) -> Result | None:
    """Redrive one run out of the dead-letter queue of its task; None: it is not there."""
    selection = Selection.open(
        resources.transport,
        resources.broker_settings,
        [task],
        Filter(run_ids=(run_id,)),
        clock=resources.clock,
        claims=resources.claims,
    )
    async with selection as found:
        # Of several dead letters of one run, the furthest is redriven.
        results = [each async for each in found.redrive(payload=payload, forget=forget)]
    done = [each for each in results if each.status == "redriven"]
    return next(iter([*done, *results]), None)


async def _follow(call: Call, run_id: str) -> AsyncGenerator[bytes, None]:
    resources = call.resources
    async with _hub(call).watch(lambda event: event.run_id == run_id) as heard:
        yield BEATING
        while (ending := await _ending(resources, run_id)) is None:
            event = await _next(heard, BEAT)
            while event is not None:
                yield sent(event.event, _view(event))
                if event.event in ENDS:
                    return
                event = await _next(heard, BEAT)
            yield BEATING
        yield sent(ending.event, _view(ending))


async def _heard(heard: Heard) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            async with asyncio.timeout(BEAT):
                event = await heard.get()
        except TimeoutError:
            yield BEATING
            continue
        if event is None:
            yield b"event: lost\ndata: {}\n\n"
            return
        yield sent(event.event, _view(event))


async def _next(heard: Heard, limit: float) -> Event | None:
    """Return the next event, or None after `limit` seconds without one."""
    try:
        async with asyncio.timeout(limit):
            return await heard.get()
    except TimeoutError:
        return None


async def _ending(resources: Resources, run_id: str) -> Event | None:
    """Return the end of a run; None if there is none yet, or it was redriven since."""
    query = select(endings.c.body, runs.c.status).where(endings.c.run_id == run_id)
    async with resources.store.read() as connection:
        row = (
            await connection.execute(query.outerjoin(runs, runs.c.run_id == endings.c.run_id))
        ).one_or_none()
    if row is None or row.status not in (None, *ENDS):
        return None
    return Event.read(Message(body=row.body))


async def _shown(resources: Resources, event: Event) -> Ending:
    result = None
    if event.event == COMPLETED:
        body = event.result or _NIL
        if event.claim is not None:
            body = await resources.claims.get(event.claim)
        result = redact(shown_body(body, MSGPACK))
    return Ending(
        run_id=event.run_id,
        task=event.task,
        status=event.event,
        at_ms=event.at_ms,
        attempt=event.attempt,
        result=result,
        reason=event.reason,
        error=_error(event),
    )


def _view(event: Event) -> EventView:
    fields = {name: getattr(event, name) for name in EventView.model_fields if name != "error"}
    return EventView(**fields, error=_error(event))


def _error(event: Event) -> ErrorView | None:
    error = event.error
    return None if error is None else ErrorView(type=error.type, message=error.message)


def _hub(call: Call) -> Hub:
    hub: Hub = call.state[Hub]
    return hub
