"""The part of a server that tells callers how runs ended that they did not trigger themselves.

A caller asks with its reply key, and asks again from time to time: so what is told need not be
kept until it has arrived.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete, select, tuple_

from brokertask.envelope import Message
from brokertask.errors import PublishError
from brokertask.events import Event
from brokertask.server.batches import Batches
from brokertask.server.outcomes import parts
from brokertask.server.resources import Resources
from brokertask.server.store.schema import asks, endings
from brokertask.server.store.upsert import put
from brokertask.topology import Route

log = logging.getLogger("brokertask.server")

BATCH: Final = 200
MAX_REPLY_KEY: Final = 200


class Asks:
    """Answers who asks for the end of a run, now or when it comes."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    async def run(self) -> None:
        """Take in what is asked, until cancelled."""
        resources = self._resources
        async with Batches(resources.transport, f"{resources.names.server}.asks", BATCH) as batches:
            async for deliveries in batches:
                await self.ask([delivery.message for delivery in deliveries])
                for delivery in deliveries:
                    await delivery.ack()

    async def ask(self, messages: Sequence[Message]) -> None:
        """Remember who asks for which run, and answer what is known."""
        now_ms = self._resources.clock.now_ms()
        rows = []
        for message in messages:
            run_id, reply_to = message.message_id, message.reply_to
            if not run_id or not reply_to or len(reply_to) > MAX_REPLY_KEY:
                log.warning("somebody asks for a run without its id or without a reply key")
                continue
            rows.append({"run_id": run_id, "reply_to": reply_to, "since_ms": now_ms})
        async with self._resources.store.begin() as connection:
            await put(connection, asks, rows)
        await self.ended([str(row["run_id"]) for row in rows])

    async def ended(self, run_ids: Sequence[str]) -> None:
        """Answer those who have asked for these runs, as far as their ends are written."""
        for part in parts(sorted(set(run_ids))):
            asked = select(asks.c.run_id, asks.c.reply_to, endings.c.body).join(
                endings, endings.c.run_id == asks.c.run_id
            )
            async with self._resources.store.read() as connection:
                found = list(await connection.execute(asked.where(asks.c.run_id.in_(part))))
            if not found:
                continue
            for row in found:
                await self._tell(row.reply_to, row.body)
            told = [(row.run_id, row.reply_to) for row in found]
            async with self._resources.store.begin() as connection:
                mine = tuple_(asks.c.run_id, asks.c.reply_to).in_(told)
                await connection.execute(delete(asks).where(mine))

    async def _tell(self, reply_to: str, body: bytes) -> None:
        message = Event.read(Message(body=body)).message()
        # The key is the caller's own: nobody else hears this.
        route = Route(self._resources.names.events, reply_to)
        try:
            await self._resources.publish(route, message, mandatory=False)
        except PublishError as error:
            log.warning("an answer is not told, and will be asked for again: %s", error)
