"""From a delivery to its settlement: read, perform, settle. The way of every message in a worker.

execute ─ read ─────────────────────────────────────────────► Failed (no run at all)
    ├─ a double of an attempt that runs here: joins it, and is settled with it
    └─ not due: Sleeping · slot ─ too late: Expired · lost too often: Failed
                               └─ perform: Succeeded · Retrying · Failed · Interrupted
    settle: publish what follows, confirmed; tell the event; ack
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar, assert_never

from brokertask.attempt import Attempt, Key, Performer
from brokertask.clock import Clock
from brokertask.deadletter import bury, bury_raw
from brokertask.durations import readable
from brokertask.envelope import Envelope, Message, derived_id
from brokertask.errors import EnvelopeError, PublishError
from brokertask.events import event_of
from brokertask.outcome import (
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.settings import Settings
from brokertask.task import Task
from brokertask.telemetry import Telemetry
from brokertask.topology import IN_PLACE_MS, Route
from brokertask.transport.base import Delivery, Transport

log = logging.getLogger("brokertask.worker")
T = TypeVar("T")

SETTLE_BACKOFF_MAX: Final = 10.0
DEFECT_PAUSE: Final = 1.0
KEPT: Final = 1_000
"""How many ended attempts are remembered for messages that the broker delivers once more."""
KEPT_BYTES: Final = 65_536
"""The largest of them that are kept; a larger run is repeated if its message comes here again."""


class Executor:
    """Executes the deliveries of one worker process."""

    def __init__(
        self,
        *,
        performer: Performer,
        concurrency: Mapping[str, int],
        transport: Transport,
        settings: Settings,
        telemetry: Telemetry,
        clock: Clock,
        worker: str,
    ) -> None:
        self._performer = performer
        self._transport = transport
        self._settings = settings
        self._names = settings.names
        self._telemetry = telemetry
        self._clock = clock
        self._worker = worker
        self._slots = {task: asyncio.Semaphore(count) for task, count in concurrency.items()}
        self._running: set[Attempt] = set()
        # Those of them that a second delivery of their message can join.
        self._attempts: dict[Key, Attempt] = {}
        # What ended while the broker had taken its message back; and what was acked, as an ack
        # that is lost with its connection brings the message back, too.
        self._unsettled: OrderedDict[Key, tuple[Attempt, Outcome]] = OrderedDict()
        self._settled: OrderedDict[Key, None] = OrderedDict()
        self._interrupting = False

    async def execute(self, delivery: Delivery, task: Task[Any, Any]) -> None:
        """Do what `delivery` asks for, and settle it. Never raises for what a message holds."""
        deliveries = [delivery]
        try:
            attempt = self._read(delivery, task)
            deliveries = attempt.deliveries
            await self._take(attempt)
        except Exception:
            # A defect of ours. Kept, the message would hold a slot for as long as we live; given
            # back, it is tried elsewhere, and in the end the broker buries it.
            log.critical("an execution failed inside brokertask", exc_info=True)
            await asyncio.sleep(DEFECT_PAUSE)
            for each in deliveries:
                await each.requeue()

    async def _take(self, attempt: Attempt) -> None:
        task, (delivery, *_) = attempt.task, attempt.deliveries
        if attempt.unread is not None:
            log.error("a message for %s is no run: %s", task.id, attempt.unread)
            record = self._performer.record(attempt, attempt.unread)
            self._telemetry.buried(task.id, attempt.unread.reason)
            await self.settle(attempt, Failed(attempt.unread.reason, record))
        elif delivery.redelivered and attempt.key in self._settled:
            await self.settle(attempt, Repeated())
        elif (running := self._attempts.get(attempt.key)) is not None:
            # Ours already: the lease was lost, or the message doubled. One attempt serves both.
            running.deliveries.append(delivery)
        else:
            await self._execute(attempt)

    async def finish(self) -> None:
        """Let go of user code that nothing waits for any more."""
        await self._performer.finish()

    def interrupt(self) -> None:
        """Cancel every attempt that still runs; each is handed back, uncounted."""
        self._interrupting = True
        for attempt in self._running:
            attempt.interrupt()

    def _read(self, delivery: Delivery, task: Task[Any, Any]) -> Attempt:
        message = delivery.message
        try:
            envelope = Envelope.read(
                message, task=task.id, max_bytes=self._settings.max_payload_bytes
            )
        except EnvelopeError as error:
            run_id = message.message_id or derived_id(message, task.id)
            envelope = Envelope(run_id=run_id, task=task.id, payload=b"")
            return Attempt(task, envelope, [delivery], unread=error)
        # A lost delivery was an attempt: whoever had it died with it, or lost the broker.
        envelope = replace(envelope, attempt=envelope.attempt + delivery.lost)
        return Attempt(task, envelope, [delivery], lost=delivery.lost)

    async def _execute(self, attempt: Attempt) -> None:
        self._running.add(attempt)
        if not attempt.envelope.id_derived:
            self._attempts[attempt.key] = attempt
        try:
            await self._end(attempt)
        finally:
            self._running.discard(attempt)
            self._attempts.pop(attempt.key, None)

    async def _end(self, attempt: Attempt) -> None:
        """Bring an attempt to its end, or one that ended before to its settlement."""
        before = self._unsettled.pop(attempt.key, None)
        if before is None:
            outcome = await self._outcome(attempt)
        else:
            # The work was done while the broker had taken the message back: only settle it.
            before[0].deliveries = attempt.deliveries
            attempt, outcome = before
        settled = await self.settle(attempt, outcome)
        if isinstance(outcome, Sleeping | Interrupted):
            return  # Nothing was done, so there is nothing to remember.
        if not settled:
            log.warning(
                "run %s of %s ended, but the broker has taken its message back",
                attempt.envelope.run_id,
                attempt.task.id,
            )
            # For its settlement alone, so without what its code may still hold on to.
            attempt.user = attempt.context = attempt.left = None
            size = len(attempt.envelope.payload)
            size += len(outcome.result) if isinstance(outcome, Succeeded) else 0
            if size <= KEPT_BYTES:
                _keep(self._unsettled, attempt.key, (attempt, outcome))
        elif not attempt.envelope.id_derived:
            _keep(self._settled, attempt.key, None)

    async def _outcome(self, attempt: Attempt) -> Outcome:
        envelope = attempt.envelope
        if (early := _early_ms(envelope, self._clock.now_ms())) > IN_PLACE_MS:
            return Sleeping(early / 1000)
        if early > 0:
            await self._clock.sleep(early / 1000)
        async with self._slots[attempt.task.id]:
            # A delivery that was taken back while it waited for a slot comes again, to somebody.
            if self._interrupting or not attempt.live:
                return Interrupted()
            self._telemetry.active(attempt.task.id, 1)
            try:
                return await self._attempted(attempt)
            finally:
                self._telemetry.active(attempt.task.id, -1)

    async def _attempted(self, attempt: Attempt) -> Outcome:
        """Return what an attempt in a slot comes to, with its span."""
        envelope, retry = attempt.envelope, attempt.task.options.retry
        now = self._clock.now_ms()
        with self._telemetry.attempt(
            replace(envelope, attempt=envelope.attempt - attempt.lost),
            attempt=envelope.attempt,
            max_attempts=retry.max_attempts,
            queue=self._names.queue(attempt.task.id),
            worker=self._worker,
            now_ms=now,
        ) as span:
            attempt.traceparent = span.traceparent
            outcome: Outcome
            if _expired(envelope, now):
                outcome = Expired()
            elif envelope.attempt > retry.max_attempts:
                outcome = await self._performer.give_up(attempt, "crashed", _crashed(envelope))
            else:
                outcome = await self._performer.perform(attempt, span)
            span.end(outcome, at_ms=self._clock.now_ms())
            return outcome

    async def settle(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Tell the broker what an attempt came to. Nothing else in brokertask acks a delivery.

        Order: what follows is on the broker's disk before the delivery is acked. A crash between
        the two makes the message double, never lost. Returns False if the broker has taken every
        delivery back; called again with one that comes later, it goes on where it ended.
        """
        now = self._clock.now_ms()
        if not attempt.followed:
            _log(attempt, outcome)
            follows = self._follows(attempt, outcome, now)
            if follows is not None and not await self._publish_surely(attempt, *follows):
                return False
            attempt.followed = True
        attempt.told = attempt.told or await self._tell(attempt, outcome, now)
        live = attempt.live
        for delivery in attempt.deliveries:
            await delivery.ack()
        return live

    def _follows(
        self, attempt: Attempt, outcome: Outcome, now: int
    ) -> tuple[Route, Message] | None:
        """Return what is published in place of the message that `outcome` settles, and where to."""
        envelope = attempt.envelope
        match outcome:
            case Succeeded() | Expired() | Repeated():
                return None
            case Retrying(delay=delay, error=error):
                memory = envelope.memory.with_error(error)
                again = envelope.again(attempt=envelope.attempt + 1, now_ms=now, memory=memory)
                again = replace(again, previous=attempt.traceparent)
                return self._delayed(again, round(delay * 1000), now + round(delay * 1000))
            case Sleeping(delay=delay):
                return self._delayed(envelope, round(delay * 1000), envelope.due_ms)
            case Failed():
                return self._names.dead_route(attempt.task.id), _dead(attempt, outcome, now)
            case Interrupted():
                back = envelope.again(attempt=envelope.attempt, now_ms=now)
                return self._names.resume_route(attempt.task.id), back.message()
            case _ as unreachable:
                assert_never(unreachable)

    def _delayed(
        self, envelope: Envelope, delay_ms: int, due_ms: int | None
    ) -> tuple[Route, Message]:
        """Return route and message for the delay ladder."""
        if delay_ms <= IN_PLACE_MS:
            return self._names.resume_route(envelope.task), envelope.message()
        route, left = self._names.delay_route(envelope.task, delay_ms)
        return route, replace(envelope, due_ms=due_ms, left_ms=left).message()

    async def _publish_surely(self, attempt: Attempt, route: Route, message: Message) -> bool:
        """Publish until it is confirmed; False if the delivery was taken back instead.

        Until then the delivery stays ours: a broker in trouble gets no new work from us, and
        nothing is lost if we die here.
        """
        pause = 0.2
        while attempt.live:
            try:
                with self._telemetry.send(route, trace=attempt.envelope.trace):
                    await self._transport.publish(
                        route, message, timeout=self._settings.publish_timeout
                    )
            except PublishError as error:
                self._telemetry.publish_failed(type(error).__name__)
                log.warning("run %s cannot be settled yet: %s", attempt.envelope.run_id, error)
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(SETTLE_BACKOFF_MAX, pause * 2)
            else:
                return True
        return False

    async def _tell(self, attempt: Attempt, outcome: Outcome, now: int) -> bool:
        """Publish the event of an outcome; False if it is left to who gets the message again.

        Tries for the time of one publish: whoever listens must not hold up the run.
        """
        event = event_of(outcome, attempt.envelope, at_ms=now, worker=self._worker)
        if event is None:
            return True
        reply_to = attempt.envelope.reply_to
        route = self._names.event_route(event.event, event.task, reply_to=reply_to)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.publish_timeout
        while attempt.live:
            try:
                await self._transport.publish(
                    route, event.message(), timeout=deadline - loop.time(), mandatory=False
                )
            except PublishError as error:
                self._telemetry.publish_failed(type(error).__name__)
                pause = random.uniform(0.1, 0.3)
                if loop.time() + pause > deadline:
                    log.warning("event %s of run %s is lost: %s", event.event, event.run_id, error)
                    return True
                await asyncio.sleep(pause)
            else:
                return True
        return False


def _keep(kept: OrderedDict[Key, T], key: Key, value: T) -> None:
    kept[key] = value
    if len(kept) > KEPT:
        kept.popitem(last=False)


def _log(attempt: Attempt, outcome: Outcome) -> None:
    """Say what went wrong, by class: what an error says may hold anything."""
    run_id, task = attempt.envelope.run_id, attempt.task.id
    match outcome:
        case Retrying(delay=delay, error=error):
            log.warning(
                "attempt %d of %s failed: %s; again in %s; run %s",
                *(error.attempt, task, error.type, readable(delay), run_id),
            )
        case Failed(reason=reason, error=error):
            log.error(
                "a run of %s is dead (%s): %s; see: brokertask dead show %s --task %s",
                *(task, reason, error.type, run_id, task),
            )
        case _:
            log.debug("run %s of %s: %s", run_id, task, type(outcome).__name__.lower())


def _dead(attempt: Attempt, failed: Failed, now: int) -> Message:
    if attempt.unread is not None:
        message = attempt.deliveries[0].message
        return bury_raw(message, failed, task=attempt.task.id, now_ms=now)
    return bury(replace(attempt.envelope, previous=attempt.traceparent), failed, now_ms=now)


def _early_ms(envelope: Envelope, now: int) -> int:
    """Return how many ms too early a delayed message is.

    What was left when it was sent bounds it, so that a publisher whose clock is wrong delays no
    longer than it asked for.
    """
    return 0 if envelope.due_ms is None else min(envelope.left_ms, envelope.due_ms - now)


def _expired(envelope: Envelope, now: int) -> bool:
    """Whether it comes too late to start; a run that is retried was started in time."""
    return envelope.expires_ms is not None and now > envelope.expires_ms and envelope.attempt == 1


def _crashed(envelope: Envelope) -> Exception:
    return ConnectionAbortedError(
        f"{envelope.attempt - 1} attempt(s) and no end: the last worker died, was killed, "
        "ran out of memory, or lost the broker"
    )
