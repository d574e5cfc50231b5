"""A TCP proxy on loopback that fails in every way a network can.

    client ── UP ──► proxy ──► broker
           ◄─ DOWN ─       ◄──

Faults are for the connections that are open at that moment: the next one is sound again, unless
`refusing`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from urllib.parse import urlsplit


class Way(Enum):
    """A direction through the proxy."""

    UP = "client to broker"
    DOWN = "broker to client"


BOTH = (Way.UP, Way.DOWN)
Tap = Callable[["Passage", Way, bytes], bytes]


@dataclass(eq=False)
class Passage:
    """One client's connection, and the proxy's own to the broker behind it."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    lost: set[Way] = field(default_factory=set)
    """Ways on which bytes vanish, the end of the stream included."""
    left: dict[Way, int] = field(default_factory=dict)
    """How many more bytes pass before the passage is cut."""

    def passing(self, way: Way, data: bytes) -> bytes:
        """Return what of `data` still passes."""
        if way in self.lost:
            return b""
        if way in self.left:
            data = data[: self.left[way]]
            self.left[way] -= len(data)
        return data

    def spent(self, way: Way) -> bool:
        return self.left.get(way) == 0

    def close(self, *, reset: bool = False) -> None:
        """Close both sides; with `reset`, by RST and without what was not yet sent."""
        for writer in (self.client, self.broker):
            with suppress(OSError):
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    connection: socket.socket = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                else:
                    writer.close()


class Proxy:
    """Stands in front of the broker of `url`; its own is `self.url` once entered."""

    def __init__(self, url: str) -> None:
        self._behind = urlsplit(url)
        self.url = ""
        self.refusing = False
        self.cut_next_after: dict[Way, int] = {}
        """For the one connection that comes next: cut it after so many bytes."""
        self.accepted = 0
        self.tap: Tap = lambda passage, way, data: data
        """Sees all bytes before they pass, and may change them, or the fate of their passage."""
        self._passages: dict[Passage, asyncio.Task[None]] = {}

    def lead_to(self, url: str) -> None:
        """Connect whoever comes next to another broker."""
        self._behind = urlsplit(url)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        name = self._behind.netloc.rpartition("@")[0]
        self.url = self._behind._replace(netloc=f"{name}@127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        pumping = list(self._passages.values())
        self.reset()
        await asyncio.gather(*pumping)

    @property
    def passages(self) -> int:
        """How many connections are open through it."""
        return len(self._passages)

    def black_hole(self, ways: Iterable[Way] = BOTH) -> None:
        """Let bytes vanish from now on; neither side is told: half-open."""
        for passage in self._passages:
            passage.lost.update(ways)

    def cut_after(self, count: int, way: Way) -> None:
        """Close each connection once `count` more bytes went that way."""
        for passage in self._passages:
            passage.left[way] = count

    def drop(self) -> None:
        """Close every connection in order."""
        for passage in self._passages:
            passage.close()

    def reset(self) -> None:
        """Close every connection with an RST."""
        for passage in self._passages:
            passage.close(reset=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        host, port = self._behind.hostname or "", self._behind.port or 5672
        try:
            answers, broker = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            return
        self.accepted += 1
        passage = Passage(writer, broker, left=self.cut_next_after)
        self.cut_next_after = {}
        task = asyncio.current_task()
        assert task is not None, "a connection is accepted in a task of its own"
        self._passages[passage] = task
        try:
            await asyncio.gather(
                self._pump(passage, Way.UP, reader, broker),
                self._pump(passage, Way.DOWN, answers, writer),
            )
        finally:
            del self._passages[passage]
            passage.close()

    async def _pump(
        self, passage: Passage, way: Way, reader: asyncio.StreamReader, to: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                to.write(passage.passing(way, self.tap(passage, way, data)))
                await to.drain()
                if passage.spent(way):
                    passage.close()
            if way not in passage.lost:
                to.close()
