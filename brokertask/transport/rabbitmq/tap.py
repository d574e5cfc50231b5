"""Stands between the socket and aiormq, and takes the frames that carry messages.

socket ──► Tap ──► a lane, if the channel has one and the frame is of the hot path
 ▲          └────► aiormq: everything else, unchanged
 └── one write per turn of the event loop: publishes and acks of all lanes
     (aiormq writes by itself; each write is whole frames, so they may mix)
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final, Protocol, cast

from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from brokertask.transport.rabbitmq.frames import (
    CONNECTION_BLOCKED,
    CONNECTION_UNBLOCKED,
    END,
    HEAD,
    HEARTBEAT,
    KINDS,
    METHOD,
    OVERHEAD,
    FrameError,
)

UNTUNED_FRAME_MAX: Final = 1_048_576
"""Until the two sides have agreed on one."""
HIGH_WATER: Final = 262_144
"""Bytes for one write; who publishes waits while there are more."""
ALIVE_EVERY: Final = 0.5
_NONE: Final = b""


class Taker(Protocol):
    """Who takes the hot frames of one channel."""

    def take(self, kind: int, data: bytes, start: int, end: int) -> bool:
        """Take the frame whose payload is in `data[start:end]`; False: it is aiormq's."""
        ...

    def changed(self) -> None:
        """Look again at `Tap.clear`."""
        ...

    def lose(self, error: BaseException | None) -> None:
        """The connection is gone."""
        ...


class Tap(asyncio.StreamReaderProtocol):
    """The protocol of one connection.

    Attributes:
        blocked: An alarm on the broker keeps this connection from publishing.
        clear: What is published now is on its way at once.
    """

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.blocked = False
        self.clear = True
        self.frame_max = UNTUNED_FRAME_MAX
        self._reader = reader
        self._running = loop
        self._socket: asyncio.Transport | None = None
        self._takers: dict[int, Taker] = {}
        self._rest = bytearray()
        self._needed = 0
        self._told = 0.0
        self._out: list[bytes] = []
        self._unsent = 0
        self._full = False
        self._broken = False

    def add(self, channel: int, taker: Taker) -> None:
        """Hand the hot frames of a channel to `taker`."""
        self._takers[channel] = taker

    def remove(self, channel: int, taker: Taker) -> None:
        """Hand them to aiormq again; does nothing if somebody else takes them by now."""
        if self._takers.get(channel) is taker:
            del self._takers[channel]

    # --- what comes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket to write to."""
        # Not of that class in uvloop, where it is one nonetheless.
        self._socket = cast("asyncio.Transport", transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Hand on every frame that is whole."""
        if self._broken:
            return
        if self._rest:
            # Joined once they are whole: a large frame comes in many parts.
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        try:
            at = self._split(data)
        except (FrameError, IndexError, struct.error) as error:
            self._break(error)
            return
        if at < len(data):
            self._rest += data[at:] if at else data

    def _split(self, data: bytes) -> int:
        """Hand on the frames in `data`; return where the first one begins that is not whole."""
        at, count, takers = 0, len(data), self._takers
        while count - at >= OVERHEAD:
            kind, channel, size = HEAD.unpack_from(data, at)
            if kind not in KINDS or size + OVERHEAD > self.frame_max:
                raise FrameError(f"no AMQP frame: {data[at : at + 8]!r}")
            start = at + HEAD.size
            end = start + size
            if end >= count:
                self._needed = end + 1 - at
                return at
            if data[end] != END:
                raise FrameError(f"a frame without its end: {data[at : at + 8]!r}")
            taker = takers.get(channel)
            if taker is None or not taker.take(kind, data, start, end):
                self._pass_on(kind, channel, data[at : end + 1])
            at = end + 1
        self._needed = OVERHEAD
        if takers:
            self._tell_alive()
        return at

    def _pass_on(self, kind: int, channel: int, frame: bytes) -> None:
        self._reader.feed_data(frame)
        if kind == METHOD and channel == 0:
            number = frame[HEAD.size : HEAD.size + 4]
            if number in (CONNECTION_BLOCKED, CONNECTION_UNBLOCKED):
                self.blocked = number == CONNECTION_BLOCKED
                self._look()

    def _tell_alive(self) -> None:
        """Let aiormq hear that the broker lives: a broker that sends messages beats no heart."""
        now = self._running.time()
        if now - self._told > ALIVE_EVERY:
            self._told = now
            self._reader.feed_data(HEARTBEAT)

    def _break(self, error: Exception) -> None:
        """End a connection whose bytes make no sense; whoever uses it connects again."""
        self._broken = True
        self._reader.set_exception(ConnectionResetError(f"what came is no AMQP: {error}"))
        if self._socket is not None:
            self._socket.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every lane, and aiormq."""
        self._broken = True
        self._out.clear()
        takers, self._takers = self._takers, {}
        for taker in takers.values():
            taker.lose(exc)
        super().connection_lost(exc)

    # --- what goes

    def write(self, frames: bytes) -> None:
        """Send whole frames at the end of this turn of the event loop."""
        if not self._out:
            self._running.call_soon(self.flush)
        self._out.append(frames)
        self._unsent += len(frames)
        if self._unsent > HIGH_WATER and self.clear:
            self._look()

    def flush(self) -> None:
        """Send what was written, now."""
        out, self._out = self._out, []
        self._unsent = 0
        if out and self._socket is not None and not self._socket.is_closing():
            self._socket.write(out[0] if len(out) == 1 else _NONE.join(out))
        if not self.clear:
            self._look()

    def pause_writing(self) -> None:
        """The socket takes no more: the broker, or the network, is slower than we are."""
        self._full = True
        self._look()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The socket takes more again."""
        self._full = False
        self._look()
        super().resume_writing()

    def _look(self) -> None:
        clear = not (self.blocked or self._full or self._unsent > HIGH_WATER)
        if clear != self.clear:
            self.clear = clear
            for taker in self._takers.values():
                taker.changed()


class TapFactory(TransportFactory):
    """Opens the one connection that it is made for, with a tap.

    Attributes:
        tap: Of that connection, once it is open.
    """

    def __init__(self) -> None:
        self.tap: Tap | None = None

    async def create(
        self, url: URL, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a stream to the broker, as `asyncio.open_connection` does."""
        provider = kwargs.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        tap = self.tap = Tap(reader, loop)
        try:
            socket, _ = await loop.create_connection(
                lambda: tap, url.host or "", url.port or 0, ssl=context, **kwargs
            )
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        return reader, asyncio.StreamWriter(socket, tap, reader, loop)
