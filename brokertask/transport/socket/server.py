"""The server side: an embedded broker that other processes of this user can reach."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, ConfigurationError
from brokertask.topology import Binding, Queue, Route
from brokertask.transport.base import Consumer, Delivery
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.transport.socket.frames import (
    pack,
    pack_error,
    pack_message,
    read,
    unpack_message,
    unpack_topology,
)

log = logging.getLogger("brokertask.socket")

OPEN_TIMEOUT: Final = 1.0


async def serve(broker: MemoryBroker, path: Path) -> SocketServer:
    """Offer `broker` on a Unix socket that only this user can open, until closed.

    Raises:
        ConfigurationError: Another server listens there, something else is in the way, or the
            folder is one that others may write to.
    """
    server = SocketServer(broker, path)
    await server.start()
    return server


class SocketServer:
    """Listens on a Unix socket; an async context manager that closes it."""

    def __init__(self, broker: MemoryBroker, path: Path) -> None:
        self._broker = broker
        self._path = path
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SocketServer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen; see `serve`."""
        listening = _bind(self._path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)

    async def close(self) -> None:
        """Cut every connection, which gives back what they held, and remove the socket."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.create_task(_Session(self._broker, reader, writer).run())
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)


def _bind(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(f"others may write to {path.parent}: use `chmod 700` on it")
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    except OSError as error:
        listening.close()
        raise ConfigurationError(f"cannot listen on {path}: {error}") from error
    finally:
        os.umask(before)
    return listening


def _remove_stale(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigurationError(f"{path} is in the way, and it is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be used: {error}") from error
        else:
            raise ConfigurationError(
                f"a broker already listens on {path}: use it, or stop that `brokertask dev` first"
            )


class _Session:
    """One connection: its transport, consumers and unsettled deliveries."""

    def __init__(
        self, broker: MemoryBroker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._transport = MemoryTransport(broker)
        self._consumers: dict[int, Consumer] = {}
        self._deliveries: dict[int, Delivery] = {}
        self._tags = count(1)
        self._publishes: set[asyncio.Task[None]] = set()
        self._calls: dict[str, Callable[..., Awaitable[object]]] = {
            "publish": self._publish,
            "consume": self._consume,
            "listen": self._listen,
            "follow": self._follow,
            "limit": self._limit,
            "stop": self._stop,
            "close": self._close,
            "ack": self._ack,
            "requeue": self._requeue,
            "declare": self._declare,
            "compare": self._compare,
            "depth": self._depth,
            "delete": self._delete,
        }

    async def run(self) -> None:
        """Answer until the client is gone or talks nonsense."""
        try:
            await self._transport.open(timeout=OPEN_TIMEOUT)
            while True:
                number, name, arguments = await read(self._reader)
                if name == "publish":
                    self._answer_later(number, arguments)
                else:
                    await self._answer(number, name, arguments)
        except (ConnectionError, BrokertaskError) as error:
            log.debug("a connection ended: %s", error)
        finally:
            for publish in self._publishes:
                publish.cancel()
            self._writer.close()
            await self._transport.close()

    def _answer_later(self, number: int, arguments: list[Any]) -> None:
        # An alarm holds publishes up; acks must not wait behind them.
        publish = asyncio.create_task(self._answer(number, "publish", arguments))
        self._publishes.add(publish)
        publish.add_done_callback(self._publishes.discard)

    async def _answer(self, number: int, name: str, arguments: list[Any]) -> None:
        try:
            error, value = None, await self._calls[name](*arguments)
        except BrokertaskError as failure:
            error, value = pack_error(failure), None
        except (LookupError, TypeError, ValueError) as failure:
            log.warning("closing a connection that does not keep to the protocol: %r", failure)
            self._writer.close()
            return
        if number:
            self._send(number, error, value)
            with suppress(OSError):
                await self._writer.drain()

    def _send(self, number: int, second: object, third: object) -> None:
        if not self._writer.is_closing():
            self._writer.write(pack([number, second, third]))

    def _push_delivery(self, consumer: int, delivery: Delivery) -> None:
        tag = next(self._tags)
        self._deliveries[tag] = delivery
        known = delivery.queue, delivery.key, delivery.lost, pack_message(delivery.message)
        self._send(0, "delivery", [consumer, tag, *known])

    def _push_message(self, consumer: int, message: Message) -> None:
        self._send(0, "message", [consumer, pack_message(message)])

    async def _publish(
        self, route: list[Any], message: list[Any], timeout: float, mandatory: bool
    ) -> None:
        exchange, key, also = route
        await self._transport.publish(
            Route(exchange, key, tuple(also)),
            unpack_message(message),
            timeout=timeout,
            mandatory=mandatory,
        )

    async def _consume(self, consumer: int, queue: str, prefetch: int, limited: bool) -> None:
        self._consumers[consumer] = await self._transport.consume(
            queue, partial(self._push_delivery, consumer), prefetch=prefetch, limited=limited
        )

    async def _listen(self, consumer: int, queue: dict[str, Any], bindings: list[Any]) -> None:
        self._consumers[consumer] = await self._transport.listen(
            Queue(**queue),
            tuple(Binding(**binding) for binding in bindings),
            partial(self._push_message, consumer),
        )

    async def _follow(self, consumer: int, stream: str, after: int | None) -> None:
        self._consumers[consumer] = await self._transport.follow(
            stream, partial(self._push_message, consumer), after=after
        )

    async def _limit(self, consumer: int, prefetch: int) -> None:
        await self._consumers[consumer].limit(prefetch)

    async def _stop(self, consumer: int) -> None:
        await self._consumers[consumer].stop()

    async def _close(self, consumer: int) -> None:
        await self._consumers.pop(consumer).close()
        self._deliveries = {tag: one for tag, one in self._deliveries.items() if one.live}

    async def _ack(self, tag: int) -> None:
        if (delivery := self._deliveries.pop(tag, None)) is not None:
            await delivery.ack()

    async def _requeue(self, tag: int) -> None:
        if (delivery := self._deliveries.pop(tag, None)) is not None:
            await delivery.requeue()

    async def _declare(self, topology: dict[str, Any]) -> None:
        await self._transport.declare(unpack_topology(topology))

    async def _compare(self, topology: dict[str, Any]) -> list[object]:
        found = await self._transport.compare(unpack_topology(topology))
        return [
            [isinstance(one.item, Queue), one.item.name, one.missing, one.detail] for one in found
        ]

    async def _depth(self, queue: str) -> list[int] | None:
        depth = await self._transport.depth(queue)
        return [depth.ready, depth.consumers] if depth else None

    async def _delete(self, queue: str) -> None:
        await self._transport.delete(queue)
