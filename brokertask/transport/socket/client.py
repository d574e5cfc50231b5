"""The client side: the port over the socket, through restarts of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Final

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, BrokerUnavailable, PublishUnknown
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Depth, Difference, Receive
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
        self._declared: list[Topology] = []

    @property
    def connected(self) -> bool:
        """Whether the socket is connected and every consumer was resumed."""
        return self._link is not None and self._link.alive

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

    async def consume(self, queue: str, receive: Receive, *, prefetch: int) -> Consumer:
        """Subscribe; see `Transport.consume`."""

        def pushed(consumer: _Consumer, link: Link, what: list[Any]) -> None:
            receive(_Delivery(consumer, link, *what))

        return await self._subscribe(pushed, "consume", queue, prefetch)

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        """Deliver what `bindings` route; see `Transport.listen`."""

        def pushed(consumer: _Consumer, link: Link, what: list[Any]) -> None:
            receive(unpack_message(what[0]))

        bound = [asdict(binding) for binding in bindings]
        return await self._subscribe(pushed, "listen", asdict(queue), bound)

    async def declare(self, topology: Topology) -> None:
        """Make what is missing; a restarted server is told again."""
        if topology not in self._declared:
            self._declared.append(topology)
        await self.call("declare", pack_topology(topology))

    async def compare(self, topology: Topology) -> list[Difference]:
        """Return what is missing or different; changes nothing."""
        found = await self.call("compare", pack_topology(topology))
        items = {(False, item.name): item for item in topology.exchanges} | {
            (True, item.name): item for item in topology.queues
        }
        return [
            Difference(items[bool(is_queue), name], missing=missing, detail=detail)
            for is_queue, name, missing, detail in found
        ]

    async def depth(self, queue: str) -> Depth | None:
        """Return what `queue` holds, or None if it does not exist."""
        answer = await self.call("depth", queue)
        return answer and Depth(ready=answer[0], consumers=answer[1])

    async def call(self, name: str, *arguments: object) -> Any:
        """Return the server's answer, or raise its error, or BrokerUnavailable."""
        link = await self._connection(CALL_TIMEOUT)
        try:
            return await link.call(name, *arguments)
        except (OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"{self._path}: {error or 'no answer'}") from error

    async def drop(self, number: int, name: str) -> None:
        """Tell the server to stop or close a consumer, if there is a server that has it."""
        if self._link is not None:
            with suppress(OSError, BrokertaskError):
                await self._link.call(name, number)

    def forget(self, number: int) -> None:
        """Hand no more deliveries to a closed consumer."""
        self._consumers.pop(number, None)

    async def _subscribe(self, pushed: _Pushed, name: str, *arguments: object) -> _Consumer:
        consumer = _Consumer(self, next(self._numbers), pushed, name, arguments)
        self._consumers[consumer.number] = consumer
        try:
            await self.call(name, consumer.number, *arguments)
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
        for topology in self._declared:
            await link.call("declare", pack_topology(topology))
        for consumer in list(self._consumers.values()):
            if consumer.started:
                await link.call(consumer.name, consumer.number, *consumer.arguments)

    def _pushed(self, link: Link, what: list[Any]) -> None:
        number, *rest = what
        if (consumer := self._consumers.get(number)) is not None:
            consumer.pushed(consumer, link, rest)


class _Consumer:
    def __init__(
        self,
        transport: SocketTransport,
        number: int,
        pushed: _Pushed,
        name: str,
        arguments: tuple[object, ...],
    ) -> None:
        self.number = number
        self.pushed = pushed
        self.name = name
        self.arguments = arguments
        self.started = False
        self.closed = False
        self._transport = transport

    async def stop(self) -> None:
        self.started = False
        await self._transport.drop(self.number, "stop")

    async def close(self) -> None:
        self.started, self.closed = False, True
        await self._transport.drop(self.number, "close")
        self._transport.forget(self.number)


_Pushed = Callable[[_Consumer, Link, list[Any]], None]


class _Delivery:
    def __init__(
        self,
        consumer: _Consumer,
        link: Link,
        tag: int,
        queue: str,
        lost: int,
        message: list[Any],
    ) -> None:
        self.message = unpack_message(message)
        self.queue = queue
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
