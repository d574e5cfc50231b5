"""Which deliveries of one channel are settled, and the fewest frames that say so."""

from __future__ import annotations


class Acks:
    """Delivery tags count from 1. A range never runs ahead of a delivery that is not settled.

    A range must end at a tag that the broker still waits for; otherwise it closes the channel.
    """

    def __init__(self) -> None:
        self._next = 1
        self._fresh: list[int] = []
        # Settled already, beyond one that is not.
        self._told: set[int] = set()

    def add(self, tag: int) -> bool:
        """Settle a delivery; True for the first one since the last `take`."""
        self._fresh.append(tag)
        return len(self._fresh) == 1

    def skip(self, tag: int) -> None:
        """Count a delivery as settled in another way."""
        self._told.add(tag)

    def take(self) -> tuple[int, list[int]]:
        """Return the last tag of the range to ack, 0 for none, and the tags to ack one by one."""
        fresh, self._fresh = set(self._fresh), []
        told, upto = self._told, self._next
        last = 0
        while True:
            if upto in fresh:
                fresh.remove(upto)
                last = upto
            elif upto in told:
                told.remove(upto)
            else:
                break
            upto += 1
        self._next = upto
        told |= fresh
        return last, sorted(fresh)
