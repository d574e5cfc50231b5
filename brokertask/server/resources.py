"""What the parts of a server share: its store, its broker, its clock."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.claims import Claims
from brokertask.clock import Clock, SystemClock
from brokertask.envelope import Message
from brokertask.settings import Settings
from brokertask.topology import Names, Route
from brokertask.transport.base import Transport


class Store(Protocol):
    """Where everything is kept that has to be there after a crash."""

    def begin(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Return a transaction that may write: committed at the end of the block."""
        ...

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Return a transaction that only reads: it waits for no writer."""
        ...


class Outbox(Protocol):
    """Messages that are published once their transaction is committed, and not before."""

    async def add(self, connection: AsyncConnection, route: Route, message: Message) -> None:
        """Have a message published when the transaction of `connection` is committed."""
        ...

    def poke(self) -> None:
        """Publish what was added now, rather than soon."""
        ...


BREATH: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the parts of a server share."""

    store: Store
    outbox: Outbox
    transport: Transport
    broker_settings: Settings
    clock: Clock
    claims: Claims

    @property
    def names(self) -> Names:
        """The names on the broker."""
        return self.broker_settings.names

    async def publish(self, route: Route, message: Message, *, mandatory: bool = True) -> None:
        """Publish a message, confirmed.

        Raises:
            PublishError: The broker did not take it.
        """
        timeout = self.broker_settings.publish_timeout
        await self.transport.publish(route, message, timeout=timeout, mandatory=mandatory)

    async def wait_until(self, when_ms: int | None, sooner: asyncio.Event, *, poll: float) -> None:
        """Return at an instant, when `sooner` is set, or after `poll` seconds of real time.

        Where time is virtual there is one server, which needs not look for others' doings.
        """
        real = isinstance(self.clock, SystemClock)
        limit = poll if real else None
        if when_ms is not None:
            left = (when_ms - self.clock.now_ms()) / 1000
            if left <= 0 and not real:
                return
            # What is due and was not taken, another server is at.
            limit = left if limit is None else min(limit, max(left, BREATH))
        waiting = asyncio.ensure_future(sooner.wait())

        def wake() -> None:
            waiting.cancel()

        # Set now, not in a turn of the loop: time that is turned by hand may have passed by then.
        timer = None if limit is None else self.clock.call_later(limit, wake)
        try:
            await asyncio.wait([waiting])
        finally:
            waiting.cancel()
            if timer is not None:
                timer.cancel()
