"""A run: what it did when, and what became of it; as it goes on."""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.responses import Response

from brokertask.server import details
from brokertask.server.api.beginnings import list_beginnings
from brokertask.server.api.problems import Problem
from brokertask.server.api.results import ResultQuery, follow_run, show_result
from brokertask.server.api.runs import list_attempts, show_payload, show_run
from brokertask.server.api.waits import list_waits_of_run
from brokertask.server.console import html
from brokertask.server.console.desk import Pages
from brokertask.server.console.timeline import Told, spans
from brokertask.server.console.visit import Visit

pages: Final = Pages()
MAX_STEPS: Final = 20_000
"""Of a timeline; more are too thin to be seen."""
_AT_ONCE: Final = ResultQuery()


@pages.get("runs/{run_id}")
async def show(visit: Visit) -> Response:
    """Show a run."""
    run_id = visit.part("run_id")
    run = await visit.ask(show_run, run_id=run_id)
    attempts = await visit.ask(list_attempts, run_id=run_id)
    return visit.page("run.html", run=run, attempts=attempts, metadata=html.block(run.metadata))


@pages.get("runs/{run_id}/timeline.json")
async def show_timeline(visit: Visit) -> Response:
    """Give its spans: depth, kind, label, status, since, until and note of each."""
    run_id = visit.part("run_id")
    run = await visit.ask(show_run, run_id=run_id)
    async with visit.gate.resources.store.read() as connection:
        steps = await details.steps_of(connection, run_id, limit=MAX_STEPS)
    told = Told(
        run=run,
        attempts=await visit.ask(list_attempts, run_id=run_id),
        beginnings=await visit.ask(list_beginnings, run_id=run_id),
        steps=steps,
        waits=await visit.ask(list_waits_of_run, run_id=run_id),
    )
    rows = [
        [
            *(span.depth, span.kind, html.plain(span.label), span.status),
            *(span.since_ms, span.until_ms, html.plain(span.note)[: html.MAX_LINE]),
        ]
        for span in spans(told)
    ]
    return Response(json.dumps({"now": visit.now_ms, "spans": rows}), media_type="application/json")


@pages.get("live/runs/{run_id}")
async def follow(visit: Visit) -> Response:
    """Tell as it happens what happens to it."""
    return await visit.ask(follow_run, run_id=visit.part("run_id"))


@pages.get("runs/{run_id}/payload")
async def show_values(visit: Visit) -> Response:
    """Show what it was triggered with, and what it returned; each time it is written down."""
    run_id = visit.part("run_id")
    run = await visit.ask(show_run, run_id=run_id)
    payload = await visit.ask(show_payload, run_id=run_id)
    try:
        ending = await visit.ask(show_result, run_id=run_id, query=_AT_ONCE)
    except Problem as problem:
        if problem.kind != "not_found":
            raise
        ending = None
    return visit.page(
        "run-payload.html",
        run=run,
        payload=payload,
        shown=html.block(payload.payload),
        ending=ending,
        result=html.block(ending.result) if ending is not None else None,
    )


@pages.get("runs/{run_id}/payload.json")
async def load_payload(visit: Visit) -> Response:
    """Give the whole payload, as a file."""
    payload = await visit.ask(show_payload, run_id=visit.part("run_id"))
    return _file(payload.payload, "payload.json")


@pages.get("runs/{run_id}/result.json")
async def load_result(visit: Visit) -> Response:
    """Give the whole result, as a file."""
    ending = await visit.ask(show_result, run_id=visit.part("run_id"), query=_AT_ONCE)
    return _file(ending.result, "result.json")


@pages.get("runs/{run_id}/raw")
async def show_raw(visit: Visit) -> Response:
    """Show all that the history has of it, but for payload and result."""
    run_id = visit.part("run_id")
    run = await visit.ask(show_run, run_id=run_id)
    attempts = await visit.ask(list_attempts, run_id=run_id)
    whole = {
        **run.model_dump(mode="json"),
        "attempts": [each.model_dump(mode="json") for each in attempts],
    }
    return visit.page("run-raw.html", run=run, raw=html.block(whole))


def _file(value: Any, name: str) -> Response:
    # A browser that took it for a page would run what is in it.
    return Response(
        json.dumps(value, ensure_ascii=False, indent=2),
        media_type="application/json",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )
