"""What is done to a run: it is cancelled, begins again, or is triggered once more."""

from __future__ import annotations

import json
from typing import Any, Final, Literal, TypeAlias

from starlette.responses import Response

from brokertask.errors import EnvelopeError
from brokertask.server.api.control import Cancellation, cancel_run
from brokertask.server.api.problems import Problem, ProblemView
from brokertask.server.api.results import Redrive, redrive_run
from brokertask.server.api.runs import PayloadView, Replay, replay_run, show_payload, show_run
from brokertask.server.console.desk import Pages
from brokertask.server.console.html import segment
from brokertask.server.console.visit import Visit
from brokertask.values import JSON, decode

pages: Final = Pages()
How: TypeAlias = Literal["redrive", "replay"]
WORDS: Final[dict[How, str]] = {"redrive": "Edit and redrive", "replay": "Edit and replay"}


@pages.post("runs/{run_id}/cancel")
async def cancel(visit: Visit) -> Response:
    """Cancel it."""
    run_id, form = visit.part("run_id"), visit.form
    body = visit.sent(Cancellation, reason=form.get("reason", ""), children="children" in form)
    await visit.ask(cancel_run, run_id=run_id, body=body)
    return visit.go(f"runs/{segment(run_id)}", done="cancel")


@pages.post("runs/{run_id}/redrive")
async def redrive(visit: Visit) -> Response:
    """Put a dead one back to work, perhaps with another payload."""
    run_id, form = visit.part("run_id"), visit.form
    values = {"reason": form.get("reason", ""), "forget": "forget" in form}
    try:
        body = visit.sent(Redrive, **values, **_payload(form))
        await visit.ask(redrive_run, run_id=run_id, body=body)
    except Problem as problem:
        return await _edit_again(visit, run_id, "redrive", problem)
    return visit.go(f"runs/{segment(run_id)}", done="redrive")


@pages.post("runs/{run_id}/replay")
async def replay(visit: Visit) -> Response:
    """Trigger a new run like it, perhaps with another payload; lead to that one."""
    run_id, form = visit.part("run_id"), visit.form
    try:
        body = visit.sent(Replay, reason=form.get("reason", ""), **_payload(form))
        began = await visit.ask(replay_run, run_id=run_id, body=body)
    except Problem as problem:
        return await _edit_again(visit, run_id, "replay", problem)
    return visit.go(f"runs/{segment(began.run_id)}", done="replay")


@pages.get("runs/{run_id}/edit/{how}")
async def edit(visit: Visit) -> Response:
    """Show its payload in a form; who may not see it begins with an empty one."""
    run_id, how = visit.part("run_id"), visit.part("how")
    if how not in WORDS:
        raise Problem("not_found", "a run is edited to redrive or to replay it")
    known = None
    if visit.principal.payloads:
        known = await visit.ask(show_payload, run_id=run_id)
    kept = known is not None and known.state in ("kept", "redacted", "claim")
    text = json.dumps(known.payload, indent=2, ensure_ascii=False) if known and kept else ""
    return await _form(visit, run_id, how, text, known=known)


def _payload(form: Any) -> dict[str, Any]:
    if "payload" not in form:
        return {}
    try:
        return {"replace": True, "payload": decode(form["payload"].encode(), JSON)}
    except (EnvelopeError, UnicodeEncodeError) as error:
        raise Problem("invalid", f"the payload is no JSON: {error}") from None


async def _edit_again(visit: Visit, run_id: str, how: How, problem: Problem) -> Response:
    """Show what was sent once more, and why it was not taken: nobody has to type it twice."""
    if "payload" not in visit.form:
        raise problem
    return await _form(visit, run_id, how, visit.form["payload"], problem=problem)


async def _form(
    visit: Visit,
    run_id: str,
    how: How,
    text: str,
    *,
    known: PayloadView | None = None,
    problem: Problem | None = None,
) -> Response:
    refused: ProblemView | None = None if problem is None else problem.view
    return visit.page(
        "run-edit.html",
        status=200 if problem is None else problem.status,
        run=await visit.ask(show_run, run_id=run_id),
        how=how,
        title=WORDS[how],
        text=text,
        known=known,
        refused=refused,
        reason=visit.form.get("reason", ""),
    )
