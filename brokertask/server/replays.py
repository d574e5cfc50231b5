"""A run once more, as a new one: with its payload, or with another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from brokertask.claim import Claim
from brokertask.envelope import MAX_TAGS
from brokertask.server import history
from brokertask.server.resources import Resources
from brokertask.server.triggers import Wish
from brokertask.values import MSGPACK, decode

NOT_KEPT: Final = "its payload is not kept as it was: give another one, with `replace`"


@dataclass(frozen=True, slots=True)
class Given:
    """A payload that was given, whatever it is: None as well."""

    payload: object


async def replay(
    resources: Resources,
    row: Mapping[str, Any],
    *,
    given: Given | None = None,
    tags: Sequence[str] = (),
) -> Wish | None:
    """Return what is to be triggered for a run, given its row, to have it once more.

    It has the old one's tags, those that are given, and `replay:<run id>`. None if there is no
    other payload, and its own was redacted, left out or not seen: `NOT_KEPT`.

    Raises:
        PayloadUnavailable: Its own is in the payload store, which does not give it.
    """
    own = await _own(resources, row) if given is None else given
    if own is None:
        return None
    every = [*history.tags_of(row), *tags, f"replay:{row['run_id']}"][-MAX_TAGS:]
    return Wish(task=row["task"], payload=own.payload, tags=[tag for tag in every if _fits(tag)])


async def _own(resources: Resources, row: Mapping[str, Any]) -> Given | None:
    match row["payload_state"]:
        case "kept":
            return Given(decode(row["payload"], row["content_type"]))
        case "claim":
            stored = await resources.claims.get(Claim.unpack(row["payload"]))
            return Given(decode(stored, MSGPACK))
        case _:
            return None


def _fits(tag: str) -> bool:
    return tag.isprintable() and len(tag.encode()) <= 128
