"""The part of a server that decides on triggers with keys, and answers to their callers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.admission import Admission, Answer
from brokertask.control import Entry
from brokertask.deadletter import bury_raw
from brokertask.envelope import Envelope
from brokertask.errors import EnvelopeError, InvalidOption, PublishError
from brokertask.outcome import AttemptError, Failed
from brokertask.server import keys
from brokertask.server.batches import Batches
from brokertask.server.keys import Decision, Request
from brokertask.server.redactor import kept
from brokertask.server.resources import Resources
from brokertask.server.runs import record, trigger_fact
from brokertask.topology import Route, check_task_id
from brokertask.transport.base import Delivery

log = logging.getLogger("brokertask.server")

BATCH: Final = 100
POLL: Final = 1.0
"""Seconds after which a server looks for debounces that another one has taken in."""
FORGET_EVERY_MS: Final = 60_000


class Admissions:
    """Decides on triggers; one of several servers' parts that may do so at once."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._names = resources.names
        self._sooner = asyncio.Event()

    async def run(self) -> None:
        """Take in what callers ask for, and watch the time, until cancelled."""
        queue = f"{self._names.server}.admissions"
        async with (
            Batches(self._resources.transport, queue, BATCH) as batches,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._watch())
            async for deliveries in batches:
                await self._take(deliveries)

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
        """Decide, commit, answer, ack. A crash before the ack repeats all of it to no effect."""
        resources, now_ms = self._resources, self._resources.clock.now_ms()
        asked = [
            (delivery, request)
            for delivery in deliveries
            if (request := await self._read(delivery)) is not None
        ]
        # Everybody in the same order: two servers never wait for each other's rows.
        asked.sort(key=lambda each: each[1].place)
        answers: list[tuple[Delivery, Answer]] = []
        begun: list[Envelope] = []
        async with resources.store.begin() as connection:
            for delivery, request in asked:
                decision = await keys.decide(connection, request, now_ms=now_ms)
                if decision.begins:
                    begun.append(request.envelope)
                await call_off(resources, connection, decision, now_ms=now_ms)
                answers.append((delivery, _answer(decision)))
            # After all decisions: what it writes to, other servers may be at, too.
            await send(resources, connection, begun, now_ms=now_ms)
        resources.outbox.poke()
        self._sooner.set()
        await asyncio.gather(*(self._tell(delivery, answer) for delivery, answer in answers))
        for delivery in deliveries:
            await delivery.ack()

    async def _tell(self, delivery: Delivery, answer: Answer) -> None:
        asked = delivery.message
        if asked.reply_to:
            route = Route(self._names.events, asked.reply_to)
            # A caller that has gone hears nothing; one that hears nothing asks again.
            with suppress(PublishError):
                told = answer.message(asked.correlation_id)
                await self._resources.publish(route, told, mandatory=False)

    async def _read(self, delivery: Delivery) -> Request | None:
        """Return what is asked for; what cannot be understood goes to the dead letters."""
        message, resources = delivery.message, self._resources
        task = message.type or "unknown"
        try:
            envelope = Envelope.read(
                message, task=task, max_bytes=resources.broker_settings.max_payload_bytes
            )
            return Request(
                envelope=replace(envelope, task=check_task_id(task)),
                admission=Admission.read(message.headers),
                redelivered=delivery.redelivered,
            )
        except (EnvelopeError, InvalidOption) as error:
            log.error("no server can decide on a trigger of %r: %s", task, error)
            now_ms = resources.clock.now_ms()
            reason = error.reason if isinstance(error, EnvelopeError) else "undecodable"
            record = AttemptError(1, type(error).__name__, str(error), now_ms, "server")
            dead = bury_raw(message, Failed(reason, record), task=task, now_ms=now_ms)
            await resources.publish(self._names.dead_route(task), dead)
            return None

    async def _watch(self) -> None:
        """Let debounced runs begin when they are due, and forget keys whose time is over."""
        resources, clock = self._resources, self._resources.clock
        forget_ms = 0
        while True:
            self._sooner.clear()
            now_ms = clock.now_ms()
            async with resources.store.begin() as connection:
                due = await keys.take_due(connection, now_ms=now_ms)
                begun = [
                    Envelope.read(message, task=message.type or "", max_bytes=len(message.body))
                    for message in due
                ]
                await send(resources, connection, begun, now_ms=now_ms)
                if now_ms >= forget_ms:
                    await keys.forget_expired(connection, now_ms=now_ms)
                    forget_ms = now_ms + FORGET_EVERY_MS
                next_ms = await keys.next_due(connection)
            if due:
                resources.outbox.poke()
            else:
                await resources.wait_until(next_ms, self._sooner, poll=POLL)


async def call_off(
    resources: Resources, connection: AsyncConnection, decision: Decision, *, now_ms: int
) -> None:
    """Have the run cancelled, when the transaction is committed, that another one replaces."""
    if decision.replaces is None:
        return
    reason = f"replaced by run {decision.run_id}"
    entry = Entry(kind="cancel", subject=decision.replaces, at_ms=now_ms, reason=reason)
    await resources.outbox.add(connection, resources.names.control_route(), entry.message())


async def send(
    resources: Resources,
    connection: AsyncConnection,
    envelopes: Sequence[Envelope],
    *,
    now_ms: int,
) -> None:
    """Have runs triggered when the transaction is committed, or when they are due.

    Their history begins with it: a copy of a delayed trigger comes only when it is due.
    """
    names = resources.names
    sent = [replace(envelope, sent_ms=now_ms) for envelope in envelopes]
    for envelope in sent:
        route, left = names.trigger_route(envelope.task), 0
        if envelope.due_ms is not None and envelope.due_ms > now_ms:
            route, left = names.delay_route(envelope.task, envelope.due_ms - now_ms)
        message = replace(envelope, left_ms=left).message()
        await resources.outbox.add(connection, route, message)
    facts = [trigger_fact(envelope, kept(envelope), now_ms=now_ms) for envelope in sent]
    await record(connection, facts)


def _answer(decision: Decision) -> Answer:
    return Answer(decision.run_id, decision.refused)
