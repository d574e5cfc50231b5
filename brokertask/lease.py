"""The hold of this worker on one run: the message that stands for it, and who may settle it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from brokertask.envelope import Envelope
from brokertask.transport.base import Delivery


@dataclass(slots=True, eq=False)
class Lease:
    """The latest message of a run that is in hands here.

    There is one delivery, unless the connection was lost meanwhile or the message was doubled.
    """

    envelope: Envelope
    """The message; replaced by the one that follows it once that is on the broker's disk."""
    deliveries: list[Delivery] = field(default_factory=list)
    since: float = 0.0
    """When its oldest delivery came, on the event loop's clock."""
    seq: int = 0
    """The highest sequence number that was published of the run here, perhaps in vain."""
    ending: bool = False
    """It is going to be settled: no move is worth waiting for any more."""
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the message is replaced, or settled for good."""
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a delivery joins."""

    @property
    def live(self) -> bool:
        """Whether there is a delivery that can still be settled."""
        for delivery in self.deliveries:  # noqa: SIM110 (nearly always one, asked four times a run)
            if delivery.live:
                return True
        return False

    def join(self, delivery: Delivery) -> None:
        """Take in one more delivery of the same message; it is settled with the others."""
        self.deliveries.append(delivery)
        self.joined.set()

    def end(self) -> None:
        """Let nobody wait for it any more: it is going to be settled."""
        self.ending = True
        self.joined.set()

    async def ack(self) -> None:
        """Settle every delivery. What follows the message is on the broker's disk, or nothing."""
        for delivery in self.deliveries:
            await delivery.ack()
