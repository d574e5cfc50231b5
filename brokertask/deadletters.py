"""The dead-letter queues of a broker: looking into them, and acting on a frozen selection.

A selection is a set of held deliveries, so nobody else can act on the same runs meanwhile. What is
neither redriven nor discarded goes back to its queue when the selection is closed, or when this
process dies. Looking never drops a message: these queues have no delivery limit to reach.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, TypeVar

from brokertask.clock import Clock, SystemClock
from brokertask.deadletter import DeadLetter, Filter
from brokertask.errors import (
    BrokertaskError,
    BrokerUnavailable,
    EnvelopeError,
    InvalidOption,
    PublishError,
)
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.telemetry import attributes as keys
from brokertask.transport.base import Consumer, Delivery, Transport

log = logging.getLogger("brokertask.deadletters")
T = TypeVar("T")

MAX_SEEN: Final = 50_000
"""How much of one queue a selection looks at; AMQP's prefetch ends at 65,535."""
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""How much a selection keeps of one queue; what is behind it is for the next selection."""
QUIET: Final = 1.0
"""So long without an arrival, and the broker is asked whether there is more to come."""
MAX_QUIETS: Final = 30

Status: TypeAlias = Literal["redriven", "discarded", "failed", "unknown", "lapsed"]
"""What became of one dead run. `failed` and `lapsed`: it is where it was. `unknown`: it may be at
work and in the dead-letter queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of one dead-letter queue."""

    task: str
    ready: int
    """What it held for anybody when looking began."""
    seen: int
    elsewhere: int
    """How many of those went to another reader instead."""
    readers: int
    """Who else was reading it; what they held before is in none of these numbers."""

    @property
    def left(self) -> int:
        """How many were not looked at: they are behind the limit of a selection."""
        return max(0, self.ready - self.seen - self.elsewhere)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one dead run."""

    letter: DeadLetter
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Held:
    letter: DeadLetter
    delivery: Delivery | None


class Selection:
    """The dead runs of some tasks that a filter takes, held until this is closed.

    Attributes:
        looks: What was seen of each queue.
        missing: The tasks that have no dead-letter queue on this broker.
        results: What was done so far; complete also after a cancellation.
    """

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        filters: Filter,
        *,
        telemetry: Telemetry,
        clock: Clock,
        bodies: bool,
    ) -> None:
        self._transport = transport
        self._settings = settings
        self._filters = filters
        self._telemetry = telemetry
        self._clock = clock
        self._bodies = bodies
        self._consumers: list[Consumer] = []
        self._held: list[_Held] = []
        self.looks: list[Look] = []
        self.missing: list[str] = []
        self.results: list[Result] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        transport: Transport,
        settings: Settings,
        tasks: Iterable[str],
        filters: Filter | None = None,
        *,
        telemetry: Telemetry | None = None,
        clock: Clock | None = None,
        bodies: bool = True,
    ) -> AsyncIterator[Selection]:
        """Look at everything that is ready in the dead-letter queues of `tasks`, and hold it.

        Args:
            transport: An open one.
            settings: For names and the time-out of publishes.
            tasks: Whose queues.
            filters: Which runs; all by default.
            telemetry: Where triggers are recorded; by default in the global providers.
            clock: By default real time.
            bodies: False to look only: no payload is kept, and nothing can be acted on.

        Raises:
            BrokerUnavailable: The broker is gone, or a queue does not deliver what it holds.
        """
        selection = cls(
            transport,
            settings,
            filters or Filter(),
            telemetry=telemetry or Telemetry(settings.names),
            clock=clock or SystemClock(),
            bodies=bodies,
        )
        try:
            for task in dict.fromkeys(tasks):
                await selection._look(task)
            yield selection
        finally:
            consumers = selection._consumers
            await asyncio.gather(*(consumer.close() for consumer in consumers))

    @property
    def letters(self) -> list[DeadLetter]:
        """The dead runs, task by task, the first to die first."""
        return [held.letter for held in self._held]

    async def redrive(
        self, *, rate: float | None = None, payload: bytes | None = None
    ) -> AsyncIterator[Result]:
        """Put each run back to work: first attempt, no memory, a trace of its own.

        Each is on the broker's disk as a trigger before its dead letter is acked, so a crash
        between the two leaves it doubled, never lost. A failure concerns one run only. Cancelled,
        it finishes the one at hand and leaves the rest in place.

        Args:
            rate: So many a second at most.
            payload: In place of the payload of the one run selected, in msgpack.

        Raises:
            InvalidOption: A rate of 0 or less, or a payload for several runs.
        """
        if rate is not None and not rate > 0:
            raise InvalidOption(f"a rate is more than 0 a second, not {rate:g}")
        if payload is not None and len(self._held) != 1:
            raise InvalidOption(
                f"a new payload is for exactly one run; {len(self._held)} are selected"
            )
        due_ms = float(self._clock.now_ms())
        for held in list(self._held):
            early_ms = due_ms - self._clock.now_ms()
            if early_ms > 0:
                await self._clock.sleep(early_ms / 1000)
            yield await _surely(self._note(self._redrive(held, payload)))
            if rate is not None:
                due_ms = max(due_ms, self._clock.now_ms() - 1000 / rate) + 1000 / rate

    async def discard(self, reason: str = "") -> AsyncIterator[Result]:
        """Delete each run for good, and log that it was and why."""
        for held in list(self._held):
            yield await _surely(self._note(self._discard(held, reason)))

    async def _look(self, task: str) -> None:
        queue = self._settings.names.dead_queue(task)
        depth = await self._transport.depth(queue)
        if depth is None:
            self.missing.append(task)
            return
        wanted = min(depth.ready, MAX_SEEN)
        limit = self._filters.limit
        room = wanted if limit is None else limit - len(self._held)
        now = self._clock.now_ms()
        reader = _Reader(
            task, wanted, room, lambda letter: self._filters.takes(letter, now), bodies=self._bodies
        )
        elsewhere = 0
        if wanted and room:
            prefetch = min(wanted, room) if self._filters.takes_all else wanted
            consumer = await self._transport.consume(queue, reader.receive, prefetch=prefetch)
            self._consumers.append(consumer)
            if not await reader.fill(self._transport, queue):
                elsewhere = max(0, wanted - reader.seen)
            if reader.seen + elsewhere < depth.ready:
                # Else each ack would make room for one more, which came back behind the others.
                # Where nothing is left, a consumer that stays tells other readers of this one.
                await consumer.stop()
        self._held += sorted(reader.held, key=lambda held: held.letter.died_ms or 0)
        self.looks.append(
            Look(
                task=task,
                ready=depth.ready,
                seen=reader.seen,
                elsewhere=elsewhere,
                readers=depth.consumers,
            )
        )

    async def _note(self, work: Coroutine[Any, Any, Result]) -> Result:
        result = await work
        self.results.append(result)
        return result

    async def _redrive(self, held: _Held, payload: bytes | None) -> Result:
        letter, delivery = held.letter, held.delivery
        if delivery is None or not delivery.live:
            return _lapsed(letter)
        try:
            await self._publish(letter, payload)
        except EnvelopeError as error:
            return Result(letter, "failed", f"{error}; redrive it with another payload")
        except BrokertaskError as error:
            unknown = isinstance(error, PublishError) and error.unknown
            return Result(letter, "unknown" if unknown else "failed", str(error))
        if not delivery.live:
            return Result(
                letter,
                "unknown",
                "it is at work again, but the connection was lost before its dead letter could be "
                "removed: discard that",
            )
        await delivery.ack()
        self._telemetry.triggered(letter.task)
        return Result(letter, "redriven")

    async def _publish(self, letter: DeadLetter, payload: bytes | None) -> None:
        """Publish the run's clean start, confirmed."""
        envelope = letter.redriven(trace={}, now_ms=self._clock.now_ms(), payload=payload)
        links = [(envelope.origin, {keys.LINK: keys.ORIGIN})] if envelope.origin else []
        trace = self._telemetry.trigger(
            letter.task,
            letter.run_id,
            parent_run=envelope.parent,
            links=links,
            detach=True,
            attributes={keys.REDRIVES: envelope.redrives},
        )
        route = self._settings.names.trigger_route(letter.task)
        with self._telemetry.send(route, trace=trace):
            await self._transport.publish(
                route,
                replace(envelope, trace=trace).message(),
                timeout=self._settings.publish_timeout,
            )

    async def _discard(self, held: _Held, reason: str) -> Result:
        letter, delivery = held.letter, held.delivery
        if delivery is None or not delivery.live:
            return _lapsed(letter)
        await delivery.ack()
        log.info(
            "discarded run %r of %s, dead by %r: %r",
            letter.run_id,
            letter.task,
            letter.reason,
            reason or "no reason given",
        )
        return Result(letter, "discarded", reason)


class _Reader:
    """Takes in one queue until all that was ready was seen, or enough was found."""

    def __init__(
        self,
        task: str,
        ready: int,
        room: int,
        takes: Callable[[DeadLetter], bool],
        *,
        bodies: bool,
    ) -> None:
        self.seen = 0
        self.held: list[_Held] = []
        self._task = task
        self._ready = ready
        self._room = room
        self._takes = takes
        self._bodies = bodies
        self._bytes = 0
        self._first: Delivery | None = None
        self._frozen = False
        self._arrived = asyncio.Event()

    def receive(self, delivery: Delivery) -> None:
        """Look at one delivery. Those not kept stay with the broker's books until the close."""
        if self._frozen or self._enough:
            return
        if self._first is None or not self._first.live:
            # The connection was lost meanwhile: everything is delivered again, from the start.
            self._first, self.seen, self._bytes = delivery, 0, 0
            self.held.clear()
        self.seen += 1
        letter = DeadLetter.read(delivery.message, task=self._task)
        if self._takes(letter):
            if self._bodies:
                self._bytes += len(delivery.message.body)
                self.held.append(_Held(letter, delivery))
            else:
                self.held.append(_Held(_brief(letter), None))
        self._arrived.set()

    async def fill(self, transport: Transport, queue: str) -> bool:
        """Return once there is enough; False if another reader has some of it."""
        quiets = 0
        while not self._enough:
            self._arrived.clear()
            try:
                async with asyncio.timeout(QUIET):
                    await self._arrived.wait()
                quiets = 0
            except TimeoutError:
                depth = await transport.depth(queue)
                if depth is None or depth.ready == 0:
                    break
                quiets += 1
                if quiets == MAX_QUIETS:
                    raise BrokerUnavailable(
                        f"queue {queue!r} says it holds {depth.ready} more and delivers none; "
                        "has it lost its leader?"
                    ) from None
        complete = self._enough
        self._frozen = True
        return complete

    @property
    def _enough(self) -> bool:
        return (
            self.seen >= self._ready
            or len(self.held) >= self._room
            or self._bytes >= MAX_HELD_BYTES
        )


def _brief(letter: DeadLetter) -> DeadLetter:
    """Return what a list shows of it."""
    last = letter.error
    errors = (replace(last, traceback=""),) if last else ()
    return replace(letter, payload=b"", envelope=None, errors=errors)


def _lapsed(letter: DeadLetter) -> Result:
    return Result(
        letter,
        "lapsed",
        "it is no longer held: the connection was lost, or it was held longer than the broker's "
        "consumer timeout. It is in the dead-letter queue as before",
    )


async def _surely(work: Coroutine[Any, Any, T]) -> T:
    """Finish `work` before a cancellation takes effect.

    One between the confirm and the ack would leave a run both at work and dead.
    """
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise
