"""Reading the history of runs: some of them by filters, how many there are, and one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.runs import TAG
from brokertask.server.store.schema import attempts, known_tasks, runs

MAX_COUNTED: Final = 10_000
"""Counting stops here: an exact number of many costs as much as reading them."""
_HEAVY: Final = ("payload", "content_type", "place", "asked_place", "noted_ms", "done_ms")
_LISTED: Final = [column for column in runs.c if column.name not in _HEAVY]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs: those that meet everything that is given."""

    statuses: tuple[str, ...] = ()
    task: str | None = None
    tags: tuple[str, ...] = ()
    since_ms: int | None = None
    """Triggered at this instant or later."""
    until_ms: int | None = None
    """Triggered before."""
    error: str | None = None
    """Part of the latest error's "type: message", in any case of ASCII letters."""
    parent: str | None = None
    root: str | None = None
    trace_id: str | None = None
    worker: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return it for a query."""
        found: list[ColumnElement[bool]] = []
        if self.statuses:
            found.append(runs.c.status.in_(self.statuses))
        if self.since_ms is not None:
            found.append(runs.c.triggered_ms >= self.since_ms)
        if self.until_ms is not None:
            found.append(runs.c.triggered_ms < self.until_ms)
        found += [
            runs.c[name] == value
            for name in ("task", "parent", "root", "trace_id", "worker")
            if (value := getattr(self, name)) is not None
        ]
        found += [runs.c.tags.contains(f"{TAG}{tag}{TAG}", autoescape=True) for tag in self.tags]
        if self.error is not None:
            told = runs.c.error_type + ": " + runs.c.error_message
            found.append(told.icontains(self.error, autoescape=True))
        return found


@dataclass(frozen=True, slots=True)
class Counts:
    """How many runs a filter takes, by status."""

    by_status: Mapping[str, int]
    capped: bool
    """There are more: only the newest 10,000 are counted."""


async def listed(
    connection: AsyncConnection,
    wanted: RunFilter,
    *,
    before: tuple[int, str] | None = None,
    limit: int = 50,
) -> list[Mapping[str, Any]]:
    """Return runs, the latest triggered first, without payloads, behind the row with these keys."""
    keys = tuple_(runs.c.triggered_ms, runs.c.run_id)
    query = select(*_LISTED).where(*wanted.conditions())
    if before is not None:
        query = query.where(keys < before)
    query = query.order_by(runs.c.triggered_ms.desc(), runs.c.run_id.desc()).limit(limit)
    return [dict(row._mapping) for row in await connection.execute(query)]


async def counted(connection: AsyncConnection, wanted: RunFilter) -> Counts:
    """Return how many runs there are, by status; the newest 10,000 at most."""
    newest = (
        select(runs.c.status)
        .where(*wanted.conditions())
        .order_by(runs.c.triggered_ms.desc(), runs.c.run_id.desc())
        .limit(MAX_COUNTED + 1)
        .subquery()
    )
    rows = await connection.execute(
        select(newest.c.status, func.count()).group_by(newest.c.status).order_by(newest.c.status)
    )
    by_status = {row[0]: row[1] for row in rows}
    return Counts(by_status, capped=sum(by_status.values()) > MAX_COUNTED)


async def shown(connection: AsyncConnection, run_id: str) -> Mapping[str, Any] | None:
    """Return all that is known of a run, or None."""
    row = (await connection.execute(select(runs).where(runs.c.run_id == run_id))).one_or_none()
    return None if row is None else dict(row._mapping)


async def attempts_of(connection: AsyncConnection, run_id: str) -> list[Mapping[str, Any]]:
    """Return the attempts of a run that have ended, in order."""
    rows = await connection.execute(
        select(attempts)
        .where(attempts.c.run_id == run_id)
        .order_by(attempts.c.redrives, attempts.c.attempt)
    )
    return [dict(row._mapping) for row in rows]


async def tasks(connection: AsyncConnection) -> list[str]:
    """Return every task that something was heard of, by name."""
    rows = await connection.execute(select(known_tasks.c.task).order_by(known_tasks.c.task))
    return [row.task for row in rows]


def tags_of(row: Mapping[str, Any]) -> list[str]:
    """Return the tags in a row."""
    return [tag for tag in row["tags"].split(TAG) if tag]
