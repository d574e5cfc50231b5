"""What a channel is to those who send and receive messages on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from aiormq.abc import AbstractChannel

from brokertask.envelope import Message
from brokertask.topology import Route

RPC_TIMEOUT: Final = 30.0
Receive: TypeAlias = Callable[[Message, str, int, bool], None]
"""Called with a message, the routing key it came with, its delivery tag, and whether it is
redelivered. Must return at once."""


class Lane(Protocol):
    """The messages of one channel, both ways. It ends with its channel; tags mean nothing after.

    `direct.DirectLane` handles their frames itself, `plain.PlainLane` leaves them to aiormq.
    """

    @property
    def channel(self) -> AbstractChannel:
        """For what is no message: declaring, QoS, closing."""
        ...

    @property
    def ended(self) -> bool:
        """Nothing can be sent any more."""
        ...

    async def publish(
        self, route: Route, message: Message, *, timeout: float, deadline: float, mandatory: bool
    ) -> None:
        """See `Transport.publish`; raises `BrokerUnavailable` if it ended before it was sent."""
        ...

    async def consume(self, queue: str, receive: Receive, *, no_ack: bool, wait: bool) -> str:
        """Begin a consumer, and return its tag.

        Without a `wait` for the broker's answer, that it fails shows in the end of the channel.
        Raises as aiormq does.
        """
        ...

    async def cancel(self, consumer: str, *, wait: bool) -> None:
        """End a consumer; with `wait`, nothing more comes to it afterwards."""
        ...

    async def ack(self, tag: int) -> None:
        """Settle a delivery. What was cancelled before is cancelled before it."""
        ...

    async def reject(self, tag: int) -> None:
        """Give a delivery back to its queue."""
        ...

    def end(self) -> None:
        """Send what is settled, and nothing after it; the channel is about to be closed."""
        ...
