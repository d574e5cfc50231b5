"""One connection of a client: calls with their answers, and what the server sends by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from brokertask.transport.socket.frames import pack, read, unpack_error

log = logging.getLogger("brokertask.socket")

CALL_TIMEOUT: Final = 30.0


class Link:
    """Calls by number until the connection is lost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.alive = True
        self._reader = reader
        self._writer = writer
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def tell(self, name: str, *arguments: object) -> None:
        """Send a call that nobody answers; nothing happens if the connection was lost."""
        if self.alive:
            self._writer.write(pack([0, name, arguments]))

    async def call(self, name: str, *arguments: object, timeout: float = CALL_TIMEOUT) -> Any:
        """Return the answer, or raise the server's error, ConnectionError or TimeoutError."""
        if not self.alive:
            raise ConnectionError("the connection was lost")
        number = next(self._numbers)
        data = pack([number, name, arguments])
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(data)
                await self._writer.drain()
                return await answer
        finally:
            del self._waiting[number]

    async def run(self, pushed: Callable[[str, list[Any]], None]) -> None:
        """Hand on what comes until the connection is lost."""
        try:
            while True:
                number, second, third = await read(self._reader)
                if number == 0:
                    pushed(second, third)
                elif (answer := self._waiting.get(number)) is None or answer.done():
                    continue
                elif second is None:
                    answer.set_result(third)
                else:
                    answer.set_exception(unpack_error(second))
        except ConnectionError as error:
            log.debug("%s", error)
        finally:
            self.close()

    def close(self) -> None:
        """End it, and every call that waits."""
        self.alive = False
        self._writer.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the connection was lost"))
