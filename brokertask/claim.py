"""The claim for content in the payload store: what stands in a message instead. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from brokertask.errors import EnvelopeError, PayloadTooLarge
from brokertask.values import MSGPACK, decode, pack

MAX_CONTENT_BYTES: Final = 1_073_741_824
"""Content is in memory as a whole, at both ends."""
CLAIM: Final = "application/vnd.brokertask.claim+msgpack"
"""The content type of a message whose payload is a claim; what it stands for is msgpack."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Claim:
    """What stands in a message for content in the store. One that is malformed cannot exist.

    Raises:
        ValueError: No such hash, or no such size.
    """

    sha256: str
    """Of the content, in lower-case hex."""
    size: int
    """Of the content, in bytes."""

    def __post_init__(self) -> None:
        if not (isinstance(self.sha256, str) and _SHA256.fullmatch(self.sha256)):
            raise ValueError("sha256 of a claim is 64 lower-case hex digits")
        if not (type(self.size) is int and 0 <= self.size <= MAX_CONTENT_BYTES):
            raise ValueError(f"size of a claim is 0 to {MAX_CONTENT_BYTES} bytes")

    @property
    def key(self) -> str:
        """Where the content is in its store: it follows from the hash, so it can't lead out."""
        return f"{self.sha256[:2]}/{self.sha256}"

    @staticmethod
    def of(data: bytes) -> Claim:
        """Return the claim for `data`. Cost: about 1 ms for a megabyte.

        Raises:
            PayloadTooLarge: It is over `MAX_CONTENT_BYTES`.
        """
        if len(data) > MAX_CONTENT_BYTES:
            raise PayloadTooLarge(
                f"{len(data)} bytes; the payload store takes up to {MAX_CONTENT_BYTES}: "
                "split it, or send a reference to where it is"
            )
        return Claim(hashlib.sha256(data).hexdigest(), len(data))

    def pack(self) -> bytes:
        """Return it as msgpack, some ninety bytes."""
        return pack({"sha256": self.sha256, "size": self.size})

    @staticmethod
    def unpack(data: bytes) -> Claim:
        """Return the claim that `pack` wrote.

        Raises:
            EnvelopeError: It is none; reason `undecodable` or `too_deep`.
        """
        return Claim.read(decode(data, MSGPACK))

    @staticmethod
    def read(raw: object) -> Claim:
        """Return the claim in a decoded map; fields that a newer version added are ignored.

        Raises:
            EnvelopeError: It is none; reason `undecodable`.
        """
        if not isinstance(raw, dict):
            raise EnvelopeError("a claim is a map", reason="undecodable")
        try:
            return Claim(raw.get("sha256", ""), raw.get("size", -1))
        except ValueError as error:
            raise EnvelopeError(str(error), reason="undecodable") from None
