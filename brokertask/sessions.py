"""The sessions of a client: a connection and a reply queue for each event loop it is used from."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from brokertask.claims import Claims
from brokertask.errors import BrokertaskError, TopologyMismatch
from brokertask.portal import portal
from brokertask.run import Session
from brokertask.settings import Settings
from brokertask.topology import Topology
from brokertask.transport.base import Transport

log = logging.getLogger("brokertask.client")


class Sessions:
    """Opens a session for an event loop when it is first needed there; safe after a fork."""

    def __init__(
        self,
        settings: Settings,
        claims: Claims,
        *,
        connect: Callable[[], Transport],
        topology: Callable[[], Topology],
    ) -> None:
        self._settings = settings
        self._claims = claims
        self._connect = connect
        self._topology = topology
        self._sessions: dict[int, asyncio.Task[Session]] = {}
        portal.invite(self)

    async def get(self) -> Session:
        """Return the session of the event loop that calls, connected."""
        loop = asyncio.get_running_loop()
        opening = self._sessions.get(id(loop))
        if opening is None or opening.get_loop() is not loop:
            for key, task in list(self._sessions.items()):
                if task.get_loop().is_closed():
                    del self._sessions[key]
            # In a context of its own: it outlives the run or request that happens to be the first.
            opening = loop.create_task(
                self._open(), name="brokertask client", context=contextvars.Context()
            )
            self._sessions[id(loop)] = opening
        try:
            return await asyncio.shield(opening)
        except BaseException:
            # Whatever it failed with, the next caller tries anew. A caller that was cancelled
            # leaves it to the others.
            failed = opening.done() and (opening.cancelled() or opening.exception() is not None)
            if failed and self._sessions.get(id(loop)) is opening:
                del self._sessions[id(loop)]
            raise

    async def close(self) -> None:
        """Disconnect this event loop's session, deleting its reply queue."""
        opening = self._sessions.pop(id(asyncio.get_running_loop()), None)
        if opening is not None:
            with suppress(BrokertaskError):
                await (await opening).close()

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Begin with no session inside the block: it uses another broker, as tests do."""
        before, self._sessions = self._sessions, {}
        try:
            yield
        finally:
            self._sessions = before

    def forget(self) -> None:
        """Begin anew, as a forked child has to: the sessions are its parent's."""
        # They must never be collected here. A socket closed by the collector would leave the epoll
        # that both processes share, and the parent would hear no more.
        _OF_THE_PARENT.append(self._sessions)
        self._sessions = {}

    async def _declare(self, transport: Transport) -> None:
        try:
            await transport.declare(self._topology())
        except TopologyMismatch as error:
            # Triggering works all the same; it is the worker that must not start like this.
            log.error("%s", error)

    async def _open(self) -> Session:
        self._claims.open()
        session = Session(self._connect(), self._claims)
        try:
            await session.transport.open(timeout=self._settings.connect_timeout)
            if self._settings.declare:
                await self._declare(session.transport)
            await session.listen(self._settings)
        except BaseException:
            await session.close()
            raise
        return session


_OF_THE_PARENT: Final[list[object]] = []
