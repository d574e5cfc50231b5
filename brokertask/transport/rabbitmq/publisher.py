"""Confirmed publishes over one lane, opened again when it has ended."""

from __future__ import annotations

import asyncio
from typing import Final

from brokertask.envelope import Message
from brokertask.errors import BrokerUnavailable
from brokertask.topology import Route
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT, Lane
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.waiting import close_quietly, until_unblocked

LOST_PAUSE: Final = 0.05


class Publisher:
    """Publishes over one channel of one link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lane: Lane | None = None
        self._opening: asyncio.Task[None] | None = None

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool
    ) -> None:
        """See `Transport.publish`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            lane = self._lane
            if lane is None or lane.ended:
                lane = await self._open(deadline)
            try:
                return await lane.publish(
                    route, message, timeout=timeout, deadline=deadline, mandatory=mandatory
                )
            except BrokerUnavailable:
                # Lost before it was sent, and the link is about to notice.
                if loop.time() + LOST_PAUSE > deadline:
                    raise
                await asyncio.sleep(LOST_PAUSE)

    async def close(self) -> None:
        """Close the channel."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._lane is not None:
            self._lane.end()
            await close_quietly(self._lane.channel)

    async def _open(self, deadline: float) -> Lane:
        """Return an open lane on a connection that may publish; so far, nothing was sent."""
        loop = asyncio.get_running_loop()
        while True:
            connection = await self._link.connection(timeout=deadline - loop.time())
            try:
                await until_unblocked(connection, deadline)
                async with asyncio.timeout_at(deadline):
                    return await self._opened()
            except TimeoutError:
                raise BrokerUnavailable("the broker opens no channel; nothing was sent") from None
            except BrokerUnavailable:
                # The connection was lost just now, and the link is about to notice.
                if loop.time() + LOST_PAUSE > deadline:
                    raise
                await asyncio.sleep(LOST_PAUSE)

    async def _opened(self) -> Lane:
        """Return the lane that one task opens for all who wait, and who then send as one."""
        while self._lane is None or self._lane.ended:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open_anew(), name="brokertask lane")
                # When nobody waits any more, its failure is nobody's.
                self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Not the task itself: the time-out of one caller must not cut it short for the others.
            opening = self._opening
            await asyncio.wait({opening})
            if not opening.cancelled() and (error := opening.exception()) is not None:
                raise error
        return self._lane

    async def _open_anew(self) -> None:
        self._lane = await self._link.lane(confirms=True, timeout=RPC_TIMEOUT)
