"""One `insert ... on conflict` for both databases: a row that is there is left, or replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Column, ColumnCollection, ColumnElement, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

Merged: TypeAlias = Mapping[str, ColumnElement[Any]]


async def put(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    newer: Column[Any] | None = None,
) -> None:
    """Insert rows, in their order; one whose primary key is there is left as it is.

    Args:
        connection: Within a transaction.
        table: Where to.
        rows: All with the same columns.
        newer: Replace a row if the new one has more in this column.
    """
    if not rows:
        return
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(table)
    if newer is None:
        await connection.execute(statement.on_conflict_do_nothing(), rows)
        return
    keys = [column.name for column in table.primary_key]
    new = statement.excluded
    values = {name: new[name] for name in rows[0] if name not in keys}
    newest = statement.on_conflict_do_update(
        index_elements=keys, set_=values, where=new[newer.name] > newer
    )
    await connection.execute(newest, rows)


async def merge(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    merged: Callable[[ColumnCollection[str, Any]], Merged],
) -> None:
    """Insert rows, in their order; one whose primary key is there gets what `merged` makes of both.

    Args:
        connection: Within a transaction.
        table: Where to.
        rows: All with the same columns.
        merged: Given the columns of the new row, returns what the old one is to hold.
    """
    if not rows:
        return
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    both = statement.on_conflict_do_update(
        index_elements=keys, set_=dict(merged(statement.excluded))
    )
    await connection.execute(both, rows)


async def put_new(connection: AsyncConnection, table: Table, row: Mapping[str, Any]) -> bool:
    """Insert one row; False if its primary key is there, and it is left as it is."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    done = await connection.execute(insert(table).values(dict(row)).on_conflict_do_nothing())
    return done.rowcount == 1
