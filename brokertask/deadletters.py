"""The dead-letter queues of a broker: looking into them, and acting on a frozen selection.

A selection is a set of held deliveries, so nobody else can act on the same runs meanwhile. What is
neither redriven nor discarded goes back to its queue when the selection is closed, or when this
process dies. Looking never drops a message: these queues have no delivery limit to reach.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, TypeVar

from brokertask.claims import Claims
from brokertask.clock import Clock, SystemClock
from brokertask.deadletter import DeadLetter, Filter
from brokertask.envelope import Message
from brokertask.errors import (
    BrokertaskError,
    EnvelopeError,
    InvalidOption,
    PublishError,
)
from brokertask.letterbox import Held, Letterbox
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.telemetry import attributes as keys
from brokertask.topology import Route
from brokertask.transport.base import Consumer, Transport

log = logging.getLogger("brokertask.deadletters")
T = TypeVar("T")

MAX_SEEN: Final = 50_000
"""How much of one queue a selection looks at; AMQP's prefetch ends at 65,535."""

Send: TypeAlias = Callable[[DeadLetter, Route, Message], Awaitable[None]]
"""Has the new start of a dead run published; when it returns, that will be, whatever happens."""
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
        claims: Claims,
        bodies: bool,
        send: Send | None,
    ) -> None:
        self._transport = transport
        self._settings, self._filters = settings, filters
        self._telemetry = telemetry
        self._clock = clock
        self._claims = claims
        self._bodies = bodies
        self._send = send or self._publish_now
        self._consumers: list[Consumer] = []
        self._held: list[Held] = []
        self._furthest: dict[Any, DeadLetter] = {}
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
        claims: Claims | None = None,
        bodies: bool = True,
        send: Send | None = None,
    ) -> AsyncIterator[Selection]:
        """Look at everything that is ready in the dead-letter queues of `tasks`, and hold it.

        Args:
            transport: An open one.
            settings: For names and the time-out of publishes.
            tasks: Whose queues.
            filters: Which runs; all by default.
            telemetry: Where triggers are recorded; by default in the global providers.
            clock: By default real time.
            claims: Takes a new payload that is too large for its message.
            bodies: False to look only: no payload is kept, and nothing can be acted on.
            send: How new starts are published; by default at once, and confirmed.

        Raises:
            BrokerUnavailable: The broker is gone, or a queue does not deliver what it holds.
        """
        selection = cls(
            transport,
            settings,
            filters or Filter(),
            telemetry=telemetry or Telemetry(settings.names),
            clock=clock or SystemClock(),
            claims=claims or Claims(),
            bodies=bodies,
            send=send,
        )
        try:
            for task in dict.fromkeys(tasks):
                await selection._look(task)
            selection._furthest = _furthest(selection._held)
            yield selection
        finally:
            consumers = selection._consumers
            await asyncio.gather(*(consumer.close() for consumer in consumers))

    @property
    def letters(self) -> list[DeadLetter]:
        """The dead runs, task by task, the first to die first."""
        return [held.letter for held in self._held]

    async def redrive(
        self,
        *,
        rate: float | None = None,
        payload: bytes | None = None,
        forget: bool = False,
    ) -> AsyncGenerator[Result, None]:
        """Put each run back to work: first attempt, behind its finished steps, a trace of its own.

        Each is on the broker's disk as a trigger before its dead letter is acked, so a crash
        between the two leaves it doubled, never lost. Of several dead letters of one run only the
        furthest is redriven. A failure concerns one run only. Cancelled, it finishes the one at
        hand and leaves the rest in place.

        Args:
            rate: So many a second at most.
            payload: In place of the payload of the one run selected, in msgpack. Its finished
                steps were of the old one, so they are forgotten.
            forget: Begin anew, without the steps that the runs have finished.

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
            yield await _surely(self._note(self._redrive(held, payload, forget)))
            if rate is not None:
                due_ms = max(due_ms, self._clock.now_ms() - 1000 / rate) + 1000 / rate

    async def discard(self, reason: str = "") -> AsyncGenerator[Result, None]:
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
        reader = Letterbox(
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

    async def _redrive(self, held: Held, payload: bytes | None, forget: bool) -> Result:
        letter, delivery = held.letter, held.delivery
        if delivery is None or not delivery.live:
            return _lapsed(letter)
        if (newest := self._furthest.get(letter.run, letter)) is not letter:
            return Result(letter, "failed", _older(letter, newest))
        try:
            await self._publish(letter, payload, forget)
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

    async def _publish(self, letter: DeadLetter, payload: bytes | None, forget: bool) -> None:
        """Publish the run's new start, confirmed."""
        now_ms = self._clock.now_ms()
        envelope = letter.redriven(trace={}, now_ms=now_ms, payload=payload, forget=forget)
        if payload is not None:
            envelope = envelope.claimed(await self._claims.put(payload))
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
            await self._send(letter, route, replace(envelope, trace=trace).message())

    async def _publish_now(self, letter: DeadLetter, route: Route, message: Message) -> None:
        timeout = self._settings.publish_timeout
        await self._transport.publish(route, message, timeout=timeout)

    async def _discard(self, held: Held, reason: str) -> Result:
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


def _lapsed(letter: DeadLetter) -> Result:
    return Result(
        letter,
        "lapsed",
        "it is no longer held: the connection was lost, or it was held longer than the broker's "
        "consumer timeout. It is in the dead-letter queue as before",
    )


def _older(letter: DeadLetter, newest: DeadLetter) -> str:
    return (
        f"a copy of the run from before: it is message {letter.seq} of it, and number {newest.seq} "
        "is dead as well. Discard it, or redrive it by itself"
    )


def _furthest(held: Iterable[Held]) -> dict[Any, DeadLetter]:
    """Return of each run the dead letter that is furthest: one that was doubled may die twice."""
    found: dict[Any, DeadLetter] = {}
    for letter in (one.letter for one in held):
        if letter.run is not None and letter.seq > found.setdefault(letter.run, letter).seq:
            found[letter.run] = letter
    return found


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
