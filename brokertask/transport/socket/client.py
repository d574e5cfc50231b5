"""The client side: the port over the socket, through restarts of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Final

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, BrokerUnavailable, PublishUnknown
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import OFFSET, Consumer, Depth, Difference, Receive
from brokertask.transport.declared import Declared
from brokertask.transport.socket.frames import pack_message, pack_topology, unpack_message
from brokertask.transport.socket.link import CALL_TIMEOUT, Link

log = logging.getLogger("brokertask.socket")

ANSWER_MARGIN: Final = 2.0
"""The server answers a publish within its time-out; so much later there is no server."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0


class SocketTransport:
    """The broker of a running `brokertask dev`, reached over its Unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._consumers: dict[int, _Consumer] = {}
        self._numbers = count(1)
        self._declared = Declared()

    @property
    def connected(self) -> bool:
        """Whether the socket is connected and every consumer was resumed."""
        return self._link is not None and self._link.alive

    @property
    def carries_losses(self) -> bool:
        """Never, as on RabbitMQ 3."""
        return False

    @property
    def settling(self) -> float:
        """Nothing, its queues included, survives the server."""
        return 0.0

    async def open(self, *, timeout: float) -> None:
        """Connect; see `Transport.open`."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="brokertask socket")
        await self._connection(timeout)

    async def close(self) -> None:
        """Disconnect, which gives back what is unsettled. Safe to call twice."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        """Store a message; see `Transport.publish`."""
        link = await self._connection(timeout)
        to = [route.exchange, route.key, route.also]
        what = pack_message(message)
        try:
            await link.call(
                "publish", to, what, timeout, mandatory, timeout=timeout + ANSWER_MARGIN
            )
        except (OSError, TimeoutError) as error:
            raise PublishUnknown(
                f"{self._path} gave no answer ({error}); the message may be stored"
            ) from error

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        """Subscribe; see `Transport.consume`."""

        def pushed(consumer: _Consumer, link: Link, what: list[Any]) -> None:
            receive(_Delivery(consumer, link, *what))

        return await self._subscribe(_Consumer, pushed, queue, prefetch, limited)

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver what `bindings` route; see `Transport.listen`."""

        def pushed(consumer: _Consumer, link: Link, what: list[Any]) -> None:
            receive(unpack_message(what[0]))

        bound = [asdict(binding) for binding in bindings]
        return await self._subscribe(_Listener, pushed, asdict(queue), bound)

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None = None
    ) -> Consumer:
        """Deliver all that a stream holds; see `Transport.follow`."""

        def pushed(consumer: _Consumer, link: Link, what: list[Any]) -> None:
            message = unpack_message(what[0])
            consumer.passed(message)
            receive(message)

        return await self._subscribe(_Follower, pushed, stream, after)

    async def declare(self, topology: Topology) -> None:
        """Make what is missing; a restarted server is told again."""
        await self._call("declare", pack_topology(topology))
        self._declared.remember(topology)

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what is missing or different; changes nothing."""
        found = await self._call("compare", pack_topology(topology))
        items = {(False, item.name): item for item in topology.exchanges} | {
            (True, item.name): item for item in topology.queues
        }
        return [
            Difference(items[bool(is_queue), name], missing=missing, detail=detail)
            for is_queue, name, missing, detail in found
        ]

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, or None if it does not exist."""
        answer = await self._call("depth", queue)
        return answer and Depth(ready=answer[0], consumers=answer[1])

    async def delete(self, queue: str) -> None:
        """Delete a queue with what it holds; a restarted server is not told to make it."""
        self._declared.forget(queue)
        await self._call("delete", queue)

    async def _call(self, name: str, *arguments: object) -> Any:
        """Return the server's answer, or raise its error, or BrokerUnavailable."""
        link = await self._connection(CALL_TIMEOUT)
        with self._translated():
            return await link.call(name, *arguments)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"{self._path}: {error or 'no answer'}") from error

    def forget(self, number: int) -> None:
        """Hand no more deliveries to a closed consumer."""
        self._consumers.pop(number, None)

    async def _subscribe(
        self, kind: type[_Consumer], pushed: _Pushed, *arguments: object
    ) -> _Consumer:
        consumer = kind(self, next(self._numbers), pushed, arguments)
        self._consumers[consumer.number] = consumer
        try:
            link = await self._connection(CALL_TIMEOUT)
            with self._translated():
                await consumer.begin(link)
        except BaseException:
            self.forget(consumer.number)
            raise
        consumer.started = True
        return consumer

    async def _connection(self, timeout: float) -> Link:
        try:
            async with asyncio.timeout(timeout if self._keeper is not None else 0):
                while (link := self._link) is None:
                    await self._up.wait()
        except TimeoutError:
            raise BrokerUnavailable(
                f"no broker answers on {self._path}; is `brokertask dev` running there?"
            ) from None
        return link

    async def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                link = Link(*await asyncio.open_unix_connection(str(self._path)))
            except OSError as error:
                log.debug("cannot connect to %s: %s", self._path, error)
            else:
                if await self._use(link):
                    pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    async def _use(self, link: Link) -> bool:
        """Offer the connection to callers until it is lost; False if it could not be used."""
        running = asyncio.create_task(link.run(lambda kind, what: self._pushed(link, what)))
        try:
            await self._resume(link)
            self._link = link
            self._up.set()
            await running
        except (OSError, TimeoutError, BrokertaskError) as error:
            log.warning("cannot resume on %s: %s", self._path, error)
            return False
        else:
            return True
        finally:
            self._link = None
            self._up.clear()
            link.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _resume(self, link: Link) -> None:
        await link.call("declare", pack_topology(self._declared.topology))
        for consumer in list(self._consumers.values()):
            if consumer.started:
                await consumer.begin(link)

    def _pushed(self, link: Link, what: list[Any]) -> None:
        number, *rest = what
        if (consumer := self._consumers.get(number)) is not None:
            consumer.pushed(consumer, link, rest)


class _Consumer:
    """What the server is told of a consumer, over one connection after the other."""

    name = "consume"

    def __init__(
        self,
        transport: SocketTransport,
        number: int,
        pushed: _Pushed,
        arguments: tuple[object, ...],
    ) -> None:
        self.number = number
        self.pushed = pushed
        self.started = False
        self.closed = False
        self._arguments = arguments
        self._transport = transport
        self._link: Link | None = None
        self._later: int | None = None
        """The latest limit that was asked for while there was no connection."""

    async def begin(self, link: Link) -> None:
        """Subscribe over this connection, which is the one to tell from now on."""
        self._link = link
        await link.call(self.name, self.number, *self._arguments)
        if self._later is not None:
            await link.call("limit", self.number, self._later)
            self._later = None

    def passed(self, message: Message) -> None:
        """Note what came, where that changes how to begin again."""

    async def limit(self, prefetch: int) -> None:
        if self.started and self._link is not None and self._link.alive:
            await self._tell("limit", prefetch)
        elif self.started:
            self._later = prefetch

    async def stop(self) -> None:
        self.started = False
        await self._tell("stop")

    async def close(self) -> None:
        self.started, self.closed = False, True
        await self._tell("close")
        self._transport.forget(self.number)

    async def _tell(self, name: str, *arguments: object) -> None:
        # A server that is gone has no consumer; the next one is told by `begin`.
        if self._link is not None:
            with suppress(OSError, BrokertaskError):
                await self._link.call(name, self.number, *arguments)


class _Listener(_Consumer):
    name = "listen"

    async def limit(self, prefetch: int) -> None:
        """Do nothing: what is settled on receipt needs no limit."""


class _Follower(_Listener):
    name = "follow"

    def passed(self, message: Message) -> None:
        stream, _ = self._arguments
        self._arguments = (stream, message.headers[OFFSET])


_Pushed = Callable[[_Consumer, Link, list[Any]], None]


class _Delivery:
    def __init__(
        self,
        consumer: _Consumer,
        link: Link,
        tag: int,
        queue: str,
        key: str,
        lost: int,
        message: list[Any],
    ) -> None:
        self.message = unpack_message(message)
        self.queue = queue
        self.key = key
        self.lost = lost
        self._settled = False
        self._consumer = consumer
        self._link = link
        self._tag = tag

    @property
    def redelivered(self) -> bool:
        return self.lost > 0

    @property
    def live(self) -> bool:
        return not self._settled and self._link.alive and not self._consumer.closed

    async def ack(self) -> None:
        self._settle("ack")

    async def requeue(self) -> None:
        self._settle("requeue")

    def _settle(self, how: str) -> None:
        if self.live:
            self._settled = True
            self._link.tell(how, self._tag)
