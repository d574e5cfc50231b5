"""Triggers that come to a server over HTTP: it is a publisher like any other, or decides itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from brokertask.admission import Admission
from brokertask.envelope import Envelope
from brokertask.errors import (
    AccessDenied,
    PayloadTooLarge,
    PublishError,
    StoreUnavailable,
    Unroutable,
)
from brokertask.identity import checked_id, checked_tags, uuid7
from brokertask.server import admission, keys
from brokertask.server.redactor import kept
from brokertask.server.resources import Resources
from brokertask.server.runs import record, trigger_fact
from brokertask.telemetry import Telemetry
from brokertask.topology import IN_PLACE_MS, check_task_id
from brokertask.values import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for. Durations are seconds."""

    task: str
    payload: object
    delay: float = 0.0
    expires: float | None = None
    tags: Sequence[str] = ()
    run_id: str | None = None
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class Triggered:
    """What came of it."""

    run_id: str
    """The run that it stands for: with a key, perhaps one from before."""
    own: bool = True
    refused: str | None = None


async def trigger(resources: Resources, wish: Wish) -> Triggered:
    """Ask for a run; when this returns, it is on the broker's disk, or in the store's outbox.

    Raises:
        Unroutable: No queue is for that task.
        PublishError: It was not taken, or (`unknown`) perhaps was; `run_id` is set.
        PayloadError: The payload cannot be sent.
        InvalidOption: The id of the task or run, or the tags.
    """
    now_ms = resources.clock.now_ms()
    envelope = await prepared(resources, wish)
    if wish.admission is not None:
        return await _admit(resources, envelope, wish.admission, now_ms)
    await publish(resources, envelope)
    # A copy comes, too, but not before a delayed run is due, and not of a task that is new.
    fact = trigger_fact(envelope, kept(envelope), now_ms=now_ms)
    with suppress(StoreUnavailable):
        async with resources.store.begin() as connection:
            await record(connection, [fact])
    return Triggered(envelope.run_id)


async def prepared(resources: Resources, wish: Wish) -> Envelope:
    """Return the message of a run that is to begin; what is too large for it is stored already.

    Raises what `trigger` does, but for errors of publishing.
    """
    envelope = _envelope(resources, wish, resources.clock.now_ms())
    await _find_queue(resources, wish.task)
    envelope = envelope.claimed(await resources.claims.put(envelope.payload))
    trace = Telemetry(resources.names).trigger(wish.task, envelope.run_id)
    return replace(envelope, trace=trace)


async def publish(resources: Resources, envelope: Envelope) -> None:
    """Publish a trigger that begins now, or when it is due."""
    names = resources.names
    route, left = names.trigger_route(envelope.task), 0
    if envelope.due_ms is not None and envelope.sent_ms is not None:
        route, left = names.delay_route(envelope.task, envelope.due_ms - envelope.sent_ms)
    try:
        await resources.publish(route, replace(envelope, left_ms=left).message())
    except PublishError as error:
        error.run_id = envelope.run_id
        raise


async def _admit(
    resources: Resources, envelope: Envelope, asked: Admission, now_ms: int
) -> Triggered:
    request = keys.Request(envelope=envelope, admission=asked)
    async with resources.store.begin() as connection:
        decision = await keys.decide(connection, request, now_ms=now_ms)
        if decision.begins:
            await admission.send(resources, connection, [envelope], now_ms=now_ms)
        await admission.call_off(resources, connection, decision, now_ms=now_ms)
    resources.outbox.poke()
    own = decision.run_id == envelope.run_id
    return Triggered(decision.run_id, own, decision.refused)


async def _find_queue(resources: Resources, task: str) -> None:
    """Refuse a run that no queue is for: what is delayed or in the outbox would be lost."""
    with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
        if await resources.transport.depth(resources.names.queue(task)) is None:
            raise Unroutable(f"no queue on the broker is for task {task!r}: no worker declared it")


def _envelope(resources: Resources, wish: Wish, now_ms: int) -> Envelope:
    body = encode(wish.payload)
    limit = resources.broker_settings.max_payload_bytes
    if len(body) > limit and not resources.claims.takes(len(body)):
        raise PayloadTooLarge(f"the payload is {len(body)} bytes, the limit is {limit}")
    delay_ms = round(wish.delay * 1000)
    return Envelope(
        run_id=uuid7(now_ms) if wish.run_id is None else checked_id(wish.run_id),
        task=check_task_id(wish.task),
        payload=body,
        triggered_ms=now_ms,
        sent_ms=now_ms,
        due_ms=now_ms + delay_ms if delay_ms > IN_PLACE_MS else None,
        expires_ms=None if wish.expires is None else now_ms + round(wish.expires * 1000),
        tags=checked_tags(wish.tags),
        app_id="brokertask server",
    )
