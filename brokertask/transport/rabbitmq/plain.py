"""The messages of one channel as aiormq handles them: the way without a tap."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import AMQPError, DeliveryError
from aiormq.exceptions import PublishError as Returned
from pamqp.commands import Basic

from brokertask.envelope import Message
from brokertask.errors import InvalidPayload
from brokertask.topology import Route
from brokertask.transport.rabbitmq import failures
from brokertask.transport.rabbitmq.codec import forgive, message_of, properties_of
from brokertask.transport.rabbitmq.lane import RPC_TIMEOUT, Receive
from brokertask.transport.rabbitmq.waiting import is_blocked, raise_if_cancelled, until_unblocked


class PlainLane:
    """See `lane.Lane`."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        forgive()
        self._over = False
        self._in_flight: dict[str, asyncio.Event] = {}

    @property
    def ended(self) -> bool:
        """See `lane.Lane`."""
        return self._over or self.channel.is_closed

    async def publish(
        self, route: Route, message: Message, *, timeout: float, deadline: float, mandatory: bool
    ) -> None:
        """See `lane.Lane`."""
        connection = self.channel.connection
        async with self._alone(message.message_id):
            await until_unblocked(connection, deadline)
            try:
                async with asyncio.timeout_at(deadline):
                    await self.channel.basic_publish(
                        message.body,
                        exchange=route.exchange,
                        routing_key=route.key,
                        properties=properties_of(message, route),
                        mandatory=mandatory,
                        wait=False,
                    )
            except TimeoutError as error:
                blocked = await is_blocked(connection)
                raise failures.unanswered(timeout, blocked=blocked) from error
            except asyncio.CancelledError as error:
                raise_if_cancelled(error)
                raise failures.closed(error, route) from error
            except Returned as error:
                if mandatory:
                    raise failures.unroutable(route) from error
            except (TypeError, ValueError, struct.error) as error:
                raise InvalidPayload(f"a message property cannot be sent: {error}") from error
            except (AMQPError, OSError, RuntimeError) as error:
                if isinstance(error, DeliveryError) and isinstance(error.frame, Basic.Nack):
                    raise failures.refused(route) from error
                raise failures.closed(error, route) from error

    @asynccontextmanager
    async def _alone(self, message_id: str | None) -> AsyncIterator[None]:
        """Publish messages of one id one after the other.

        aiormq finds the publish that was returned by its message id: with two of one id in
        flight, the unroutable one would be reported as stored.
        """
        if message_id is None:
            yield
            return
        while (busy := self._in_flight.get(message_id)) is not None:
            await busy.wait()
        done = self._in_flight[message_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._in_flight[message_id]
            done.set()

    async def consume(self, queue: str, receive: Receive, *, no_ack: bool, wait: bool) -> str:
        """See `lane.Lane`; always waits."""

        async def hand_over(delivered: DeliveredMessage) -> None:
            tag, redelivered = delivered.delivery_tag or 0, bool(delivered.redelivered)
            receive(message_of(delivered), delivered.routing_key or "", tag, redelivered)

        consuming = await self.channel.basic_consume(
            queue, hand_over, no_ack=no_ack, timeout=RPC_TIMEOUT
        )
        return consuming.consumer_tag or ""

    async def cancel(self, consumer: str, *, wait: bool) -> None:
        """See `lane.Lane`."""
        if wait:
            await self.channel.basic_cancel(consumer, timeout=RPC_TIMEOUT)
        else:
            await self.channel.basic_cancel(consumer, nowait=True, timeout=RPC_TIMEOUT)

    async def ack(self, tag: int) -> None:
        """See `lane.Lane`."""
        with suppress(AMQPError, RuntimeError):
            await self.channel.basic_ack(tag, wait=False)

    async def reject(self, tag: int) -> None:
        """See `lane.Lane`."""
        with suppress(AMQPError, RuntimeError):
            await self.channel.basic_reject(tag, requeue=True, wait=False)

    def end(self) -> None:
        """See `lane.Lane`."""
        self._over = True
