"""Pulses: that something has happened, told twice a second at most, however much it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Final

from brokertask.events import Event
from brokertask.server.api.hub import Hub
from brokertask.server.api.stream import BEAT, BEATING

PAUSE: Final = 0.5


async def pulses(hub: Hub, wanted: Callable[[Event], bool]) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events named `changed`, with the instant of the latest that happened.

    It ends when events were lost: a browser connects again, and asks for what is there.
    """
    async with hub.watch(wanted) as heard:
        yield BEATING
        while True:
            try:
                async with asyncio.timeout(BEAT):
                    event = await heard.get()
            except TimeoutError:
                yield BEATING
                continue
            while event is not None and not heard.empty():
                event = heard.get_nowait()
            if event is None:
                return
            yield f'event: changed\ndata: {{"at_ms": {event.at_ms}}}\n\n'.encode()
            await asyncio.sleep(PAUSE)
