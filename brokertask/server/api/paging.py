"""Pages: a list from where the last page ended, by the keys of its last row. No page is counted."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Generic, TypeAlias, TypeVar

from pydantic import BaseModel, Field, StringConstraints

from brokertask.server.api.operations import Strict
from brokertask.server.api.problems import Problem

T = TypeVar("T")

MAX_LIMIT: Final = 500
MAX_CURSOR: Final = 1_000
Cursor: TypeAlias = Annotated[
    str, StringConstraints(max_length=MAX_CURSOR, pattern=r"^[A-Za-z0-9_-]*$")
]


class PageQuery(Strict):
    """Which page."""

    limit: int = Field(default=50, ge=1, le=MAX_LIMIT)
    """How many at most."""
    cursor: Cursor | None = None
    """`next` of the page before."""


class Page(BaseModel, Generic[T]):
    """Some of a list."""

    items: list[T]
    next: str | None = None
    """The cursor of the next page; null at the end."""


def cursor_of(*keys: str | int) -> str:
    """Return the cursor that stands for what comes behind a row with these keys."""
    return base64.urlsafe_b64encode(json.dumps(keys).encode()).decode().rstrip("=")


def keys_of(cursor: str, kinds: Sequence[type[Any]]) -> tuple[Any, ...]:
    """Return the keys in a cursor, each of its kind.

    Raises:
        Problem: It is none of this list.
    """
    try:
        keys = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        keys = None
    if not (
        isinstance(keys, list)
        and len(keys) == len(kinds)
        and all(
            type(key) is kind and (kind is not int or abs(key) < 2**63)
            for key, kind in zip(keys, kinds, strict=True)
        )
        and all("\0" not in key for key in keys if isinstance(key, str))
    ):
        raise Problem("invalid", "query.cursor: it is not the `next` of a page of this list")
    return tuple(keys)
