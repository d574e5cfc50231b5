"""The audit log: every action and every payload that was shown, and by whom.

A row is written before anything is done, and its status after: an action without a status was
begun, and its server died. What was asked with, such as a payload, is never in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.server.api.auth import Principal
from brokertask.server.store.schema import audit


async def begin(
    connection: AsyncConnection,
    principal: Principal,
    *,
    identity: str,
    action: str,
    target: str,
    reason: str | None,
    address: str | None,
    now_ms: int,
) -> None:
    """Write down that somebody is about to do something."""
    await connection.execute(
        insert(audit).values(
            id=identity,
            at_ms=now_ms,
            actor=principal.name,
            token=principal.token,
            role=principal.role,
            address=address,
            action=action,
            target=target,
            reason=reason,
        )
    )


async def end(connection: AsyncConnection, identity: str, status: int) -> None:
    """Write down what came of it, as an HTTP status."""
    await connection.execute(update(audit).where(audit.c.id == identity).values(status=status))


async def listed(
    connection: AsyncConnection,
    only: Mapping[str, str],
    *,
    before: tuple[int, str] | None,
    limit: int,
) -> list[dict[str, Any]]:
    """Return entries, the latest first, from behind the row with these keys.

    Args:
        connection: To read from.
        only: Columns and what each has to be.
        before: The instant and the id of the row, in ms.
        limit: How many at most.
    """
    wanted = select(audit).order_by(audit.c.at_ms.desc(), audit.c.id.desc()).limit(limit)
    for column, value in only.items():
        wanted = wanted.where(audit.c[column] == value)
    if before is not None:
        wanted = wanted.where(tuple_(audit.c.at_ms, audit.c.id) < before)
    return [dict(row._mapping) for row in await connection.execute(wanted)]
