"""Messages that are written with what they follow from, in one transaction, and published after it.

    add (in any transaction) ──► claim some ──► publish, confirmed ──► delete

A crash before the delete publishes them once more, and never not at all: each message in here has
an id that says what it is a double of. What a server has claimed and not deleted, another one
claims when that has had time enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import and_, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Message
from brokertask.errors import PublishError
from brokertask.server.messages import pack_message, unpack_message
from brokertask.server.resources import Resources
from brokertask.server.store.schema import outbox
from brokertask.topology import Route
from brokertask.values import MSGPACK, decode, pack

log = logging.getLogger("brokertask.server")

BATCH: Final = 500
CLAIM_MS: Final = 60_000
"""How long a server may take to publish what it has claimed: more than a publish may take."""
POLL: Final = 1.0
BACKOFF: Final = 1.0


class Outbox:
    """Publishes what transactions have left behind."""

    def __init__(self) -> None:
        self._added = asyncio.Event()
        self._publishing = 0

    @property
    def busy(self) -> bool:
        """Whether something may be there that is to be published now."""
        return self._added.is_set() or self._publishing > 0

    async def add(
        self,
        connection: AsyncConnection,
        route: Route,
        message: Message,
        *,
        due_ms: int | None = None,
    ) -> None:
        """Have a message published when this transaction is committed, at `due_ms` or at once."""
        row = {
            "exchange": route.exchange,
            "key": route.key,
            "also": pack(list(route.also)),
            "message": pack_message(message),
            "due_ms": due_ms,
        }
        await connection.execute(insert(outbox).values(row))

    def poke(self) -> None:
        """Publish what was added now, rather than soon."""
        self._added.set()

    async def run(self, resources: Resources) -> None:
        """Publish, until cancelled."""
        while True:
            self._added.clear()
            self._publishing += 1
            try:
                rows = await self._claim(resources)
                if rows:
                    await self._publish(resources, rows)
                    continue
                next_ms = await self._next_ms(resources)
            finally:
                self._publishing -= 1
            await resources.wait_until(next_ms, self._added, poll=POLL)

    async def _claim(self, resources: Resources) -> Sequence[Any]:
        now_ms = resources.clock.now_ms()
        free = or_(outbox.c.claimed_ms.is_(None), outbox.c.claimed_ms <= now_ms - CLAIM_MS)
        due = or_(outbox.c.due_ms.is_(None), outbox.c.due_ms <= now_ms)
        wanted = select(outbox).where(and_(free, due)).order_by(outbox.c.id).limit(BATCH)
        async with resources.store.begin() as connection:
            found = await connection.execute(wanted.with_for_update(skip_locked=True))
            rows = found.all()
            ids = [row.id for row in rows]
            if ids:
                claimed = update(outbox).where(outbox.c.id.in_(ids))
                await connection.execute(claimed.values(claimed_ms=now_ms))
        return rows

    async def _publish(self, resources: Resources, rows: Sequence[Any]) -> None:
        """Publish rows side by side; those that the broker does not take are tried again."""
        problems = await asyncio.gather(*(self._one(resources, row) for row in rows))
        done = [row.id for row, problem in zip(rows, problems, strict=True) if problem is None]
        left = [row.id for row, problem in zip(rows, problems, strict=True) if problem is not None]
        async with resources.store.begin() as connection:
            await connection.execute(delete(outbox).where(outbox.c.id.in_(done)))
            given_back = update(outbox).where(outbox.c.id.in_(left))
            await connection.execute(given_back.values(claimed_ms=None))
        if left:
            told = next(problem for problem in problems if problem is not None)
            log.warning("%d messages are not published yet: %s", len(left), told)
            await resources.clock.sleep(BACKOFF)

    async def _one(self, resources: Resources, row: Any) -> PublishError | None:
        route = Route(row.exchange, row.key, tuple(decode(row.also, MSGPACK)))
        try:
            await resources.publish(route, unpack_message(row.message))
        except PublishError as error:
            return error
        return None

    async def _next_ms(self, resources: Resources) -> int | None:
        later = select(outbox.c.due_ms).where(outbox.c.due_ms.is_not(None))
        async with resources.store.begin() as connection:
            found = await connection.scalar(later.order_by(outbox.c.due_ms).limit(1))
        return None if found is None else int(found)
