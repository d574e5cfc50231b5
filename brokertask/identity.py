"""What a run is known by: its id, made or chosen, and its tags."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from brokertask.envelope import MAX_ID, MAX_TAGS
from brokertask.errors import InvalidOption


def uuid7(now_ms: int) -> str:
    """Return a new UUID version 7: sortable by time, unique without coordination.

    Source: RFC 9562, section 5.7.
    """
    rest = secrets.randbits(74)
    value = (now_ms & (1 << 48) - 1) << 80 | 7 << 76 | (rest >> 62) << 64 | 2 << 62
    text = f"{value | rest & (1 << 62) - 1:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def checked_id(run_id: str) -> str:
    """Return a run id that a caller chose, or raise `InvalidOption`."""
    if not _is_label(run_id):
        raise InvalidOption(
            f"a run id is printable text of 1 to {MAX_ID} bytes, not {run_id!r:.40}"
        )
    return run_id


def checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Return the tags of a run, or raise `InvalidOption`."""
    if isinstance(tags, str):
        raise InvalidOption(f"tags are a list of texts, not one text: [{tags[:40]!r}]")
    if len(tags) > MAX_TAGS or not all(_is_label(tag) for tag in tags):
        raise InvalidOption(f"at most {MAX_TAGS} tags, each printable text of 1 to {MAX_ID} bytes")
    return tuple(tags)


def _is_label(text: object) -> bool:
    return isinstance(text, str) and text.isprintable() and 0 < len(text.encode()) <= MAX_ID
