"""Types of columns that both databases take in the same way."""

from __future__ import annotations

import sqlalchemy
from sqlalchemy import Dialect, MetaData
from sqlalchemy.types import TypeDecorator

metadata = MetaData()
"""What all tables are in."""
_TOLD = str.maketrans({"\x00": "\ufffd"})


class Text(TypeDecorator[str]):
    """Text as runs and workers tell it: what PostgreSQL would refuse of it is replaced.

    A zero or half a surrogate pair in one error message must not keep a batch from being written.
    """

    impl = sqlalchemy.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return what both databases take."""
        if value is None or (value.isascii() and "\x00" not in value):
            return value
        return value.translate(_TOLD).encode(errors="replace").decode()
