"""Events as they come, for whoever watches: heard once by each server, and only while needed."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeAlias

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, EnvelopeError
from brokertask.events import Event
from brokertask.run import private_queue
from brokertask.server.api.problems import Problem
from brokertask.server.resources import Resources
from brokertask.topology import Binding
from brokertask.transport.base import Consumer

log = logging.getLogger("brokertask.server")

MAX_WATCHERS: Final = 200
MAX_UNHEARD: Final = 1_000
"""Events that a watcher may be behind, before it is told that it has missed some."""

Heard: TypeAlias = "asyncio.Queue[Event | None]"


class Hub:
    """Tells watchers of events. What happened before they came, they have from the store."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._watchers: dict[Heard, Callable[[Event], bool]] = {}
        self._listener: Consumer | None = None
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def watch(self, wanted: Callable[[Event], bool]) -> AsyncIterator[Heard]:
        """Hear the events that are wanted, from the moment the block is entered.

        None in the queue says that events were lost, and that nothing more will come.

        Raises:
            Problem: Too many watch already.
            BrokerUnavailable: The broker is gone.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise Problem("too_many_requests", f"{MAX_WATCHERS} streams are open on this server")
        heard: Heard = asyncio.Queue(MAX_UNHEARD + 1)
        self._watchers[heard] = wanted
        try:
            await self._listen()
            yield heard
        finally:
            del self._watchers[heard]
            await asyncio.shield(self._rest())

    async def _listen(self) -> None:
        async with self._changing:
            if self._listener is None:
                names = self._resources.names
                queue = private_queue(names.reply(f"watch-{secrets.token_hex(8)}"))
                bindings = (Binding(names.events, queue.name, "#"),)
                transport = self._resources.transport
                self._listener = await transport.listen(queue, bindings, self._hear)

    async def _rest(self) -> None:
        async with self._changing:
            if self._listener is not None and not self._watchers:
                listener, self._listener = self._listener, None
                with suppress(BrokertaskError):
                    await listener.close()

    def _hear(self, message: Message) -> None:
        if message.type is None:
            return  # An event of a user's own.
        try:
            event = Event.read(message)
        except EnvelopeError as error:
            log.debug("not an event: %s", error)
            return
        for heard, wanted in self._watchers.items():
            if not wanted(event):
                continue
            if heard.qsize() < MAX_UNHEARD:
                heard.put_nowait(event)
            elif heard.qsize() == MAX_UNHEARD:
                heard.put_nowait(None)
