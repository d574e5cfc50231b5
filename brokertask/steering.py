"""How a worker follows the control log: all that was said before it begins, and what comes then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from brokertask.clock import Clock
from brokertask.control import Entry, Standing
from brokertask.envelope import Message
from brokertask.errors import AccessDenied, ConfigurationError, EnvelopeError, PublishError
from brokertask.settings import Settings
from brokertask.transport.base import Consumer, Transport

log = logging.getLogger("brokertask.worker")

CAUGHT_UP: Final = 30.0
"""Seconds within which a worker has read the log; then it begins all the same, and says so."""


class Steering:
    """Follows the control log for one worker.

    Attributes:
        standing: What holds after all that was read.
    """

    def __init__(
        self, *, worker: str, settings: Settings, clock: Clock, obey: Callable[[Entry], None]
    ) -> None:
        self.standing = Standing()
        self._worker = worker
        self._settings = settings
        self._clock = clock
        self._obey = obey
        self._caught_up = asyncio.Event()
        self._follower: Consumer | None = None

    @property
    def caught_up(self) -> bool:
        """Whether it has read all that was said before it began."""
        return self._caught_up.is_set()

    async def start(self, transport: Transport) -> None:
        """Return when all was read that was said before; or when there is no log to read."""
        log_name = self._settings.names.control
        try:
            self._follower = await transport.follow(log_name, self._read)
            await self._greet(transport)
        except (ConfigurationError, AccessDenied) as error:
            log.warning("%s hears of no cancelled run and no paused task: %s", self._worker, error)
        except (PublishError, TimeoutError) as error:
            log.warning(
                "%s begins, and may not know yet what is cancelled or paused: %s",
                self._worker,
                str(error) or f"{log_name} was not read within {CAUGHT_UP:g} s",
            )

    async def stop(self) -> None:
        """Hear nothing more."""
        if self._follower is not None:
            await self._follower.close()

    async def _greet(self, transport: Transport) -> None:
        """Write an entry to the log, and return when it is read: so was all that is before it."""
        hello = Entry(kind="hello", subject=self._worker, at_ms=self._clock.now_ms())
        names, timeout = self._settings.names, self._settings.publish_timeout
        await transport.publish(names.control_route(), hello.message(), timeout=timeout)
        async with asyncio.timeout(CAUGHT_UP):
            await self._caught_up.wait()

    def _read(self, message: Message) -> None:
        try:
            entry = Entry.read(message)
        except EnvelopeError as error:
            log.warning("passed over in the control log: %s", error)
            return
        if entry is None:
            return
        if entry.kind == "hello" and entry.subject == self._worker:
            self._caught_up.set()
        self.standing.apply(entry)
        self._obey(entry)
