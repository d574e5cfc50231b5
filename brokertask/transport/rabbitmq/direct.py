"""The messages of one channel, on their own frames: one call for a delivery, bytes for an ack.

tap ─► take ─ deliver, return: header and body follow ─► the consumer's `receive`, or `Unroutable`
            ├ ack, nack: the publishes they are for are answered
            └ anything else is aiormq's
publish ─► window ─► three frames, one write per turn of the event loop
ack ─────► `acks`, which makes ranges of them once per turn
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from aiormq.abc import AbstractChannel

from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, BrokerUnavailable, InvalidPayload
from brokertask.topology import Route
from brokertask.transport.rabbitmq import failures, frames, properties
from brokertask.transport.rabbitmq.acks import Acks
from brokertask.transport.rabbitmq.confirms import Confirms, Unconfirmed
from brokertask.transport.rabbitmq.frames import BODY, HEADER, METHOD, FrameError
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT, Receive
from brokertask.transport.rabbitmq.tap import Tap
from brokertask.transport.rabbitmq.waiting import alarmed

log = logging.getLogger("brokertask.rabbitmq")

WINDOW: Final = 1_000
"""Publishes of one channel that wait for their confirm at a time; the others wait for them."""
_UNWRITABLE: Final = (TypeError, ValueError, RecursionError, struct.error)
_CLOSES: Final = (frames.CHANNEL_CLOSE, frames.CHANNEL_CLOSE_OK)
MAX_BODY: Final = 536_870_912
"""RabbitMQ takes no larger message."""


@dataclass(slots=True, eq=False)
class _Incoming:
    """A message of which not everything is here."""

    consumer: bytes | None
    """Who it is for; None for a message of ours that is returned."""
    key: bytes = b""
    tag: int = 0
    redelivered: bool = False
    properties: bytes | None = None
    missing: int = 0
    parts: list[bytes] = field(default_factory=list)


class DirectLane:
    """See `lane.Lane`."""

    def __init__(self, channel: AbstractChannel, tap: Tap, *, frame_max: int) -> None:
        self.channel = channel
        self.ended = False
        self._number = channel.number
        self._tap = tap
        self._frame_max = frame_max
        self._loop = asyncio.get_running_loop()
        self._incoming: _Incoming | None = None
        self._consumers: dict[bytes, Receive] = {}
        self._tags = count(1)
        self._acks = Acks()
        self._window = asyncio.Semaphore(WINDOW)
        self._confirms = Confirms(expire=self._expire, done=self._window.release)
        self._flowing = True
        self._clear = asyncio.Event()
        tap.add(self._number, self)
        self.changed()
        channel.closing.add_done_callback(self._closed)

    # --- what comes

    def take(self, kind: int, data: bytes, start: int, end: int) -> bool:
        """See `tap.Taker`."""
        if kind == METHOD:
            return self._take_method(data, start, end)
        incoming = self._incoming
        if incoming is None:
            raise FrameError("content that belongs to no message")
        if kind == HEADER and incoming.properties is None:
            incoming.missing = frames.read_size(data, start, end)
            if incoming.missing > MAX_BODY:
                raise FrameError(f"a message of {incoming.missing} bytes")
            incoming.properties = data[start + frames.PROPERTIES_AT : end]
        elif kind == BODY and incoming.properties is not None:
            incoming.missing -= end - start
            incoming.parts.append(data[start:end])
        else:
            raise FrameError("the parts of a message in a wrong order")
        if incoming.missing <= 0:
            self._incoming = None
            self._take_message(incoming)
        return True

    def _take_method(self, data: bytes, start: int, end: int) -> bool:
        method = data[start : start + 4]
        if self._incoming is not None and method not in _CLOSES:
            raise FrameError("a message without its content")
        if method == frames.DELIVER:
            self._incoming = _Incoming(*frames.read_delivery(data, start, end))
        elif method == frames.RETURN:
            self._incoming = _Incoming(None)
        elif method in (frames.ACK, frames.NACK):
            number, multiple = frames.read_tag(data, start, end)
            answered = self._confirms.confirm(number, multiple=multiple)
            self._answer(answered, refused=method == frames.NACK)
        elif method == frames.FLOW:
            self._flowing = bool(data[start + 4])
            self._write(frames.flow_ok(self._number, active=self._flowing))
            self.changed()
        else:
            if method in _CLOSES:
                # One more frame on a closed channel would cost the connection.
                self._incoming = None
                self._stop()
            return False
        return True

    def _take_message(self, incoming: _Incoming) -> None:
        if incoming.missing < 0:
            raise FrameError("a message longer than it says")
        assert incoming.properties is not None
        parts = incoming.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        message = properties.unpack(incoming.properties, body)
        if incoming.consumer is None:
            self._take_back(message)
        elif not self.ended and (receive := self._consumers.get(incoming.consumer)) is not None:
            try:
                key = incoming.key.decode(errors="replace")
                receive(message, key, incoming.tag, incoming.redelivered)
            except Exception:
                # Unsettled, it goes back to its queue with this channel.
                log.critical("a delivery failed inside brokertask", exc_info=True)

    def _take_back(self, message: Message) -> None:
        """Fail the publish whose message the broker returned; only mandatory ones are."""
        publish = self._confirms.returned(message.message_id or "")
        if publish is not None and not publish.answer.done():
            publish.answer.set_exception(failures.unroutable(publish.route))

    def _answer(self, publishes: Iterable[Unconfirmed], *, refused: bool) -> None:
        for publish in publishes:
            if publish.answer.done():
                continue
            if refused:
                publish.answer.set_exception(failures.refused(publish.route))
            else:
                publish.answer.set_result(None)

    # --- publishing

    async def publish(
        self, route: Route, message: Message, *, timeout: float, deadline: float, mandatory: bool
    ) -> None:
        """See `lane.Lane`."""
        message_id = message.message_id or os.urandom(16).hex()
        try:
            packed = properties.pack(message, route, message_id)
            first = frames.publish(self._number, route.exchange, route.key, mandatory=mandatory)
            rest = frames.content(self._number, packed, message.body, frame_max=self._frame_max)
        except _UNWRITABLE as error:
            raise InvalidPayload(f"a message property cannot be sent: {error}") from error
        await self._admit(message_id, deadline)
        answer: asyncio.Future[None] = self._loop.create_future()
        self._confirms.add(Unconfirmed(route, message_id, timeout, deadline, answer))
        self._tap.write(first + rest)
        await answer

    async def _admit(self, message_id: str, deadline: float) -> None:
        """Return when one more message may be sent, with a place in the window for it."""
        if self._window.locked() or not self._clear.is_set() or self._confirms.of(message_id):
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wait_for_place(message_id)
            except TimeoutError:
                raise self._too_slow() from None
        else:
            await self._window.acquire()
        if self.ended:
            self._window.release()
            raise BrokerUnavailable("the connection was lost; nothing was sent")

    async def _wait_for_place(self, message_id: str) -> None:
        await self._window.acquire()
        try:
            while not self.ended:
                if not self._clear.is_set():
                    await self._clear.wait()
                elif (same := self._confirms.of(message_id)) is not None:
                    # The broker returns a message by its content: of one id, one at a time.
                    await asyncio.wait({same.answer})
                else:
                    return
        except BaseException:
            self._window.release()
            raise

    def _too_slow(self) -> BrokertaskError:
        if self._tap.blocked:
            return alarmed(unknown=False)
        return BrokerUnavailable("the broker takes no more messages for now; nothing was sent")

    def _expire(self, publish: Unconfirmed) -> None:
        if not publish.answer.done():
            error = failures.unanswered(publish.timeout, blocked=self._tap.blocked)
            publish.answer.set_exception(error)

    def changed(self) -> None:
        """See `tap.Taker`."""
        if self.ended or (self._tap.clear and self._flowing):
            self._clear.set()
        else:
            self._clear.clear()

    # --- consuming

    async def consume(self, queue: str, receive: Receive, *, no_ack: bool, wait: bool) -> str:
        """See `lane.Lane`."""
        consumer = f"bt.{self._number}.{next(self._tags)}"
        self._consumers[consumer.encode()] = receive
        if wait:
            await self.channel.basic_consume(
                queue, _nobody, no_ack=no_ack, consumer_tag=consumer, timeout=RPC_TIMEOUT
            )
        else:
            self._write(frames.consume(self._number, queue, consumer, no_ack=no_ack))
        return consumer

    async def cancel(self, consumer: str, *, wait: bool) -> None:
        """See `lane.Lane`."""
        if wait:
            await self.channel.basic_cancel(consumer, timeout=RPC_TIMEOUT)
        else:
            self._write(frames.cancel(self._number, consumer))
        self._consumers.pop(consumer.encode(), None)

    async def ack(self, tag: int) -> None:
        """See `lane.Lane`."""
        if self._acks.add(tag):
            self._loop.call_soon(self._send_acks)

    async def reject(self, tag: int) -> None:
        """See `lane.Lane`."""
        self._acks.skip(tag)
        self._write(frames.reject(self._number, tag))

    def _send_acks(self) -> None:
        last, single = self._acks.take()
        if last:
            self._write(frames.ack(self._number, last, multiple=True))
        for tag in single:
            self._write(frames.ack(self._number, tag, multiple=False))

    def _write(self, data: bytes) -> None:
        if not self.ended:
            self._tap.write(data)

    # --- the end

    def end(self) -> None:
        """See `lane.Lane`."""
        self._send_acks()
        self._stop()
        self._tap.flush()

    def lose(self, error: BaseException | None) -> None:
        """See `tap.Taker`."""
        self._stop()
        for publish in self._confirms.end():
            if not publish.answer.done():
                publish.answer.set_exception(failures.closed(error, publish.route))

    def _stop(self) -> None:
        self.ended = True
        self.changed()

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        self._tap.remove(self._number, self)
        self.lose(None if closing.cancelled() else closing.exception())


async def _nobody(_: object) -> None:
    """Stand for a consumer at aiormq, which never hears of its deliveries."""
