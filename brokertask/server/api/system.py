"""The server itself: who asks, and the audit log."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

from brokertask import __version__
from brokertask.server import servers
from brokertask.server.api import audit
from brokertask.server.api.auth import Role
from brokertask.server.api.operations import Call, Routes, Text
from brokertask.server.api.paging import Page, PageQuery, cursor_of, keys_of

routes: Final = Routes("server")


class Me(BaseModel):
    """Who asks, and what he may."""

    name: str
    role: Role
    payloads: bool
    version: str
    """Of the server."""


class Entry(BaseModel):
    """What somebody did."""

    id: str
    at_ms: int
    actor: str
    token: str | None
    role: str
    address: str | None
    action: str
    target: str
    reason: str | None
    status: int | None
    """What came of it, as an HTTP status; null: it was begun, and its server died."""


class AuditQuery(PageQuery):
    """Which entries."""

    actor: Text | None = None
    action: Text | None = None
    """The operation's id, such as `redrive_run`."""
    target: Text | None = None
    """What it was done to, such as a run's id."""

    @property
    def filters(self) -> dict[str, str]:
        """What is asked for, but for the page."""
        return self.model_dump(exclude={"cursor", "limit"}, exclude_none=True)


@routes.get("/me")
async def show_me(call: Call) -> Me:
    """Show who asks."""
    who = call.principal
    return Me(name=who.name, role=who.role, payloads=who.payloads, version=__version__)


class ServerView(BaseModel):
    """A server that is there."""

    server: str
    """Its host and its process."""
    version: str
    started_ms: int
    seen_ms: int
    lag_ms: int
    """How old an event was when it was written into history: the oldest of the last 10 s."""


@routes.get("/servers")
async def list_servers(call: Call) -> list[ServerView]:
    """List the servers on this store, and how far behind each is with history."""
    async with call.resources.store.read() as connection:
        rows = await servers.listed(connection, now_ms=call.now_ms)
    return [ServerView.model_validate(row) for row in rows]


@routes.get("/audit", role="admin")
async def list_audit(call: Call, query: AuditQuery) -> Page[Entry]:
    """List actions, and payloads that were shown, the latest first."""
    before = keys_of(query.cursor, (int, str)) if query.cursor else None
    async with call.resources.store.read() as connection:
        rows = await audit.listed(
            connection,
            query.filters,
            before=None if before is None else (before[0], before[1]),
            limit=query.limit + 1,
        )
    page = rows[: query.limit]
    last = page[-1] if len(rows) > query.limit else None
    return Page(
        items=[Entry.model_validate(row) for row in page],
        next=None if last is None else cursor_of(last["at_ms"], last["id"]),
    )
