"""A server's store: SQLite in a file, or PostgreSQL. Only here are a database's errors known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from asyncpg import PostgresError
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from brokertask.errors import StoreUnavailable
from brokertask.server.store import migration

BUSY_TIMEOUT_MS: Final = 10_000
"""How long a writer waits for another process's transaction, on SQLite."""
OPEN_PAUSE: Final = 0.1
CONNECT_TIMEOUT: Final = 5.0
STATEMENT_TIMEOUT: Final = 60.0
"""Seconds that PostgreSQL has for an answer; a connection may be dead without saying so."""
PASSING_STATES: Final = frozenset({"08", "40", "53", "55", "57", "58"})
"""Classes of PostgreSQL's errors that the same statement may not meet again: a lost connection, a
deadlock, a full disk, a lock, a shutdown, a failing system."""
_PRAGMAS: Final = (
    "journal_mode=WAL",
    "synchronous=NORMAL",
    f"busy_timeout={BUSY_TIMEOUT_MS}",
    "foreign_keys=ON",
)


class Database:
    """A server's store. Writers of one process take turns on SQLite, which has one at a time.

    Args:
        url: Of PostgreSQL, or of a file for SQLite. Without a file, one that is gone at the end.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self._lite = parsed.get_backend_name() == "sqlite"
        self._begun = 0
        self._name = parsed.render_as_string(hide_password=True)
        self._turn = asyncio.Lock()
        self._folder: TemporaryDirectory[str] | None = None
        if not self._lite:
            self._engine = self._readers = create_async_engine(
                url,
                connect_args={"timeout": CONNECT_TIMEOUT, "command_timeout": STATEMENT_TIMEOUT},
                pool_pre_ping=True,
                pool_timeout=CONNECT_TIMEOUT,
            )
            return
        if not parsed.database or parsed.database == ":memory:":
            # In memory, a database would be gone with its one connection: at the first
            # transaction that is cancelled.
            self._folder = TemporaryDirectory(prefix="brokertask-")
            parsed = parsed.set(database=f"{self._folder.name}/server.db")
        Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
        self._engine = _lite_engine(parsed, begin="BEGIN IMMEDIATE")
        self._readers = _lite_engine(parsed, begin="BEGIN")

    async def open(self) -> None:
        """Connect, and make the tables of a store that has none.

        Raises:
            StoreUnavailable: It cannot be reached.
            StoreOutdated: Its tables are of another version than this one.
        """
        deadline = asyncio.get_running_loop().time() + BUSY_TIMEOUT_MS / 1000
        while True:
            try:
                async with self.begin() as connection:
                    return await connection.run_sync(migration.ensure)
            except StoreUnavailable as error:
                # SQLite does not wait for its turn to give a new file a WAL, but refuses.
                locked = self._lite and "locked" in str(error.__cause__)
                if not locked or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(OPEN_PAUSE)

    async def migrate(self) -> tuple[str | None, str]:
        """Lead its tables to this version; return the revisions before and after.

        Raises:
            StoreUnavailable: It cannot be reached.
            StoreOutdated: They are newer than this version.
        """
        async with self.begin() as connection:
            return await connection.run_sync(migration.migrate)

    @property
    def busy(self) -> bool:
        """Whether a transaction is under way."""
        return self._begun > 0

    async def close(self) -> None:
        """Disconnect."""
        await self._engine.dispose()
        await self._readers.dispose()
        if self._folder is not None:
            self._folder.cleanup()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Return a transaction that may write: committed at the end of the block.

        Raises:
            StoreUnavailable: The database is gone, or takes too long.
        """
        if not self._lite:
            async with self._transaction(self._engine) as connection:
                yield connection
            return
        async with self._turn, self._transaction(self._engine) as connection:
            yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Return a transaction that only reads, and waits for no writer.

        Raises:
            StoreUnavailable: The database is gone, or takes too long.
        """
        async with self._transaction(self._readers) as connection:
            yield connection

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        self._begun += 1
        try:
            with _translated(self._name):
                async with engine.begin() as connection:
                    yield connection
        finally:
            self._begun -= 1


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PostgresError, PoolTimeout, OSError) as error:
        if not _gone(error):
            raise
        raise StoreUnavailable(
            f"the store {name} cannot be used: {type(error).__name__}; look whether "
            "the database runs, and at BROKERTASK_SERVER_STORE_URL"
        ) from error


def _gone(error: Exception) -> bool:
    """Whether it is the database that fails, and not what it was asked."""
    if not isinstance(error, DBAPIError):
        return True
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(state, str):
        return state[:2] in PASSING_STATES
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def _lite_engine(url: URL, *, begin: str) -> AsyncEngine:
    engine = create_async_engine(url)

    def configure(connection: Any, _: Any) -> None:
        # Transactions are begun by ourselves: one that reads first could not go on to write.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine.sync_engine, "connect", configure)
    event.listen(engine.sync_engine, "begin", start)
    return engine
