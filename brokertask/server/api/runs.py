"""Runs as the history has them: some by filters, one, and the same again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel, Field, JsonValue

from brokertask.claim import Claim
from brokertask.envelope import MAX_TAGS
from brokertask.server import history
from brokertask.server.api.operations import Call, Routes, RunId, Strict, TaskId, Text
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of
from brokertask.server.api.problems import Problem
from brokertask.server.api.shown import shown_body
from brokertask.server.api.triggers import TriggeredRun, check_payload
from brokertask.server.history import RunFilter
from brokertask.server.replays import NOT_KEPT, Given, replay
from brokertask.server.triggers import trigger
from brokertask.values import LAST_INSTANT_MS, MSGPACK, decode

routes: Final = Routes("runs")
Status: TypeAlias = Literal[
    "queued",
    "delayed",
    "running",
    "retrying",
    "sleeping",
    "waiting",
    "completed",
    "failed",
    "expired",
    "cancelled",
]


class Selected(Strict):
    """Which runs: those that meet everything that is given."""

    status: list[Status] = Field(default=[], max_length=20)
    """One of these."""
    task: TaskId | None = None
    tag: list[RunId] = Field(default=[], max_length=MAX_TAGS)
    """All of these."""
    since_ms: int | None = Field(default=None, ge=0, le=LAST_INSTANT_MS)
    """Triggered then or later."""
    until_ms: int | None = Field(default=None, ge=0, le=LAST_INSTANT_MS)
    """Triggered before."""
    error: Text | None = None
    """Part of the latest error's `type: message`."""
    parent: RunId | None = None
    root: RunId | None = None
    trace_id: Text | None = None
    worker: Text | None = None
    fingerprint: Text | None = None
    """Of the latest error, as `/dead` has it; empty: without one."""
    discarded: bool | None = None
    """Whether a dead run was discarded by a server."""

    def filter(self) -> RunFilter:
        """Return it for the history."""
        return RunFilter(
            statuses=tuple(self.status),
            task=self.task,
            tags=tuple(self.tag),
            since_ms=self.since_ms,
            until_ms=self.until_ms,
            error=self.error,
            parent=self.parent,
            root=self.root,
            trace_id=self.trace_id,
            worker=self.worker,
            fingerprint=self.fingerprint,
            discarded=self.discarded,
        )


class RunsQuery(Selected, PageQuery):
    """Which runs, and which page of them."""


class RunView(BaseModel):
    """A run."""

    run_id: str
    task: str
    status: str
    attempt: int
    """The latest that something was heard of."""
    redrives: int
    triggered_ms: int
    at_ms: int
    """When what was heard last has happened."""
    due_ms: int | None
    """Of a delayed, retrying or sleeping run: when it goes on."""
    ended_ms: int | None
    worker: str | None
    reason: str | None
    error_type: str | None
    error_message: str | None
    fingerprint: str | None
    discarded_ms: int | None
    """When a server has discarded it from the dead letters."""
    waits: list[str]
    done: float | None
    total: float | None
    tags: list[str]
    parent: str | None
    root: str | None
    trace_id: str | None
    app_id: str | None
    payload_state: str | None
    """`kept`; `redacted`: without secrets; `left_out`: it is too large; `claim`: it is in the
    payload store; null: its trigger was not seen."""


class RunDetail(RunView):
    """A run with its notes about itself."""

    metadata: dict[str, JsonValue]


class AttemptView(BaseModel):
    """An attempt that has ended."""

    redrives: int
    attempt: int
    outcome: str
    worker: str
    ended_ms: int
    delay_ms: int | None
    error_type: str | None
    error_message: str | None
    traceback: str | None


class CountsView(BaseModel):
    """How many runs there are."""

    total: int
    by_status: dict[str, int]
    capped: bool
    """Only the newest 10,000 are counted."""


class PayloadView(BaseModel):
    """What a run was triggered with."""

    state: str
    payload: JsonValue = None


class Replay(Strict):
    """The same run once more, as a new one."""

    payload: JsonValue = None
    """In place of its own, if `replace` is true."""
    replace: bool = False
    tags: list[RunId] = Field(default=[], max_length=MAX_TAGS)
    """Beside its own."""
    reason: Text = ""
    """For the audit log."""


@routes.get("/runs")
async def list_runs(call: Call, query: RunsQuery) -> Page[RunView]:
    """List runs, the latest triggered first."""
    before = keys_of(query.cursor, (int, str)) if query.cursor else None
    async with call.resources.store.read() as connection:
        rows = await history.listed(
            connection,
            query.filter(),
            before=None if before is None else (before[0], before[1]),
            limit=query.limit + 1,
        )
    page = rows[: query.limit]
    last = page[-1] if len(rows) > query.limit else None
    return Page(
        items=[RunView(**_fields(row)) for row in page],
        next=None if last is None else cursor_of(last["triggered_ms"], last["run_id"]),
    )


@routes.get("/counts")
async def count_runs(call: Call, query: Selected) -> CountsView:
    """Count the runs that the same filters of `/runs` take, by status."""
    async with call.resources.store.read() as connection:
        counts = await history.counted(connection, query.filter())
    return CountsView(
        total=sum(counts.by_status.values()),
        by_status=dict(counts.by_status),
        capped=counts.capped,
    )


@routes.get("/runs/{run_id}")
async def show_run(call: Call, run_id: RunId) -> RunDetail:
    """Show a run."""
    row = await _row(call, run_id)
    notes = {} if row["notes"] is None else shown_body(row["notes"], MSGPACK)
    return RunDetail(**_fields(row), metadata=notes)


@routes.get("/runs/{run_id}/attempts")
async def list_attempts(call: Call, run_id: RunId) -> list[AttemptView]:
    """List the attempts of a run that have ended, with their errors."""
    await _row(call, run_id)
    async with call.resources.store.read() as connection:
        rows = await history.attempts_of(connection, run_id)
    return [AttemptView.model_validate(row) for row in rows]


@routes.get("/runs/{run_id}/payload", reveals=True)
async def show_payload(call: Call, run_id: RunId) -> PayloadView:
    """Show what a run was triggered with."""
    row = await _row(call, run_id)
    state = row["payload_state"] or "unseen"
    body, content_type = row["payload"], row["content_type"]
    if body is not None and state == "claim":
        body, content_type = await call.resources.claims.get(Claim.unpack(body)), MSGPACK
    payload = None if body is None else shown_body(body, content_type)
    return PayloadView(state=state, payload=payload)


@routes.post(
    "/runs/{run_id}/replay",
    status=201,
    problems=("conflict", "broker_unavailable", "unknown_outcome"),
)
async def replay_run(call: Call, run_id: RunId, body: Replay) -> TriggeredRun:
    """Trigger a new run of the same task with the same payload, or another one.

    It has the old one's tags, and `replay:<run id>`.
    """
    row = await _row(call, run_id)
    if body.replace:
        await check_payload(call, row["task"], body.payload)
    given = Given(body.payload) if body.replace else None
    wish = await replay(call.resources, row, given=given, tags=body.tags)
    if wish is None:
        raise Problem("conflict", NOT_KEPT)
    done = await trigger(call.resources, wish)
    return TriggeredRun(run_id=done.run_id, task=row["task"], own=True)


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: row.get(name) for name in RunView.model_fields}
    waits = [] if row["waits"] is None else decode(row["waits"], MSGPACK)
    return {**plain, "waits": waits, "tags": history.tags_of(row)}


async def _row(call: Call, run_id: str) -> Mapping[str, Any]:
    async with call.resources.store.read() as connection:
        row = await history.shown(connection, run_id)
    if row is None:
        raise Problem("not_found", "there is no such run, or nothing was heard of it yet")
    return row
