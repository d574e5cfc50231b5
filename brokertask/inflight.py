"""The inflight queue of a worker: where the latest messages of its runs are while it has them.

    step done ─► bt.inflight ─► bt.inflight.<worker> ─► the same worker: acks what it held before
                                     │ its process dies: requeued, expired at once
                                     └─► bt.resume ─► bt.q.<task>, with every finished step

So the lease on a run moves to a newer message: with what the run has finished since, and with a
new consumer timeout. A crash before the confirm leaves the old message, one after it the new one,
one between confirm and ack both; the old one has a lower sequence number.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

from brokertask.envelope import Envelope, Message
from brokertask.errors import BrokertaskError, PublishUnknown
from brokertask.lease import Lease
from brokertask.topology import Names, inflight
from brokertask.transport.base import Consumer, Delivery, Receive, Transport
from brokertask.window import Window

log = logging.getLogger("brokertask.worker")

ARRIVAL: Final = 10.0
"""Seconds after its confirm within which a message has come back to us, unless it is elsewhere."""
ARRIVAL_USUAL: Final = 0.5
PATIENCE: Final = 15
"""Seconds with a connection in which a lost delivery has come back, unless it is elsewhere: what
a dying node was moving between two queues is moved again after ten."""
SILENCE: Final = 0.9
"""After a publish that had no answer for this part of its time-out, a new queue is made: one may
come back from a dead broker without a leader. A lost connection is told sooner."""
LOOK: Final = 0.1
"""Seconds between two looks at the connection; a broker takes longer to come back."""
BACKOFF_MAX: Final = 10.0


@dataclass(slots=True)
class _Arrival:
    """What came of one checkpoint: its message, again each time a connection was lost."""

    deliveries: list[Delivery] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def live(self) -> bool:
        return any(delivery.live for delivery in self.deliveries)


class Inflight:
    """One worker's queue, made when it is first needed: plain short runs never need it.

    Who expects to need it has it made early: nothing is put into it before it would survive a
    crash of the broker, see `Transport.settling`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        names: Names,
        worker: str,
        timeout: float,
        receive: Receive,
    ) -> None:
        self._transport = transport
        self._names = names
        self._worker = worker
        self._timeout = timeout
        self._receive = receive
        self._opening = asyncio.Lock()
        self._made = 0
        self._queue: str | None = None
        self._queues: list[str] = []
        self._consumers: list[Consumer] = []
        self._tokens = count(1)
        self._awaited: dict[str, _Arrival] = {}
        self._held: set[Delivery] = set()

    def adopt(self, delivery: Delivery) -> bool:
        """Take a delivery, from whichever queue, if it is of a checkpoint that is on its way."""
        arrival = self._awaited.get(delivery.message.correlation_id or "")
        if arrival is None:
            return False
        arrival.deliveries.append(delivery)
        arrival.came.set()
        return True

    async def move(self, lease: Lease, following: Envelope, *, window: Window) -> bool:
        """Replace a run's message by the one that follows it; the caller holds `lease.moving`.

        When it returns True, `following` is on the broker's disk and what was held is acked.
        False: the message is not here any more, and has not come back; or the lease is ending.

        Args:
            lease: What is held.
            following: The same run, one further.
            window: Of its task: the broker is about to have room for another delivery.
        """
        token = f"{self._worker}/{next(self._tokens)}"
        message = replace(following.message(), correlation_id=token)
        lease.seq = following.seq
        arrival = self._awaited[token] = _Arrival()
        try:
            if not await self._publish_surely(lease, message, arrival, window):
                return False
            # From here on, copies of the message before are stale.
            lease.envelope = following
            await self._swap(lease, arrival, window)
        finally:
            del self._awaited[token]
        return True

    async def _publish_surely(
        self, lease: Lease, message: Message, arrival: _Arrival, window: Window
    ) -> bool:
        """Publish until it is confirmed, or has come; False if the run is not ours meanwhile."""
        pause, loop = 0.2, asyncio.get_running_loop()
        while await self._until_live(lease, arrival, window):
            if arrival.live:
                return True
            queue, begun = None, loop.time()
            try:
                queue = await self._open()
                route = self._names.inflight_route(lease.envelope.task, queue)
                await self._transport.publish(route, message, timeout=self._timeout)
            except BrokertaskError as error:
                silent = loop.time() - begun >= self._timeout * SILENCE
                if isinstance(error, PublishUnknown) and silent and self._queue == queue:
                    self._queue = None
                log.warning("run %s cannot be checkpointed yet: %s", message.message_id, error)
                if lease.ending:
                    return False
            else:
                return True
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(BACKOFF_MAX, pause * 2)
        return False

    async def _swap(self, lease: Lease, arrival: _Arrival, window: Window) -> None:
        """Hold the new message once it has come, and ack the old one."""
        if not await _came(arrival, ARRIVAL_USUAL):
            # It was lost on its way and comes to the task's queue; there must be room for it.
            with window.expecting():
                await _came(arrival, ARRIVAL)
        if not arrival.deliveries:
            # It is in the task's queue by now, or on its way there. Here it would be known; in
            # another worker the run goes on twice, as after any connection that is lost then.
            log.warning("a checkpoint of run %s has not come back", lease.envelope.run_id)
            return
        before = [delivery for delivery in lease.deliveries if _seq(delivery) < lease.envelope.seq]
        # What has joined since the confirm is of the new message, too.
        arrival.deliveries += [delivery for delivery in lease.deliveries if delivery not in before]
        lease.deliveries = arrival.deliveries
        lease.since = asyncio.get_running_loop().time()
        if any(delivery.queue not in self._queues for delivery in before):
            await window.limit()
        for delivery in before:
            await delivery.ack()
            self._held.discard(delivery)

    async def _until_live(self, lease: Lease, arrival: _Arrival, window: Window) -> bool:
        """Wait for a message that was lost with its connection to be delivered once more."""
        if lease.live or arrival.live:
            return True
        waited = 0
        with window.expecting():
            while not (lease.live or arrival.live or lease.ending) and waited <= PATIENCE:
                lease.joined.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await lease.joined.wait()
                waited += self._transport.connected
        return lease.live or arrival.live

    async def prepare(self) -> None:
        """Make the queue before a run waits for it; if that fails now, a checkpoint tries again."""
        try:
            await self._open()
        except BrokertaskError as error:
            log.warning("worker %s has no inflight queue yet: %s", self._worker, error)

    async def _open(self) -> str:
        """Return the queue, made, consumed and settled."""
        async with self._opening:
            while self._queue is None:
                name = f"{self._names.inflight}.{self._worker}"
                name += f".{self._made + 1}" if self._made else ""
                await self._transport.declare(inflight(self._names, name))
                self._made += 1
                self._queues.append(name)
                self._consumers.append(await self._transport.consume(name, self._take, prefetch=0))
                if await self._settles():
                    self._queue = name
                else:
                    # Perhaps without a leader from now on. It is empty, and goes by itself.
                    self._queues.remove(name)
                    await self._consumers.pop().close()
            return self._queue

    async def _settles(self) -> bool:
        """Wait for as long as the transport says; False if a connection was lost meanwhile."""
        loop = asyncio.get_running_loop()
        until, connected = loop.time() + self._transport.settling, self._transport.connected
        while (left := until - loop.time()) > 0:
            await asyncio.sleep(min(left, LOOK))
            if connected and not self._transport.connected:
                return False
        return True

    def _take(self, delivery: Delivery) -> None:
        self._held = {held for held in self._held if held.live}
        self._held.add(delivery)
        if not self.adopt(delivery):
            # One that came too late, or that a lost connection gave back.
            self._receive(delivery)

    async def close(self) -> None:
        """Delete the queue if nothing is left in it that we know of; else it goes by itself.

        What it still holds then expires to the queues of its tasks, long before the queue does.
        """
        for consumer in self._consumers:
            await consumer.stop()
        left = bool(self._awaited) or any(delivery.live for delivery in self._held)
        for consumer in self._consumers:
            await consumer.close()
        with suppress(BrokertaskError):
            for queue in () if left else self._queues:
                await self._transport.delete(queue)


async def _came(arrival: _Arrival, timeout: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await arrival.came.wait()
    return arrival.came.is_set()


def _seq(delivery: Delivery) -> int:
    seq = delivery.message.headers.get("bt-seq", 0)
    return seq if isinstance(seq, int) else 0
