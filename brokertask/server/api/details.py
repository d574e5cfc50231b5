"""The inside of a run: its steps, its log, and the runs that it is related to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, JsonValue

from brokertask.server import details, related
from brokertask.server.api.operations import Call, Routes, RunId
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of
from brokertask.server.api.problems import Problem
from brokertask.server.api.shown import shown_body
from brokertask.values import MSGPACK

routes: Final = Routes("runs")


class StepView(BaseModel):
    """A step that has finished."""

    redrives: int
    number: int
    """Its place among the run's steps, from 1 on."""
    name: str
    attempt: int
    worker: str
    ended_ms: int


class StepResult(StepView):
    """A step with what it has returned."""

    result: JsonValue
    """Without secrets; null as well if it was too large to be told."""


class LineView(BaseModel):
    """A line of a run's log."""

    at_ms: int
    level: str
    text: str
    attempt: int
    worker: str


class RelatedRun(BaseModel):
    """A run in the tree of another one."""

    run_id: str
    parent: str | None
    task: str
    status: str
    triggered_ms: int
    ended_ms: int | None


class Tree(BaseModel):
    """The runs that were triggered by one another."""

    runs: list[RelatedRun]
    """The one at the top first, then as they were triggered; `parent` says which is below which."""
    capped: bool
    """There are more: only the first 1,000 are here."""


@routes.get("/runs/{run_id}/steps")
async def list_steps(call: Call, run_id: RunId, query: PageQuery) -> Page[StepView]:
    """List the finished steps of a run, in the order in which they have finished.

    Workers tell of them without waiting for an answer, so some may be missing.
    """
    rows, following = await _steps(call, run_id, query)
    return Page(items=[StepView.model_validate(row) for row in rows], next=following)


@routes.get("/runs/{run_id}/steps/results", reveals=True)
async def list_step_results(call: Call, run_id: RunId, query: PageQuery) -> Page[StepResult]:
    """List the finished steps of a run with what they have returned."""
    rows, following = await _steps(call, run_id, query)
    items = [
        StepResult(
            **{name: row[name] for name in StepView.model_fields},
            result=None if row["result"] is None else shown_body(row["result"], MSGPACK),
        )
        for row in rows
    ]
    return Page(items=items, next=following)


@routes.get("/runs/{run_id}/logs")
async def list_lines(call: Call, run_id: RunId, query: PageQuery) -> Page[LineView]:
    """List the lines of a run's log, the first first.

    Workers tell of them without waiting for an answer, so some may be missing.
    """
    after = keys_of(query.cursor, (int, int, int, int, str)) if query.cursor else None
    async with call.resources.store.read() as connection:
        rows = await details.log_of(
            connection,
            run_id,
            after=None if after is None else (after[0], after[1], after[2], after[3], after[4]),
            limit=query.limit + 1,
        )
    page = rows[: query.limit]
    more = len(rows) > query.limit
    return Page(
        items=[LineView.model_validate(row) for row in page],
        next=cursor_of(*(page[-1][name] for name in details.LINE)) if more else None,
    )


@routes.get("/runs/{run_id}/tree")
async def show_tree(call: Call, run_id: RunId) -> Tree:
    """Show the runs that a run is related to: all below the one that it descends from."""
    async with call.resources.store.read() as connection:
        found = await related.tree_of(connection, run_id)
    if found is None:
        raise Problem("not_found", "there is no such run, or nothing was heard of it yet")
    runs = [RelatedRun.model_validate(row) for row in found.rows]
    return Tree(runs=runs, capped=found.capped)


async def _steps(
    call: Call, run_id: str, query: PageQuery
) -> tuple[list[Mapping[str, Any]], str | None]:
    after = keys_of(query.cursor, (int, int)) if query.cursor else None
    async with call.resources.store.read() as connection:
        rows = await details.steps_of(
            connection,
            run_id,
            after=None if after is None else (after[0], after[1]),
            limit=query.limit + 1,
        )
    page = rows[: query.limit]
    if len(rows) <= query.limit:
        return page, None
    return page, cursor_of(page[-1]["redrives"], page[-1]["number"])
