"""From a delivery to its settlement: read, perform, settle. The way of every message in a worker.

execute ─ read ─────────────────────────────────────────────► Failed (no run at all)
    ├─ a message of a run that is in hands here: joins it, is stale, or takes its place
    └─ not due: Early · slot ─ too late: Expired · lost too often: Failed
                            └─ perform: Succeeded · Retrying · Sleeping · Failed · Interrupted
    settle: publish what follows, confirmed; tell the event; ack
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Final, TypeVar

from brokertask.attempt import CALLED_OFF_GRACE, Attempt, Key
from brokertask.clock import Clock
from brokertask.continuation import continuation, early_ms, expired
from brokertask.control import Standing
from brokertask.deadletter import bury_raw
from brokertask.envelope import Envelope, Message, run_id_of
from brokertask.errors import BrokertaskError, EnvelopeError, PublishError
from brokertask.events import Event, event_of, started_event
from brokertask.host import AttemptHost
from brokertask.keeper import Keeper
from brokertask.lease import Lease
from brokertask.outcome import (
    Early,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.performer import Performer
from brokertask.reports import Reports
from brokertask.settings import Settings
from brokertask.slots import Slots
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
        slots: Slots,
        keeper: Keeper,
        transport: Transport,
        settings: Settings,
        telemetry: Telemetry,
        clock: Clock,
        worker: str,
        standing: Standing,
        reports: Reports,
    ) -> None:
        self._standing = standing
        self._reports = reports
        self._performer = performer
        self._keeper = keeper
        self._transport = transport
        self._settings = settings
        self._names = settings.names
        self._timeout = settings.publish_timeout
        self._telemetry = telemetry
        self._clock = clock
        self._worker = worker
        self._slots = slots
        self._running: set[Attempt] = set()
        # Those of them that further messages of their run can join.
        self._attempts: dict[Key, Attempt] = {}
        # What ended while the broker had taken its message back; and what was acked, by its
        # sequence number, as an ack that is lost with its connection brings the message back, too.
        self._unsettled: OrderedDict[Key, tuple[Attempt, Outcome]] = OrderedDict()
        self._settled: OrderedDict[Key, int] = OrderedDict()
        self._interrupting = False
        self._draining = False

    async def execute(self, delivery: Delivery, task: Task[Any, Any]) -> None:
        """Do what `delivery` asks for, and settle it. Never raises for what a message holds."""
        attempt: Attempt | None = None
        try:
            attempt = self._read(delivery, task)
            await self._take(attempt)
        except Exception:
            # A defect of ours. Kept, the message would hold a slot for as long as we live; given
            # back, it is tried elsewhere, and in the end the broker buries it.
            log.critical("an execution failed inside brokertask", exc_info=True)
            await asyncio.sleep(DEFECT_PAUSE)
            for each in [delivery] if attempt is None else attempt.lease.deliveries:
                await each.requeue()

    async def _take(self, attempt: Attempt) -> None:
        task, (delivery, *_) = attempt.task, attempt.lease.deliveries
        if attempt.unread is not None:
            log.error("a message for %s is no run: %s", task.id, attempt.unread)
            record = self._performer.record(attempt, attempt.unread)
            self._telemetry.buried(task.id, attempt.unread.reason)
            await self.settle(attempt, Failed(attempt.unread.reason, record))
            return
        seq = attempt.envelope.seq
        if (delivery.redelivered or seq) and seq <= self._settled.get(attempt.key, -1):
            await self.settle(attempt, Repeated())
        elif (running := self._attempts.get(attempt.key)) is None:
            await self._execute(attempt)
        elif seq < running.envelope.seq:
            # What follows it is confirmed: this is a copy from before.
            await self.settle(attempt, Repeated())
        elif seq == running.envelope.seq and not running.early:
            # Ours already: the lease was lost, or the message doubled. One attempt serves both.
            running.lease.join(delivery)
        else:
            # It went on elsewhere while we had lost it, or is back before its hop was confirmed.
            running.supersede()
            await running.over.wait()
            await self._take(attempt)

    async def finish(self) -> None:
        """Let go of user code that nothing waits for any more."""
        await self._performer.finish()

    def drain(self) -> None:
        """Let no sleep keep its slot from now on."""
        self._draining = True
        for attempt in self._running:
            if attempt.context is not None:
                attempt.context.steps.drain()

    def call_off(self) -> None:
        """End every attempt whose run is cancelled."""
        for attempt in self._running:
            if not attempt.interrupted and self._standing.cancelled(attempt.envelope):
                attempt.interrupt("cancelled", grace=CALLED_OFF_GRACE)

    def interrupt(self) -> None:
        """Cancel every attempt that still runs; each is handed back, uncounted."""
        self._interrupting = True
        for attempt in self._running:
            attempt.interrupt()

    @property
    def resting(self) -> int:
        """How many runs only wait for time to pass."""
        contexts = [attempt.context for attempt in self._running]
        return sum(context is not None and context.steps.resting > 0 for context in contexts)

    async def keep(self) -> None:
        """Renew messages that are held for long, until cancelled."""
        await self._keeper.renew(lambda: list(self._running))

    def _read(self, delivery: Delivery, task: Task[Any, Any]) -> Attempt:
        message, since = delivery.message, asyncio.get_running_loop().time()
        try:
            envelope = Envelope.read(
                message,
                task=task.id,
                max_bytes=self._settings.max_payload_bytes,
                max_memory_bytes=self._settings.max_memory_bytes,
            )
        except EnvelopeError as error:
            unknown = Envelope(run_id=run_id_of(message, task.id), task=task.id, payload=b"")
            return Attempt(task, Lease(unknown, [delivery], since), unread=error)
        # A lost delivery was an attempt: whoever had it died with it, or lost the broker.
        before = self._names.died_inflight(message.headers)
        carried = self._transport.carries_losses
        lost = max(delivery.lost, before) if carried else delivery.lost + before
        if lost:
            envelope = replace(envelope, attempt=envelope.attempt + lost)
        return Attempt(task, Lease(envelope, [delivery], since), lost=lost)

    async def _execute(self, attempt: Attempt) -> None:
        self._running.add(attempt)
        if not attempt.envelope.id_derived:
            self._attempts[attempt.key] = attempt
        try:
            await self._end(attempt)
        finally:
            self._running.discard(attempt)
            if self._attempts.get(attempt.key) is attempt:
                del self._attempts[attempt.key]
            attempt.release()
            attempt.over.set()

    async def _end(self, attempt: Attempt) -> None:
        """Bring an attempt to its end, or one that ended before to its settlement."""
        before, outcome = self._unsettled.pop(attempt.key, (None, None))
        if before is None or outcome is None or before.envelope.seq < attempt.envelope.seq:
            outcome = await self._outcome(attempt)
        else:
            # The work was done while the broker had taken the message back: only settle it.
            before.lease.deliveries, attempt.lease = attempt.lease.deliveries, before.lease
            attempt = before
        settled = await self.settle(attempt, outcome)
        if isinstance(outcome, Early | Interrupted | Repeated):
            return  # Nothing was done, so there is nothing to remember.
        if not settled:
            log.warning(
                "run %s of %s ended, but the broker has taken its message back",
                attempt.envelope.run_id,
                attempt.task.id,
            )
            self._remember_unsettled(attempt, outcome)
        elif not attempt.envelope.id_derived:
            _keep(self._settled, attempt.key, max(attempt.envelope.seq, attempt.lease.seq))

    def _remember_unsettled(self, attempt: Attempt, outcome: Outcome) -> None:
        if attempt.envelope.id_derived:
            return  # Another message may only look the same.
        # For its settlement alone, so without what its code may still hold on to.
        attempt.lease.envelope = attempt.now
        attempt.release()
        size = len(attempt.envelope.payload) + attempt.envelope.memory.size
        size += len(outcome.result) if isinstance(outcome, Succeeded) else 0
        if size <= KEPT_BYTES:
            _keep(self._unsettled, attempt.key, (attempt, outcome))

    async def _outcome(self, attempt: Attempt) -> Outcome:
        off = self._standing.cancelled(attempt.envelope) is not None
        early = 0 if off else early_ms(attempt.envelope, self._clock.now_ms())
        if early > IN_PLACE_MS:
            attempt.early = True
            return Early(early / 1000)
        if early > 0:
            await self._clock.sleep(early / 1000)
        async with self._slots.one(attempt):
            # A delivery that was taken back while it waited for a slot comes again, to somebody.
            if attempt.superseded:
                return Repeated()
            if self._interrupting or not attempt.lease.live:
                return Interrupted()
            return await self._attempted(attempt)

    async def _attempted(self, attempt: Attempt) -> Outcome:
        """Return what an attempt in a slot comes to, with its span."""
        envelope, retry = attempt.envelope, attempt.task.options.retry
        now = self._clock.now_ms()
        with self._telemetry.attempt(
            envelope,
            lost=attempt.lost,
            max_attempts=retry.max_attempts,
            queue=self._names.queue(attempt.task.id),
            worker=self._worker,
            now_ms=now,
        ) as span:
            attempt.span = span
            outcome: Outcome
            if (order := self._standing.cancelled(envelope)) is not None:
                outcome = await self._performer.call_off(attempt, order.reason)
            elif expired(envelope, now):
                outcome = Expired()
            elif envelope.attempt > retry.max_attempts:
                outcome = await self._performer.give_up(attempt, "crashed", attempt.crashes())
            else:
                if self._reports.wanted:
                    self._reports.tell(started_event(envelope, at_ms=now, worker=self._worker))
                host = self._host(attempt)
                outcome = await self._performer.perform(attempt, host, hurry=self._draining)
                if host is not None:
                    await host.finish()
                order = self._standing.cancelled(envelope)
                if order is not None and not isinstance(outcome, Succeeded | Failed | Repeated):
                    # It goes on nowhere, however it left its code.
                    outcome = await self._performer.call_off(attempt, order.reason)
            span.end(outcome, at_ms=self._clock.now_ms())
            return outcome

    def _host(self, attempt: Attempt) -> AttemptHost | None:
        if not self._performer.shows_context(attempt.task):
            return None
        save, tell, reports = self._keeper.save, self._news, self._reports
        worker, clock = self._worker, self._clock
        return AttemptHost(attempt, save, tell, clock=clock, worker=worker, reports=reports)

    async def _news(self, attempt: Attempt, event: Event) -> None:
        """Publish an event in the middle of a run: only news, so one try will do."""
        route, message = self._event_route(attempt, event), event.message()
        try:
            await self._transport.publish(route, message, timeout=self._timeout, mandatory=False)
        except BrokertaskError as error:
            log.debug("%s of run %s is lost: %s", event.event, event.run_id, error)

    async def settle(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Tell the broker what an attempt came to. Every run ends its time in this worker here.

        Order: what follows is on the broker's disk before the delivery is acked. A crash between
        the two makes the message double, never lost. Returns False if the broker has taken every
        delivery back; called again with one that comes later, it goes on where it ended.
        """
        attempt.lease.end()
        async with attempt.lease.moving:
            if attempt.ended_ms is None:
                attempt.ended_ms = self._clock.now_ms()
                attempt.log(outcome)
            now = attempt.ended_ms
            if not attempt.followed:
                if not await self._publish_surely(attempt, outcome):
                    return False
                attempt.followed = True
            attempt.told = attempt.told or await self._tell(attempt, outcome, now)
            live = attempt.lease.live
            await attempt.lease.ack()
            return live

    def _follows(
        self, attempt: Attempt, outcome: Outcome, now: int
    ) -> tuple[Route, Message] | None:
        if isinstance(outcome, Succeeded):
            return None
        if attempt.unread is not None and isinstance(outcome, Failed):
            message, task = attempt.lease.deliveries[0].message, attempt.task.id
            return self._names.dead_route(task), bury_raw(message, outcome, task=task, now_ms=now)
        if isinstance(outcome, Retrying | Sleeping) and attempt.ended_ms is not None:
            left = outcome.delay - (now - attempt.ended_ms) / 1000
            outcome = replace(outcome, delay=max(0.0, left))
        return continuation(self._names, attempt.now, outcome, now_ms=now)

    async def _publish_surely(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Publish what follows until it is confirmed; False if the delivery was taken back instead.

        Until then the delivery stays ours: a broker in trouble gets no new work from us, and
        nothing is lost if we die here.
        """
        pause = 0.2
        while attempt.lease.live:
            # Anew each time: while a broker is away, a delay goes by.
            follows = self._follows(attempt, outcome, self._clock.now_ms())
            if follows is None:
                return True
            route, message = follows
            try:
                with self._telemetry.send(route, trace=attempt.now.trace):
                    await self._transport.publish(route, message, timeout=self._timeout)
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
        event = event_of(outcome, attempt.remembering, at_ms=now, worker=self._worker)
        if event is None:
            return True
        route = self._event_route(attempt, event)
        if attempt.envelope.reply_to is None and self._reports.take(route, event.message()):
            return True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        while attempt.lease.live:
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

    def _event_route(self, attempt: Attempt, event: Event) -> Route:
        reply_to = attempt.envelope.reply_to
        return self._names.event_route(event.event, event.task, reply_to=reply_to)


def _keep(kept: OrderedDict[Key, T], key: Key, value: T) -> None:
    kept[key] = value
    if len(kept) > KEPT:
        kept.popitem(last=False)
