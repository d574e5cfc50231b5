"""Messages that are written with what they follow from, in one transaction, and published after it.

    add (in any transaction) ──► claim some ──► publish, confirmed ──► delete

A crash before the delete publishes them once more, and never not at all: each message in here has
an id that says what it is a double of. A server renews its claim while it publishes; what one that
died has claimed, another one claims. A message that the broker refuses by itself goes behind all
others, so that nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from sqlalchemy import and_, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Message
from brokertask.errors import PublishError, QueueFull, StoreUnavailable, Unroutable
from brokertask.server.messages import pack_message, unpack_message
from brokertask.server.resources import Resources
from brokertask.server.store.schema import outbox
from brokertask.topology import Route
from brokertask.values import MSGPACK, decode, pack

log = logging.getLogger("brokertask.server")

BATCH: Final = 500
CLAIM_MS: Final = 10_000
"""After so long, what a server has claimed and neither deleted nor renewed belongs to nobody."""
RENEWALS: Final = 4
"""How often a claim is renewed before it would be lost: some of them may fail."""
POLL: Final = 1.0
BACKOFF: Final = 1.0
"""Seconds without a publish after the broker took none."""
REFUSED_MS: Final = 10_000
"""How long a message waits that the broker refuses while it takes others."""


_REFUSALS: Final = (QueueFull, Unroutable)


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
        first = outbox.c.due_ms.asc().nulls_first(), outbox.c.id
        wanted = select(outbox).where(and_(free, due)).order_by(*first).limit(BATCH)
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
        async with self._renewed(resources, [row.id for row in rows]):
            problems = await asyncio.gather(*(self._one(resources, row) for row in rows))
        ended = list(zip((row.id for row in rows), problems, strict=True))
        refused = [row for row, problem in ended if isinstance(problem, _REFUSALS)]
        left = [row for row, problem in ended if problem and row not in set(refused)]
        async with resources.store.begin() as connection:
            done = [row for row, problem in ended if problem is None]
            await connection.execute(delete(outbox).where(outbox.c.id.in_(done)))
            free = update(outbox).values(claimed_ms=None)
            await connection.execute(free.where(outbox.c.id.in_(left)))
            later_ms = resources.clock.now_ms() + REFUSED_MS
            await connection.execute(free.where(outbox.c.id.in_(refused)).values(due_ms=later_ms))
        if refused or left:
            told = next(problem for problem in problems if problem is not None)
            log.warning("%d messages are not published yet: %s", len(refused) + len(left), told)
        if left:
            await resources.clock.sleep(BACKOFF)

    @asynccontextmanager
    async def _renewed(self, resources: Resources, ids: Sequence[int]) -> AsyncIterator[None]:
        """Keep a claim inside the block, however long a publish takes."""

        async def renew() -> None:
            mine = update(outbox).where(outbox.c.id.in_(ids))
            while True:
                await asyncio.sleep(CLAIM_MS / 1000 / RENEWALS)
                # One that fails is not missed: a claim that is lost only doubles a message.
                with suppress(StoreUnavailable):
                    async with resources.store.begin() as connection:
                        now_ms = resources.clock.now_ms()
                        await connection.execute(mine.values(claimed_ms=now_ms))

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _one(self, resources: Resources, row: Any) -> PublishError | None:
        route = Route(row.exchange, row.key, tuple(decode(row.also, MSGPACK)))
        try:
            await resources.publish(route, unpack_message(row.message))
        except PublishError as error:
            return error
        return None

    async def _next_ms(self, resources: Resources) -> int | None:
        later = select(outbox.c.due_ms).where(outbox.c.due_ms.is_not(None))
        async with resources.store.read() as connection:
            found = await connection.scalar(later.order_by(outbox.c.due_ms).limit(1))
        return None if found is None else int(found)
