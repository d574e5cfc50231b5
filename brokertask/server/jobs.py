"""The part of a server that works off jobs over many runs, some side by side.

A job is one server's at a time; when that dies, another one goes on with it after 15 seconds. What
is done to a run is written in the transaction that does it, or before it: see `letters`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.control import Entry
from brokertask.envelope import Envelope
from brokertask.errors import BrokertaskError, BrokerUnavailable, StoreUnavailable
from brokertask.events import ENDS
from brokertask.server import admission, bulk
from brokertask.server.bulk import Item, Job
from brokertask.server.grip import Grip
from brokertask.server.letters import Letters
from brokertask.server.replays import NOT_KEPT, Given, replay
from brokertask.server.resources import Resources
from brokertask.server.servers import NAME
from brokertask.server.store.schema import runs
from brokertask.server.triggers import prepared

AT_ONCE: Final = 4
"""Jobs of one server side by side: a slow one keeps no other waiting."""
POLL: Final = 0.5
CHUNK: Final = 200
LETTERS: Final = 2_000
"""Dead letters that are held at a time: each time, all of a queue is looked through."""
LETTERS_FOR: Final = 60.0
"""Seconds for which they are, at the most, where a rate says how fast they go."""


class Jobs:
    """Works off jobs; several servers may do so at once."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    async def run(self) -> None:
        """Work off what there is, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work(f"{NAME}-{secrets.token_hex(4)}"))

    async def _work(self, server: str) -> None:
        resources = self._resources
        while True:
            now_ms = resources.clock.now_ms()
            async with resources.store.begin() as connection:
                job = await bulk.take(connection, server=server, now_ms=now_ms)
            if job is None:
                await asyncio.sleep(POLL)
                continue
            try:
                async with Grip(resources, job, server=server) as grip:
                    await self._do(job, grip)
            finally:
                with suppress(BrokertaskError):
                    async with resources.store.begin() as connection:
                        await bulk.leave(connection, job.id, server=server)

    async def _do(self, job: Job, grip: Grip) -> None:
        """Work on a job until nothing is left, or it is no longer this server's."""
        resources = self._resources
        # Of an aborted one only what has begun is brought to its end.
        states: Sequence[bulk.State] = ["sent"] if job.aborting else bulk.OPEN
        letters = Letters(resources, job, grip)
        while grip.held:
            async with resources.store.begin() as connection:
                limit = _portion(job)
                items = await bulk.next_items(connection, job, states=states, limit=limit)
                if not items:
                    await bulk.finish(connection, job.id, now_ms=resources.clock.now_ms())
                    return
            match job.action:
                case "redrive":
                    await letters.redrive(items)
                case "discard":
                    await letters.discard(items)
                case "cancel":
                    await self._cancel(job, items)
                case "replay":
                    await self._replay(job, items)
            if not job.of_letters:
                await grip.turn(len(items))

    async def _cancel(self, job: Job, items: Sequence[Item]) -> None:
        resources, now_ms = self._resources, self._resources.clock.now_ms()
        async with resources.store.begin() as connection:
            rows = await _rows(connection, items)
            for item in items:
                row = rows.get(item.run_id)
                if row is not None and row["status"] in ENDS:
                    detail = f"it has ended as {row['status']}"
                    await bulk.move(connection, item, "skipped", now_ms=now_ms, detail=detail)
                elif await bulk.move(connection, item, "done", now_ms=now_ms):
                    order = Entry(
                        kind="cancel",
                        subject=item.run_id,
                        at_ms=now_ms,
                        reason=job.reason,
                        children=bool(job.options.get("children")),
                    )
                    route = resources.names.control_route()
                    await resources.outbox.add(connection, route, order.message())
        resources.outbox.poke()

    async def _replay(self, job: Job, items: Sequence[Item]) -> None:
        resources, now_ms = self._resources, self._resources.clock.now_ms()
        async with resources.store.read() as connection:
            rows = await _rows(connection, items)
        made = [await self._again(job, rows.get(item.run_id)) for item in items]
        async with resources.store.begin() as connection:
            for item, new in zip(items, made, strict=True):
                if isinstance(new, str):
                    await bulk.move(connection, item, "failed", now_ms=now_ms, detail=new)
                elif await bulk.move(connection, item, "done", now_ms=now_ms, detail=new.run_id):
                    await admission.send(resources, connection, [new], now_ms=now_ms)
        resources.outbox.poke()

    async def _again(self, job: Job, row: Mapping[str, Any] | None) -> Envelope | str:
        """Return the message of a run's replay, or why there is none."""
        if row is None:
            return "history has forgotten it"
        options = job.options
        given = Given(options["payload"]) if "payload" in options else None
        try:
            wish = await replay(self._resources, row, given=given, tags=[f"bulk:{job.id}"])
            if wish is None:
                return NOT_KEPT
            return await prepared(self._resources, wish)
        except (StoreUnavailable, BrokerUnavailable):
            raise
        except BrokertaskError as error:
            return str(error)


def _portion(job: Job) -> int:
    """Return how many runs are acted on at a time."""
    if job.of_letters:
        return LETTERS if job.rate is None else max(1, min(LETTERS, round(job.rate * LETTERS_FOR)))
    return CHUNK if job.rate is None else max(1, min(CHUNK, int(job.rate)))


async def _rows(connection: AsyncConnection, items: Sequence[Item]) -> Mapping[str, Any]:
    found = select(runs).where(runs.c.run_id.in_([item.run_id for item in items]))
    return {row.run_id: dict(row._mapping) for row in await connection.execute(found)}
