"""What runs wait for: tokens, which are decided here, and the waits of one run."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, Field, JsonValue, StringConstraints

from brokertask.server import tokens
from brokertask.server.api.operations import PRINTABLE, Call, Routes, RunId, Strict, Text
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of
from brokertask.server.api.problems import Problem
from brokertask.server.api.shown import shown
from brokertask.server.waits import Waits
from brokertask.values import LAST_INSTANT_MS

routes: Final = Routes("waits")
TokenId: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)
]


class TokenView(BaseModel):
    """A token: somebody's decision, before or after it."""

    id: str
    run_id: str | None
    name: str | None
    state: str
    """`waiting`, `completed`, `rejected` or `timed_out`."""
    reason: str | None
    """Why it was rejected."""
    created_ms: int
    due_ms: int | None
    """When the run goes on without it."""
    decided_ms: int | None
    decided_by: str | None


class WaitView(BaseModel):
    """A wait of a run."""

    key: str
    state: str
    since_ms: int
    due_ms: int | None
    over_ms: int | None
    what: list[str]
    """What it is for, in words."""


class TokensQuery(PageQuery):
    """Which tokens."""

    state: Literal["open", "all"] = "open"


class Completion(Strict):
    """A decision."""

    value: JsonValue = None
    """What the run gets, up to 64 KiB in msgpack."""


class Rejection(Strict):
    """A decision against it."""

    reason: Text = ""


class Extension(Strict):
    """More time."""

    due_ms: int | None = Field(ge=0, le=LAST_INSTANT_MS)
    """Until when, in ms since the epoch; null: for ever."""


class Decided(BaseModel):
    """What came of a decision."""

    id: str
    answer: Literal["done", "repeated"]
    """`repeated`: the same was decided before."""


@routes.get("/waits/tokens")
async def list_tokens(call: Call, query: TokensQuery) -> Page[TokenView]:
    """List tokens, by id.

    By default those that nobody has decided.
    """
    after = keys_of(query.cursor, (str,))[0] if query.cursor else ""
    async with call.resources.store.read() as connection:
        rows = await tokens.listed(
            connection, open_only=query.state == "open", after=after, limit=query.limit + 1
        )
    page = rows[: query.limit]
    more = len(rows) > query.limit
    return Page(
        items=[TokenView.model_validate(row) for row in page],
        next=cursor_of(page[-1]["id"]) if more else None,
    )


@routes.get("/runs/{run_id}/waits")
async def list_waits_of_run(call: Call, run_id: RunId) -> list[WaitView]:
    """List what a run waits or has waited for."""
    async with call.resources.store.read() as connection:
        rows = await tokens.of_run(connection, run_id)
    return [WaitView.model_validate({**row, "what": row["for"]}) for row in rows]


@routes.get("/waits/tokens/{token}/value", reveals=True)
async def show_token_value(call: Call, token: TokenId) -> Any:
    """Show what a token was completed with."""
    async with call.resources.store.read() as connection:
        return shown(await tokens.value_of(connection, token))


@routes.post("/waits/tokens/{token}/complete", problems=("conflict",))
async def complete_token(call: Call, token: TokenId, body: Completion) -> Decided:
    """Complete a token: the run that waits for it goes on with the value.

    It may be done before the run waits. The same again changes nothing.
    """
    waits = Waits(call.resources)
    return _decided(token, await waits.complete(token, body.value, by=call.principal.name))


@routes.post("/waits/tokens/{token}/reject", problems=("conflict",))
async def reject_token(call: Call, token: TokenId, body: Rejection) -> Decided:
    """Reject a token: the run that waits for it goes on with the reason."""
    waits = Waits(call.resources)
    return _decided(token, await waits.reject(token, body.reason, by=call.principal.name))


@routes.post("/waits/tokens/{token}/extend", problems=("conflict",))
async def extend_token(call: Call, token: TokenId, body: Extension) -> Decided:
    """Give a token more time, or less."""
    return _decided(token, await Waits(call.resources).extend(token, body.due_ms))


@routes.post("/callbacks/{secret}", public=True, problems=("conflict", "not_found"))
async def call_back(call: Call, secret: TokenId, body: Completion) -> Decided:
    """Complete the token that this secret is of.

    For whoever was given the callback's URL: it takes no API token.
    """
    answer = await Waits(call.resources).call_back(secret, body.value)
    return _decided("", answer)


def _decided(token: str, answer: tokens.Answer) -> Decided:
    match answer:
        case "done" | "repeated":
            return Decided(id=token, answer=answer)
        case "late":
            raise Problem("conflict", "it was decided otherwise before, or its time has run out")
        case "too_large":
            raise Problem("too_large", f"a token takes up to {tokens.MAX_VALUE_BYTES} bytes")
        case "unknown":
            raise Problem("not_found", "there is no such token")
