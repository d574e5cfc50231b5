"""A server's store: SQLite in a file, or PostgreSQL. Only here are SQLAlchemy's errors known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from brokertask.errors import StoreUnavailable
from brokertask.server.store.schema import metadata

BUSY_TIMEOUT_MS: Final = 10_000
"""How long a writer waits for another process's transaction, on SQLite."""
CONNECT_TIMEOUT: Final = 5.0
_PRAGMAS: Final = (
    "journal_mode=WAL",
    "synchronous=NORMAL",
    f"busy_timeout={BUSY_TIMEOUT_MS}",
    "foreign_keys=ON",
)


class Database:
    """A server's store. Transactions of one process take turns on SQLite, which has one writer."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self._lite = parsed.get_backend_name() == "sqlite"
        self._name = parsed.render_as_string(hide_password=True)
        if self._lite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        # On SQLite nothing is to be waited for: one transaction at a time has its turn.
        remote: dict[str, Any] = {
            "connect_args": {"timeout": CONNECT_TIMEOUT},
            "pool_pre_ping": True,
            "pool_timeout": CONNECT_TIMEOUT,
        }
        self._engine = create_async_engine(url, **({} if self._lite else remote))
        self._turn = asyncio.Lock()
        if self._lite:
            event.listen(self._engine.sync_engine, "connect", _configure)
            event.listen(self._engine.sync_engine, "begin", _begin)

    async def open(self) -> None:
        """Connect, and make the tables that are missing.

        Raises:
            StoreUnavailable: It cannot be reached.
        """
        async with self.begin() as connection:
            await connection.run_sync(metadata.create_all)

    async def close(self) -> None:
        """Disconnect."""
        await self._engine.dispose()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Return a transaction that may write: committed at the end of the block.

        Raises:
            StoreUnavailable: The database is gone, or takes too long.
        """
        async with AsyncExitStack() as stack:
            if self._lite:
                await stack.enter_async_context(self._turn)
            try:
                connection = await stack.enter_async_context(self._engine.begin())
                yield connection
                await stack.aclose()
            except (SQLAlchemyError, OSError, PoolTimeout) as error:
                if not _gone(error):
                    raise
                raise StoreUnavailable(
                    f"the store {self._name} cannot be used: {type(error).__name__}; look whether "
                    "the database runs, and at BROKERTASK_SERVER_STORE_URL"
                ) from error


def _gone(error: Exception) -> bool:
    """Whether it is the database that fails, and not what it was asked."""
    if isinstance(error, DBAPIError) and not isinstance(error, InterfaceError):
        return error.connection_invalidated or type(error).__name__ in (
            "OperationalError",
            "InternalError",
        )
    return isinstance(error, OSError | PoolTimeout | InterfaceError)


def _configure(connection: Any, _: Any) -> None:
    # Transactions are begun by ourselves, to write: one that reads first could not go on to.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
