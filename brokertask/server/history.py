"""Reading the history of runs: some of them by filters, how many there are, and one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Subquery, func, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.runs import STATUSES, TAG
from brokertask.server.store.schema import attempts, known_tasks, run_tags, runs

MAX_COUNTED: Final = 10_000
"""Counting stops here: an exact number of many costs as much as reading them."""
_RARE: Final = ("parent", "root", "trace_id", "worker", "fingerprint")
"""Columns with an index of their own, for which few runs are taken."""
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
    fingerprint: str | None = None
    """Of the latest error; empty: without one."""
    run_ids: tuple[str, ...] = ()
    """One of these."""
    discarded: bool | None = None
    """Whether a dead run was discarded from the dead letters."""

    def newest(self, *, before: tuple[int, str] | None, limit: int) -> Subquery:
        """Return the keys and the status of the latest triggered runs of it, for a query.

        It is asked for each status by itself: then an index has the runs in their order, and a
        page of a million of them costs as much as a page of a hundred.
        """
        told = (runs.c.triggered_ms, runs.c.run_id, runs.c.status)
        rare = self.error is not None or any(getattr(self, name) for name in _RARE)
        rare = rare or bool(self.run_ids)
        if self.tags:
            times = run_tags.c.triggered_ms, run_tags.c.run_id
            whole = select(*told).join(run_tags, run_tags.c.run_id == runs.c.run_id)
            whole = whole.where(run_tags.c.tag == self.tags[0])
        else:
            times = runs.c.triggered_ms, runs.c.run_id
            whole = select(*told)
        whole = whole.where(*self._conditions(times[0]))
        if before is not None:
            whole = whole.where(tuple_(*times) < before)
        if self.tags or rare or not (self.statuses or self.task):
            if self.statuses:
                whole = whole.where(runs.c.status.in_(self.statuses))
            return _latest(whole, times, limit).subquery()
        arms = [
            select(_latest(whole.where(runs.c.status == status), times, limit).subquery())
            for status in self.statuses or STATUSES
        ]
        every = union_all(*arms).subquery()
        return _latest(select(every), (every.c.triggered_ms, every.c.run_id), limit).subquery()

    def _conditions(self, triggered_ms: ColumnElement[int]) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.since_ms is not None:
            found.append(triggered_ms >= self.since_ms)
        if self.until_ms is not None:
            found.append(triggered_ms < self.until_ms)
        found += [
            runs.c[name].is_(None) if name == "fingerprint" and not value else runs.c[name] == value
            for name in ("task", *_RARE)
            if (value := getattr(self, name)) is not None
        ]
        # The first tag is looked up; it says little of how many have another one, too.
        also = (f"{TAG}{tag}{TAG}" for tag in self.tags[1:])
        found += [runs.c.tags.contains(tag, autoescape=True) for tag in also]
        if self.run_ids:
            found.append(runs.c.run_id.in_(self.run_ids))
        if self.discarded is not None:
            gone = runs.c.discarded_ms
            found.append(gone.is_not(None) if self.discarded else gone.is_(None))
        if self.error is not None:
            told = runs.c.error_type + ": " + runs.c.error_message
            found.append(runs.c.error_type.is_not(None))
            found.append(told.icontains(self.error, autoescape=True))
        return found


def _latest(
    query: Select[*tuple[Any, ...]],
    times: tuple[ColumnElement[int], ColumnElement[str]],
    limit: int,
) -> Select[*tuple[Any, ...]]:
    return query.order_by(times[0].desc(), times[1].desc()).limit(limit)


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
    newest = wanted.newest(before=before, limit=limit)
    rows = select(*_LISTED).join(newest, newest.c.run_id == runs.c.run_id)
    latest_first = rows.order_by(runs.c.triggered_ms.desc(), runs.c.run_id.desc())
    return [dict(row._mapping) for row in await connection.execute(latest_first)]


async def counted(connection: AsyncConnection, wanted: RunFilter) -> Counts:
    """Return how many runs there are, by status; the newest 10,000 at most."""
    newest = wanted.newest(before=None, limit=MAX_COUNTED + 1)
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
