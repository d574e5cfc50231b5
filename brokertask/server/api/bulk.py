"""Jobs over many runs: what one would act on, begin it, how far it is, stop it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, JsonValue

from brokertask.identity import uuid7
from brokertask.server import bulk
from brokertask.server.api.operations import Call, Routes, RunId, Strict, Text
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of
from brokertask.server.api.problems import Problem
from brokertask.server.api.runs import Selected
from brokertask.server.api.triggers import check_payload
from brokertask.server.bulk import Action, Job, State
from brokertask.server.history import RunFilter

routes: Final = Routes("bulk")
MAX_IDS: Final = 200


class Selection(Selected):
    """Which runs: those that meet everything that is given, and to which it can be done."""

    run_id: list[RunId] = Field(default=[], max_length=MAX_IDS)
    """One of these."""

    def filter(self) -> RunFilter:
        """Return it for the history."""
        return replace(super().filter(), run_ids=tuple(self.run_id))


class PreviewView(BaseModel):
    """What a job would act on."""

    action: Action
    count: int
    capped: bool
    """There may be more: of 50,000 or more, the newest are taken."""
    by_task: dict[str, int]
    first: list[str]
    """The ids of the ten that would be first."""


class NewJob(Strict):
    """What is to be done to the runs, and to how many."""

    select: Selection
    expected: Annotated[int, Field(ge=1, le=bulk.MAX_SELECTED)]
    """How many they are at most, as the preview said. More are a conflict, and nothing is done;
    fewer have gone on by themselves meanwhile."""
    rate: Annotated[float, Field(ge=0.1, le=10_000)] | None = None
    """Runs a second at most."""
    reason: Text = ""
    """For the audit log; of a cancel and a discard it is told as well."""
    children: bool = False
    """Of a cancel: the runs that they have triggered, too."""
    forget: bool = False
    """Of a redrive: without the steps that they have finished."""
    replace: bool = False
    """Of a replay: `payload` in place of their own; it takes a selection of one `task`."""
    payload: JsonValue = None


class JobView(BaseModel):
    """A job over many runs."""

    id: str
    action: Action
    state: str
    """`running`; `aborting`: it ends with what has begun; `aborted` or `done`."""
    total: int
    counts: dict[str, int]
    """How many runs are `waiting`, `sent`, `done`, `skipped` and `failed`."""
    rate: float | None
    reason: str
    created_ms: int
    created_by: str
    ended_ms: int | None


class ItemView(BaseModel):
    """One run of a job."""

    number: int
    run_id: str
    task: str
    state: str
    """`waiting`; `sent`: it has begun; `done`; `skipped`: it could not be done to it any more;
    `failed`."""
    detail: str | None
    """Why it was skipped or has failed; of a replay that is done: the id of the new run."""
    at_ms: int | None


class ItemsQuery(PageQuery):
    """Which runs of a job."""

    state: State | None = None


class Why(Strict):
    """Why it is done."""

    reason: Text = ""
    """For the audit log."""


@routes.get("/bulk/preview/{action}")
async def preview_bulk(call: Call, action: Action, query: Selection) -> PreviewView:
    """Show what a job would act on: how many runs, and the first of them."""
    async with call.resources.store.read() as connection:
        found = await bulk.previewed(connection, action, query.filter())
    return PreviewView(
        action=action,
        count=found.count,
        capped=found.capped,
        by_task=dict(found.by_task),
        first=list(found.first),
    )


@routes.post("/bulk/start/{action}", status=201, problems=("conflict",))
async def start_bulk(call: Call, action: Action, body: NewJob) -> JobView:
    """Redrive, discard, cancel or replay many runs: those that the selection takes now.

    They are worked off by the servers; what becomes of each is told by the job.
    """
    options = await _options(call, action, body)
    identity = uuid7(call.now_ms)
    job = Job(id=identity, action=action, reason=body.reason, rate=body.rate, options=options)
    async with call.resources.store.begin() as connection:
        total = await bulk.create(
            connection, job, body.select.filter(), now_ms=call.now_ms, by=call.principal.name
        )
        if not 0 < total <= body.expected:
            # Raised within the transaction: nothing of it stays.
            raise Problem("conflict", f"the selection has {total} runs, not {body.expected}")
        made = await bulk.shown(connection, identity)
    return JobView.model_validate(made)


@routes.get("/bulk/jobs")
async def list_bulk(call: Call, query: PageQuery) -> Page[JobView]:
    """List jobs, the latest first."""
    before = keys_of(query.cursor, (int, str)) if query.cursor else None
    async with call.resources.store.read() as connection:
        rows = await bulk.listed(
            connection,
            before=None if before is None else (before[0], before[1]),
            limit=query.limit + 1,
        )
    page = rows[: query.limit]
    last = page[-1] if len(rows) > query.limit else None
    return Page(
        items=[JobView.model_validate(row) for row in page],
        next=None if last is None else cursor_of(last["created_ms"], last["id"]),
    )


@routes.get("/bulk/jobs/{job}")
async def show_bulk(call: Call, job: RunId) -> JobView:
    """Show a job, and how far it is."""
    async with call.resources.store.read() as connection:
        found = await bulk.shown(connection, job)
    if found is None:
        raise Problem("not_found", "there is no such job")
    return JobView.model_validate(found)


@routes.get("/bulk/jobs/{job}/items")
async def list_bulk_items(call: Call, job: RunId, query: ItemsQuery) -> Page[ItemView]:
    """List the runs of a job, and what became of each."""
    (after,) = keys_of(query.cursor, (int,)) if query.cursor else (0,)
    async with call.resources.store.read() as connection:
        rows = await bulk.items_of(
            connection, job, state=query.state, after=after, limit=query.limit + 1
        )
    page = rows[: query.limit]
    return Page(
        items=[ItemView.model_validate(row) for row in page],
        next=cursor_of(page[-1]["number"]) if len(rows) > query.limit else None,
    )


@routes.post("/bulk/jobs/{job}/abort", status=202, problems=("conflict",))
async def abort_bulk(call: Call, job: RunId, body: Why) -> JobView:
    """Stop a job: what has begun is brought to its end, what waits is left as it is."""
    async with call.resources.store.begin() as connection:
        going = await bulk.abort(connection, job)
        found = await bulk.shown(connection, job)
    if found is None:
        raise Problem("not_found", "there is no such job")
    if not going:
        raise Problem("conflict", f"the job has ended: it is {found['state']}")
    return JobView.model_validate(found)


async def _options(call: Call, action: Action, body: NewJob) -> dict[str, Any]:
    """Return what of it concerns the action; refuse what would be passed over."""
    own = {"children": "cancel", "forget": "redrive", "replace": "replay"}
    for name, of in own.items():
        if getattr(body, name) and action != of:
            raise Problem("invalid", f"body.{name}: it is for a {of}, not for a {action}")
    if body.payload is not None and not body.replace:
        raise Problem("invalid", "body.payload: it takes `replace`")
    if not body.replace:
        return {"children": body.children, "forget": body.forget}
    if body.select.task is None:
        raise Problem("invalid", "body.select.task: another payload is for runs of one task")
    await check_payload(call, body.select.task, body.payload)
    return {"payload": body.payload}
