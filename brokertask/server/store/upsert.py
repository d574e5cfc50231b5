"""One `insert ... on conflict` for both databases: a row that is there is left, or replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

ROWS: int = 500
"""Rows of one statement; SQLite takes 32,766 values in one."""


async def put(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    newer: Column[Any] | None = None,
) -> None:
    """Insert rows; one whose primary key is there is left as it is.

    Args:
        connection: Within a transaction.
        table: Where to.
        rows: All with the same columns.
        newer: Replace a row if the new one has more in this column.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    for at in range(0, len(rows), ROWS):
        statement = insert(table).values([dict(row) for row in rows[at : at + ROWS]])
        if newer is None:
            statement = statement.on_conflict_do_nothing()
        else:
            keys = [column.name for column in table.primary_key]
            new = statement.excluded
            values = {name: new[name] for name in rows[0] if name not in keys}
            statement = statement.on_conflict_do_update(
                index_elements=keys, set_=values, where=new[newer.name] > newer
            )
        await connection.execute(statement)


async def put_new(connection: AsyncConnection, table: Table, row: Mapping[str, Any]) -> bool:
    """Insert one row; False if its primary key is there, and it is left as it is."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    done = await connection.execute(insert(table).values(dict(row)).on_conflict_do_nothing())
    return done.rowcount == 1
