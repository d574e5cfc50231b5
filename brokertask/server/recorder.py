"""The part of a server that writes history: it takes in events, and copies of triggers.

Each batch is one transaction, and is acked after it: what was not written comes again. Then those
are told that wait for the end of a run, or for an event of a user's own. A message that no database
takes is logged and left out, so that it does not keep the others from being written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from brokertask.durations import readable
from brokertask.envelope import Envelope, Message
from brokertask.errors import BrokertaskError, EnvelopeError
from brokertask.events import ENDS, LOG, STEP, Event, asked_for
from brokertask.presence import WORKER, Presence
from brokertask.server import details, history, servers, workers
from brokertask.server.asks import Asks
from brokertask.server.batches import Batches
from brokertask.server.copies import Copies
from brokertask.server.outcomes import ending_of, record_endings, record_signals, signal_of
from brokertask.server.redactor import kept
from brokertask.server.resources import Resources
from brokertask.server.runs import event_fact, record, trigger_fact
from brokertask.server.waits import Waits
from brokertask.transport.base import Delivery

log = logging.getLogger("brokertask.server")

BATCH: Final = 500
LATE_MS: Final = 10_000
"""Of a lag that is worth a warning."""
Take: TypeAlias = Callable[[Sequence[Delivery], int], Awaitable[None]]


class Recorder:
    """Writes history; one of several servers' parts that may do so at once.

    Attributes:
        lag_ms: How old an event was when it was written: the oldest of the last 10 s.
    """

    def __init__(self, resources: Resources, waits: Waits, asks: Asks) -> None:
        self._resources = resources
        self._waits = waits
        self._asks = asks
        self._copies = Copies(resources)
        self._late_ms = 0
        self.lag_ms = 0

    async def run(self) -> None:
        """Take in what comes, until cancelled."""
        async with self._resources.store.read() as connection:
            known = await history.tasks(connection)
        await self._copies.want(known)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._consume("events", self._hear))
            group.create_task(self._consume("triggers", self._see))
            group.create_task(self._tell())

    async def _consume(self, queue: str, take: Take) -> None:
        resources = self._resources
        async with Batches(resources.transport, f"{resources.names.server}.{queue}", BATCH) as some:
            async for deliveries in some:
                await self._take(deliveries, take)
                for delivery in deliveries:
                    await delivery.ack()

    async def _take(self, deliveries: Sequence[Delivery], take: Take) -> None:
        """Take in a batch; if that fails, each by itself, but for those that fail again."""
        try:
            await take(deliveries, self._resources.clock.now_ms())
        except BrokertaskError:
            raise
        except Exception:
            if len(deliveries) > 1:
                for delivery in deliveries:
                    await self._take([delivery], take)
                return
            message = deliveries[0].message
            run = message.correlation_id or message.message_id
            log.exception("%s of run %s cannot be recorded: left out", message.type, run)

    async def _see(self, deliveries: Sequence[Delivery], now_ms: int) -> None:
        """Write what copies of triggers tell."""
        facts = []
        limit = self._resources.broker_settings.max_payload_bytes
        for delivery in deliveries:
            try:
                envelope = Envelope.read(delivery.message, task=delivery.key, max_bytes=limit)
            except EnvelopeError:
                continue  # Its worker will say so.
            facts.append(trigger_fact(envelope, kept(envelope), now_ms=now_ms))
        async with self._resources.store.begin() as connection:
            await record(connection, facts)

    async def _hear(self, deliveries: Sequence[Delivery], now_ms: int) -> None:
        """Write what events tell; then tell those who waited for it."""
        events: list[Event] = []
        signals: list[Mapping[str, object]] = []
        there: list[Presence] = []
        for delivery in deliveries:
            message = delivery.message
            if message.type == WORKER:
                there += _presence(message)
            elif (event := _event(message)) is not None:
                events.append(event)
            elif (signal := signal_of(message, delivery.key, at_ms=now_ms)) is not None:
                signals.append(signal)
        asked = [trigger_fact(one, kept(one), now_ms=now_ms) for one in _asked(events)]
        facts = asked + [event_fact(event) for event in events if event.event not in (STEP, LOG)]
        ended = [event for event in events if event.event in ENDS]
        async with self._resources.store.begin() as connection:
            await record(connection, facts)
            await record_endings(connection, [ending_of(event) for event in ended])
            await record_signals(connection, signals)
            await details.record(connection, events)
            await workers.record(connection, there)
        run_ids = [event.run_id for event in ended]
        await self._waits.came("run", run_ids)
        await self._waits.came("event", {str(signal["key"]) for signal in signals})
        await self._asks.ended(run_ids)
        await self._copies.want({event.task for event in events})
        if events:
            oldest_ms = min(event.at_ms for event in events)
            self._late_ms = max(self._late_ms, self._resources.clock.now_ms() - oldest_ms)

    async def _tell(self) -> None:
        """Say that this server is there, and how far behind it is."""
        while True:
            self.lag_ms, self._late_ms = self._late_ms, 0
            if self.lag_ms > LATE_MS:
                log.warning("history is %s behind", readable(self.lag_ms / 1000))
            async with self._resources.store.begin() as connection:
                now_ms = self._resources.clock.now_ms()
                await servers.record(connection, now_ms=now_ms, lag_ms=self.lag_ms)
                known = await history.tasks(connection)
            await self._copies.check()
            await self._copies.want(known)
            await asyncio.sleep(servers.EVERY)


def _asked(events: Iterable[Event]) -> list[Envelope]:
    """Return what runs that have begun were asked for: their triggers may not have been seen."""
    found = []
    for event in events:
        try:
            envelope = asked_for(event)
        except EnvelopeError as error:
            log.warning("run %s has begun, and says not with what: %s", event.run_id, error)
            continue
        if envelope is not None:
            found.append(envelope)
    return found


def _presence(message: Message) -> list[Presence]:
    try:
        return [Presence.read(message)]
    except EnvelopeError:
        return []


def _event(message: Message) -> Event | None:
    """Return the event of a run in a message; None for one that somebody else has published."""
    if not message.correlation_id or not message.type:
        return None
    try:
        return Event.read(message)
    except EnvelopeError:
        return None
