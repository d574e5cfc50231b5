"""A stand-in for a summary service across the network: slow, and down now and then."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Final

from workers.documents.text import summarise

OUTAGE_SHARE: Final = 0.35
MOST_FAILURES: Final = 2


class UpstreamUnavailable(Exception):
    """The service answered 503; asking again later helps."""


async def summary_of(text: str, *, attempt: int) -> str:
    """Return a summary after some 50 ms, or fail as a busy service would.

    Which texts it fails for, and for how many attempts, follows from the text alone, so that two
    demonstrations show the same.
    """
    seed = hashlib.sha256(text.encode()).digest()
    chance = random.Random(seed)
    await asyncio.sleep(chance.uniform(0.02, 0.08))
    failures = chance.randint(1, MOST_FAILURES) if chance.random() < OUTAGE_SHARE else 0
    if attempt <= failures:
        raise UpstreamUnavailable("503 Service Unavailable")
    return summarise(text)
