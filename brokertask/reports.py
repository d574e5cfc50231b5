"""What a worker tells in the background, as no run has to wait for it.

Beside the outcomes of runs, only while servers keep history, so that a worker without one pays
nothing. What cannot be sent in time is dropped: the run goes on, and its end is told by another
way. And the outcomes themselves, as long as nobody relies on hearing of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError
from brokertask.events import Event
from brokertask.topology import Names, Route
from brokertask.transport.base import Transport

log = logging.getLogger("brokertask.worker")

AHEAD: Final = 10_000
"""Reports that wait to be sent; beyond, the newest are dropped."""
SENDERS: Final = 128
"""Reports that wait for their confirm at a time: as many as keep up with a worker that is busy."""
FAREWELL: Final = 2.0
"""Seconds that the last of them have when a worker stops."""


class Reports:
    """Sends reports, one after the other and some at a time."""

    def __init__(
        self,
        transport: Transport,
        *,
        names: Names,
        timeout: float,
        wanted: Callable[[], bool],
        blind: Callable[[], bool],
    ) -> None:
        self._transport = transport
        self._names = names
        self._timeout = timeout
        self._wanted = wanted
        self._blind = blind
        self._waiting: asyncio.Queue[tuple[Route, Message]] = asyncio.Queue(AHEAD)
        self._senders: list[asyncio.Task[None]] = []
        self._dropped = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anybody who keeps what is told."""
        return self._wanted()

    def take(self, route: Route, message: Message) -> bool:
        """Publish an outcome soon; False if its run must wait until it is on the broker's disk.

        It must where servers keep history, or may: a worker that does not hear of them cannot
        know. So must those that nobody sends fast enough.
        """
        if self._wanted() or self._blind():
            return False
        return self._add(route, message)

    def tell(self, event: Event) -> None:
        """Publish an event of a run soon; not to its caller, who waits for other things."""
        self.send(self._names.event_route(event.event, event.task), event.message())

    def send(self, route: Route, message: Message) -> None:
        """Publish a message soon, if there is room."""
        if not self._add(route, message):
            self._dropped += 1
            if self._dropped == 1:
                log.warning("reports for servers wait in vain; the newest are dropped")

    def _add(self, route: Route, message: Message) -> bool:
        if not self._senders:
            self._senders = [asyncio.create_task(self._keep_sending()) for _ in range(SENDERS)]
        if self._waiting.full():
            return False
        self._waiting.put_nowait((route, message))
        return True

    async def finish(self) -> None:
        """Send what is left, for a moment."""
        try:
            async with asyncio.timeout(FAREWELL):
                await self._waiting.join()
        except TimeoutError:
            log.debug("%d reports are not sent", self._waiting.qsize())
        for sender in self._senders:
            sender.cancel()
        await asyncio.gather(*self._senders, return_exceptions=True)

    async def _keep_sending(self) -> None:
        while True:
            route, message = await self._waiting.get()
            try:
                await self._transport.publish(
                    route, message, timeout=self._timeout, mandatory=False
                )
            except BrokertaskError as error:
                log.debug("a report is lost: %s", error)
            else:
                self._dropped = 0
            finally:
                self._waiting.task_done()
