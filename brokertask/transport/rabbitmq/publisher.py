"""Confirmed publishes over one lane, opened again when it has ended."""

from __future__ import annotations

import asyncio
from typing import Final

from brokertask.envelope import Message
from brokertask.errors import BrokerUnavailable
from brokertask.topology import Route
from brokertask.transport.rabbitmq.lane import Lane
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.waiting import close_quietly, until_unblocked

LOST_PAUSE: Final = 0.05


class Publisher:
    """Publishes over one channel of one link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lane: Lane | None = None
        self._opening = asyncio.Lock()

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
                async with asyncio.timeout_at(deadline), self._opening:
                    if self._lane is None or self._lane.ended:
                        self._lane = await self._link.lane(confirms=True, timeout=None)
                    return self._lane
            except TimeoutError:
                raise BrokerUnavailable("the broker opens no channel; nothing was sent") from None
            except BrokerUnavailable:
                # The connection was lost just now, and the link is about to notice.
                if loop.time() + LOST_PAUSE > deadline:
                    raise
                await asyncio.sleep(LOST_PAUSE)
