"""Stand-ins for services across the network: where documents are, and who sums them up.

The second is slow, takes few requests at a time, and is down now and then.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from brokertask import Abort
from workers.documents.accesslog import tell
from workers.documents.text import summarise

LATENCY: Final = 0.05
AT_A_TIME: Final = 4
"""So many summaries does one process get at a time; the next request is told to come back."""
OUTAGE_SHARE: Final = 0.35
MOST_FAILURES: Final = 2
_serving: Final = asyncio.Semaphore(AT_A_TIME)


class UpstreamError(Exception):
    """A service does not do what it was asked for, and may do it later."""


class UpstreamBusy(UpstreamError):
    """It answered 429; a moment later it has time."""


class UpstreamUnavailable(UpstreamError):
    """It answered 503; that takes longer."""


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks, as in the headers of a request."""

    run_id: str
    attempt: int


def fetch(path: Path, request: Request) -> str:
    """Return the text of a document; a retry does not help one that is no text."""
    tell(request.run_id, "fetched")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Abort(f"{path.name} is not text: {error.reason} at byte {error.start}") from error


async def summary_of(text: str, request: Request) -> str:
    """Return a summary after some 600 ms, or fail as a busy service would.

    Which texts it is down for, and for how many attempts, follows from the text alone, so that
    two demonstrations show the same.
    """
    chance = random.Random(hashlib.sha256(text.encode()).digest())
    await asyncio.sleep(LATENCY)
    if _serving.locked():
        tell(request.run_id, "busy")
        raise UpstreamBusy("429 Too Many Requests")
    async with _serving:
        tell(request.run_id, "asked")
        await asyncio.sleep(chance.uniform(0.3, 0.9))
    failures = chance.randint(1, MOST_FAILURES) if chance.random() < OUTAGE_SHARE else 0
    if request.attempt <= failures:
        tell(request.run_id, "down")
        raise UpstreamUnavailable("503 Service Unavailable")
    tell(request.run_id, "answered")
    return summarise(text)
