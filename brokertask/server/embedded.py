"""A server in the process of a test: on an embedded broker and its clock, without an API."""

from __future__ import annotations

from contextlib import AsyncExitStack
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final

from sqlalchemy import select

from brokertask.envelope import Message
from brokertask.identity import uuid7
from brokertask.server.service import Server, serving
from brokertask.server.settings import ServerSettings
from brokertask.server.store.schema import tokens
from brokertask.settings import Settings
from brokertask.topology import Route
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.values import MSGPACK, encode

BY: Final = "test"


class EmbeddedServer:
    """A server inside its block, with a store of its own that is gone at the end."""

    def __init__(self, settings: Settings, broker: MemoryBroker) -> None:
        self._settings = settings
        self._transport = MemoryTransport(broker)
        self._clock = broker.clock
        self._resources = AsyncExitStack()

    @property
    def at_rest(self) -> bool:
        """Whether it has nothing to do now."""
        return self._server.at_rest and not self._transport.unsettled

    async def __aenter__(self) -> EmbeddedServer:
        # A database in memory is gone with the first transaction that is cancelled.
        folder = self._resources.enter_context(TemporaryDirectory(prefix="brokertask-"))
        try:
            self._server = await self._resources.enter_async_context(
                serving(
                    Server(
                        self._settings,
                        ServerSettings(store_url=f"sqlite+aiosqlite:///{folder}/server.db"),
                        self._transport,
                        clock=self._clock,
                        api=False,
                    )
                )
            )
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.aclose()

    async def find_token(self, run_id: str, name: str) -> str | None:
        """Return the id of the token of that name that a run waits for."""
        mine = (tokens.c.run_id == run_id, tokens.c.name == name, tokens.c.state == "waiting")
        async with self._server.resources.store.read() as connection:
            found = await connection.scalar(select(tokens.c.id).where(*mine))
        return None if found is None else str(found)

    async def complete(self, token: str, value: object) -> None:
        """Complete a token with a plain value.

        Raises:
            InvalidPayload: The value has no form in msgpack.
        """
        await self._server.waits.complete(token, value, by=BY)

    async def reject(self, token: str, reason: str) -> None:
        """Reject a token."""
        await self._server.waits.reject(token, reason, by=BY)

    async def publish(self, key: str, event: object) -> None:
        """Publish an event of a user's own.

        Raises:
            InvalidPayload: It has no form in msgpack.
        """
        now_ms = self._clock.now_ms()
        # Without an id of its own, the same event again would be the same one.
        message = Message(
            body=encode(event),
            content_type=MSGPACK,
            message_id=uuid7(now_ms),
            timestamp_ms=now_ms,
        )
        route = Route(self._settings.names.events, key)
        await self._server.resources.publish(route, message, mandatory=False)
