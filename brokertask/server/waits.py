"""The part of a server that keeps runs which wait, and sends them on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from brokertask.deadletter import bury_raw
from brokertask.envelope import Envelope, Message
from brokertask.errors import EnvelopeError, PayloadError
from brokertask.outcome import AttemptError, Failed
from brokertask.server import cancels, parking, tokens
from brokertask.server.batches import Batches
from brokertask.server.messages import pack_message, unpack_message
from brokertask.server.outcomes import parts
from brokertask.server.parking import Arrival, Ready
from brokertask.server.resources import Resources
from brokertask.topology import Route
from brokertask.transport.base import Delivery
from brokertask.values import pack
from brokertask.wait import Failing, Got, Wait, plain_gots, token_id

log = logging.getLogger("brokertask.server")

BATCH: Final = 200
POLL: Final = 1.0
"""Seconds after which a server looks for what is due that another one has taken in."""
ROOM: Final = 0.9
"""The part of its memory that a run's waits may fill; the rest is for the steps after them."""


class Waits:
    """Keeps runs that wait; one of several servers' parts that may do so at once."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._names = resources.names
        self._sooner = asyncio.Event()

    async def run(self) -> None:
        """Take in what workers park, and watch the time, until cancelled."""
        queue = f"{self._names.server}.waits"
        async with Batches(self._resources.transport, queue, BATCH) as batches:
            watching = asyncio.create_task(self._watch())
            try:
                async for deliveries in batches:
                    await self._take(deliveries)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def came(self, kind: str, subjects: Iterable[str]) -> None:
        """Send on whoever waited for these: `run`, `token` or `event`; they are written."""
        async with self._resources.store.read() as connection:
            run_ids = await parking.waiting_for(connection, kind, subjects)
        await self.look(run_ids)

    async def complete(self, token: str, value: object, *, by: str) -> tokens.Answer:
        """Complete a token with a plain value of up to 64 KiB, and send on who waits for it.

        Raises:
            InvalidPayload: The value has no form in msgpack.
        """
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            answer = await tokens.complete(connection, token, value, by=by, now_ms=now_ms)
        await self.came("token", [token])
        return answer

    async def call_back(self, secret: str, value: object) -> tokens.Answer:
        """Complete the token that somebody has the secret of, as `complete` does.

        Before the token is known, little is kept, of few, for an hour: the answer is `unknown`.
        """
        return await self.complete(token_id(secret), value, by=tokens.CALLBACK)

    async def reject(self, token: str, reason: str, *, by: str) -> tokens.Answer:
        """Reject a token, and send on who waits for it: it gets the reason."""
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            answer = await tokens.reject(connection, token, reason, by=by, now_ms=now_ms)
        await self.came("token", [token])
        return answer

    async def extend(self, token: str, due_ms: int | None) -> tokens.Answer:
        """Give a token time until `due_ms`, in ms since the epoch; None: for ever."""
        async with self._resources.store.begin() as connection:
            answer = await tokens.extend(connection, token, due_ms)
        self._sooner.set()
        return answer

    async def look(self, run_ids: Sequence[str]) -> None:
        """Send on those of these runs that need not wait any longer."""
        resources = self._resources
        for part in parts(run_ids, BATCH):
            now_ms = resources.clock.now_ms()
            async with resources.store.begin() as connection:
                look = await parking.look(connection, part, now_ms=now_ms)
            if not (look.ready or look.next_ms):
                continue
            going = [(ready, await self._resumed(ready, now_ms)) for ready in look.ready]
            async with resources.store.begin() as connection:
                await parking.put_off(connection, look.next_ms)
                for ready, (route, message) in going:
                    if await parking.take(connection, ready, now_ms=now_ms):
                        await resources.outbox.add(connection, route, message)
        resources.outbox.poke()

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
        now_ms = self._resources.clock.now_ms()
        arrivals = [
            arrival for delivery in deliveries if (arrival := await self._read(delivery.message))
        ]
        async with self._resources.store.begin() as connection:
            run_ids = await parking.park(connection, arrivals, now_ms=now_ms)
            await cancels.inherit(connection, [arrival.envelope for arrival in arrivals])
        await self.look(run_ids)
        self._sooner.set()
        for delivery in deliveries:
            await delivery.ack()

    async def _read(self, message: Message) -> Arrival | None:
        """Return what a worker has parked; what is none goes to the dead letters of its task."""
        try:
            envelope = self._envelope(message)
            parking.pending(envelope.memory)
        except EnvelopeError as error:
            task = message.type or "unknown"
            log.error("a run of %s cannot wait here: %s", task, error)
            now_ms = self._resources.clock.now_ms()
            record = AttemptError(1, "EnvelopeError", str(error), now_ms, "server")
            dead = bury_raw(message, Failed(error.reason, record), task=task, now_ms=now_ms)
            await self._resources.publish(self._names.dead_route(task), dead)
            return None
        return Arrival(envelope, pack_message(message))

    def _envelope(self, message: Message) -> Envelope:
        settings = self._resources.broker_settings
        return Envelope.read(
            message,
            task=message.type or "unknown",
            max_bytes=settings.max_payload_bytes,
            max_memory_bytes=settings.max_memory_bytes,
        )

    async def _resumed(self, ready: Ready, now_ms: int) -> tuple[Route, Message]:
        """Return the message by which a run goes on, with what came of its waits."""
        envelope = self._envelope(unpack_message(ready.blob))
        memory = envelope.memory
        room = int(self._resources.broker_settings.max_memory_bytes * ROOM) - memory.size
        for key, wait in ready.over.items():
            fitting = await self._fitting(wait, envelope.run_id, key, room)
            packed = fitting.pack()
            room -= len(packed)
            memory = memory.with_result(key, packed)
        again = envelope.again(
            attempt=envelope.attempt, now_ms=now_ms, memory=memory, wait=envelope.wait
        )
        # What it says of the time is for traces: it waited from when it was parked until now.
        again = replace(again, sent_ms=envelope.sent_ms, due_ms=now_ms)
        return self._names.resume_route(envelope.task), again.message()

    async def _fitting(self, wait: Wait, run_id: str, key: str, room: int) -> Wait:
        """Return a wait whose results fit into the run's memory, or are in the payload store."""
        got = wait.got if isinstance(wait.got, tuple) else ()
        if wait.failed:
            # It raises in the task, so nobody will see the others.
            return replace(wait, got=tuple(None if _has_value(one) else one for one in got))
        try:
            claim = await self._resources.claims.put(pack(plain_gots(got)))
        except PayloadError as error:
            log.warning("results for run %s do not get into the payload store: %s", run_id, error)
            claim = None
        if claim is not None:
            return replace(wait, got=claim)
        fitted: list[Got | None] = []
        for condition, one in zip(wait.conditions(run_id, key), got, strict=True):
            size = 0 if one is None else len(pack(one.plain()))
            if condition.kind == "run" and size > room:
                task = condition.target.subject
                fitted.append(Got("failed", Failing(condition.subject, task, "too_large")))
                continue
            room -= size
            fitted.append(one)
        return replace(wait, got=tuple(fitted))

    async def _watch(self) -> None:
        """Look at what is due, whenever something is."""
        resources, clock = self._resources, self._resources.clock
        while True:
            self._sooner.clear()
            async with resources.store.read() as connection:
                late = await parking.due(connection, clock.now_ms())
                next_ms = None if late else await parking.next_due(connection)
            if late:
                await self.look(late)
                continue
            await resources.wait_until(next_ms, self._sooner, poll=POLL)


def _has_value(got: Got | None) -> bool:
    return got is not None and got.kind == "value"
