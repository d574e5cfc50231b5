"""Waits: the tokens that runs wait for, and somebody's decision about one."""

from __future__ import annotations

from functools import partial
from typing import Final

from starlette.responses import Response

from brokertask.durations import seconds
from brokertask.errors import EnvelopeError
from brokertask.server.api.paging import Page
from brokertask.server.api.problems import Problem
from brokertask.server.api.stream import Stopping, Stream
from brokertask.server.api.waits import (
    Completion,
    Extension,
    Rejection,
    TokensQuery,
    TokenView,
    complete_token,
    extend_token,
    list_tokens,
    reject_token,
)
from brokertask.server.console.changes import changes
from brokertask.server.console.desk import Pages
from brokertask.server.console.visit import Visit
from brokertask.values import JSON, decode

pages: Final = Pages("Waits", "waits", "w")
EVERY: Final = 2.0
"""Seconds between two looks, for each page that is open."""


@pages.get("waits")
async def show(visit: Visit) -> Response:
    """Show tokens: those that nobody has decided, or all."""
    asked = visit.asked(TokensQuery)
    return visit.page("waits.html", asked=asked, found=await _look(visit))


@pages.get("live/waits")
async def follow(visit: Visit) -> Response:
    """Tell that a token was decided, or that there is another."""
    parts = changes(partial(_look, visit), every=EVERY)
    return Stream(parts, visit.call.state[Stopping])


@pages.post("waits/{token}/approve")
async def approve(visit: Visit) -> Response:
    """Complete a token with a JSON value: the run that waits for it goes on."""
    try:
        value = decode(visit.form.get("value", "null").encode(), JSON)
    except (EnvelopeError, UnicodeEncodeError) as error:
        raise Problem("invalid", f"the value is no JSON: {error}") from None
    body = visit.sent(Completion, value=value)
    await visit.ask(complete_token, token=visit.part("token"), body=body)
    return visit.go("waits", done="approve")


@pages.post("waits/{token}/reject")
async def reject(visit: Visit) -> Response:
    """Reject a token: the run that waits for it gets the reason."""
    body = visit.sent(Rejection, reason=visit.form.get("reason", ""))
    await visit.ask(reject_token, token=visit.part("token"), body=body)
    return visit.go("waits", done="reject")


@pages.post("waits/{token}/extend")
async def extend(visit: Visit) -> Response:
    """Give a token time, from now on; for ever, if it is not said how much."""
    given = visit.form.get("time", "").strip()
    due_ms = visit.now_ms + round(seconds(given) * 1000) if given else None
    body = visit.sent(Extension, due_ms=due_ms)
    await visit.ask(extend_token, token=visit.part("token"), body=body)
    return visit.go("waits", done="extend")


async def _look(visit: Visit) -> Page[TokenView]:
    return await visit.ask(list_tokens, query=visit.asked(TokensQuery))
