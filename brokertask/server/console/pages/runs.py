"""Runs: those that meet filters, the latest first, and what is new of them."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from pydantic import Field
from starlette.responses import Response

from brokertask.server.api.hub import Hub
from brokertask.server.api.paging import Cursor
from brokertask.server.api.problems import Problem
from brokertask.server.api.runs import RunsQuery, Selected, count_runs, list_runs, show_run
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.api.tasks import list_tasks
from brokertask.server.console.desk import Pages
from brokertask.server.console.pulses import pulses
from brokertask.server.console.visit import Visit
from brokertask.statuses import STATUSES
from brokertask.values import LAST_INSTANT_MS

pages: Final = Pages("Runs", "runs", "r")
PER_PAGE: Final = 50
DAY_MS: Final = 86_400_000
Within: TypeAlias = Literal["1h", "24h", "7d", "30d"]
WINDOWS: Final[dict[Within, int]] = {
    "1h": DAY_MS // 24,
    "24h": DAY_MS,
    "7d": 7 * DAY_MS,
    "30d": 30 * DAY_MS,
}
TRACE: Final = 32


class Asked(Selected):
    """Which runs, and which page of them."""

    within: Within | None = None
    """Triggered since so long before now."""
    cursor: Cursor | None = None
    as_of: int | None = Field(default=None, ge=0, le=LAST_INSTANT_MS)
    """When the first page was made: what is newer is counted, and not among the rows."""

    def selected(self, now_ms: int) -> Selected:
        """Return the filters, as the API has them."""
        given = self.model_dump(include=set(Selected.model_fields))
        since = [self.since_ms, now_ms - WINDOWS[self.within] if self.within else None]
        given["since_ms"] = max((each for each in since if each is not None), default=None)
        return Selected(**given)

    def link(self, **changed: object) -> dict[str, object]:
        """Return the parameters of a link to the same, but for what is changed."""
        return {**self.model_dump(exclude={"cursor", "as_of"}), **changed}


@pages.get("runs")
async def show(visit: Visit) -> Response:
    """Show a page of them."""
    asked = visit.asked(Asked)
    wanted = asked.selected(visit.now_ms)
    seen = wanted if asked.as_of is None else _until(wanted, asked.as_of)
    query = RunsQuery(**seen.model_dump(), limit=PER_PAGE, cursor=asked.cursor)
    found = await visit.ask(list_runs, query=query)
    counts = await visit.ask(count_runs, query=seen.model_copy(update={"status": []}))
    newest = max((run.triggered_ms for run in found.items), default=0)
    return visit.page(
        "runs.html",
        asked=asked,
        wanted=wanted.model_dump(exclude_defaults=True),
        runs=found.items,
        older=found.next,
        counts=counts,
        statuses=STATUSES.values(),
        windows=WINDOWS,
        tasks=[each.task for each in await visit.ask(list_tasks)],
        as_of=asked.as_of or max(visit.now_ms, newest),
        fresh=await _fresh(visit, wanted, asked.as_of),
    )


@pages.get("live/runs")
async def follow(visit: Visit) -> Response:
    """Tell that something has happened to a run, of a task or of any."""
    task = visit.request.query_params.get("task") or None
    state = visit.call.state
    return Stream(pulses(state[Hub], lambda event: task in (None, event.task)), state[Stopping])


@pages.get("find")
async def find(visit: Visit) -> Response:
    """Lead to what a text names: a run, the runs of a trace, of a task, or with a tag."""
    text = visit.request.query_params.get("q", "").strip()[:200]
    if not text:
        return visit.go("runs")
    try:
        run = await visit.ask(show_run, run_id=text)
    except Problem as problem:
        if problem.kind not in ("not_found", "invalid"):
            raise
    else:
        return visit.go(f"runs/{run.run_id}")
    if len(text) == TRACE and all(char in "0123456789abcdef" for char in text):
        return visit.go("runs", trace_id=text)
    tasks = {each.task for each in await visit.ask(list_tasks)}
    return visit.go("runs", task=text) if text in tasks else visit.go("runs", tag=text)


async def _fresh(visit: Visit, wanted: Selected, as_of: int | None) -> int:
    """Return how many there are that have come since."""
    if as_of is None:
        return 0
    since = max(wanted.since_ms or 0, as_of + 1)
    newer = await visit.ask(count_runs, query=wanted.model_copy(update={"since_ms": since}))
    return newer.total


def _until(wanted: Selected, as_of: int) -> Selected:
    until = as_of + 1 if wanted.until_ms is None else min(wanted.until_ms, as_of + 1)
    return wanted.model_copy(update={"until_ms": until})
