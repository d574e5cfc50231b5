"""What a run waits for, from all that is known of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from pydantic import BaseModel

from brokertask.errors import AccessDenied
from brokertask.server import cancels, history, workers
from brokertask.server.api.operations import Call, Routes, RunId
from brokertask.server.api.problems import Problem
from brokertask.server.control import paused
from brokertask.server.why import Facts, reasons
from brokertask.values import MSGPACK, decode

routes: Final = Routes("runs")


class ReasonView(BaseModel):
    """One thing that a run waits for."""

    code: str
    """`completed`, `expired`, `cancelled`, `dead`, `discarded`; `cancelling`, `paused`; `delay`,
    `retry`, `sleep`, `waits`; `no_queue`, `no_worker`, `slots`, `queue`; `running`, `lost`."""
    what: str


class WhyView(BaseModel):
    """What a run waits for."""

    run_id: str
    task: str
    status: str
    reasons: list[ReasonView]
    """What matters most first."""


@routes.get("/runs/{run_id}/why", problems=("broker_unavailable",))
async def explain_run(call: Call, run_id: RunId) -> WhyView:
    """Explain what a run waits for: a time, a token, a slot, a worker, somebody's order."""
    resources = call.resources
    async with resources.store.read() as connection:
        row = await history.shown(connection, run_id)
        if row is None:
            raise Problem("not_found", "there is no such run, or nothing was heard of it yet")
        held = await paused(connection)
        there = await workers.listed(connection, now_ms=call.now_ms)
        cancelled = run_id in await cancels.among(connection, [run_id])
    queue = None
    with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
        queue = await resources.transport.depth(resources.names.queue(row["task"]))
    facts = Facts(
        run=row,
        waits=[] if row["waits"] is None else decode(row["waits"], MSGPACK),
        now_ms=call.now_ms,
        paused=held.get(row["task"]),
        queue=queue,
        workers=[one for one in there if row["task"] in one["tasks"]],
        cancelled=cancelled,
    )
    return WhyView(
        run_id=run_id,
        task=row["task"],
        status=row["status"],
        reasons=[ReasonView(code=one.code, what=one.what) for one in reasons(facts)],
    )
