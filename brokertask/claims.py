"""What leaves messages for the payload store, and comes back: the store as one app uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from brokertask.claim import Claim
from brokertask.errors import PayloadUnavailable
from brokertask.payloads import PayloadStore, open_store

PUTS: Final = 16
"""How much of one `trigger_many` is on its way to the store at a time."""


class Claims:
    """Gives claims for what is too large for a message, and redeems them.

    Without a store, everything stays in its message, and no claim can be redeemed.
    """

    def __init__(self, url: str | None = None, *, above: int = 65_536) -> None:
        self._url = url
        self._above = above
        self._store: PayloadStore | None = None

    def open(self) -> PayloadStore | None:
        """Return the store, if there is one; nothing is connected yet.

        Raises:
            ConfigurationError: The setting is wrong, or what the store needs is not installed.
        """
        if self._store is None and self._url is not None:
            self._store = open_store(self._url)
        return self._store

    def takes(self, size: int) -> bool:
        """Whether content of so many bytes leaves its message."""
        return self._url is not None and size > self._above

    async def put(self, content: bytes) -> Claim | None:
        """Return the claim for content that is in the store now; None if it stays in its message.

        Raises:
            PayloadTooLarge: It is too large for the store.
            PayloadUnavailable: The store cannot be reached, or refuses.
        """
        if not self.takes(len(content)):
            return None
        (claim,) = await self.put_all([content])
        return claim

    async def put_all(self, contents: Sequence[bytes]) -> list[Claim | None]:
        """Do what `put` does for several, side by side; what is equal is put once."""
        large = {content for content in contents if self.takes(len(content))}
        store = self.open() if large else None
        if store is None:
            return [None] * len(contents)
        limit = asyncio.Semaphore(PUTS)

        async def put(content: bytes) -> Claim:
            async with limit:
                return await store.put(content)

        puts = {content: asyncio.ensure_future(put(content)) for content in large}
        try:
            await asyncio.gather(*puts.values())
        finally:
            for each in puts.values():
                each.cancel()
        return [puts[content].result() if content in puts else None for content in contents]

    async def get(self, claim: Claim) -> bytes:
        """Return what a claim stands for.

        Raises:
            PayloadUnavailable: There is no store here, or it does not give it.
        """
        store = self.open()
        if store is None:
            raise PayloadUnavailable(
                f"{claim.size} bytes are in a payload store, and none is configured here: set "
                "BROKERTASK_PAYLOAD_STORE to the one of whoever put them there"
            )
        return await store.get(claim)

    def where(self, claim: Claim) -> str | None:
        """Return where the content of a claim is, for people; None without a store."""
        return None if self._url is None else f"{self._url.rstrip('/')}/{claim.key}"
