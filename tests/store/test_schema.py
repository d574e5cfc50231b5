"""What migrations make is what the code asks for; a store of another version is refused."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from brokertask.errors import StoreOutdated
from brokertask.server.store import migration
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import metadata

pytestmark = pytest.mark.anyio


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return list(compare_metadata(context, metadata))


async def test_migrations_make_the_tables_that_the_code_asks_for(store: Database) -> None:
    async with store.begin() as connection:
        found = await connection.run_sync(differences)
    assert not found, "run `python -m infra.migration`"


async def test_servers_that_start_at_once_make_the_tables_once(store_url: str) -> None:
    stores = [Database(store_url) for _ in range(5)]
    try:
        await asyncio.gather(*(store.open() for store in stores))
    finally:
        await asyncio.gather(*(store.close() for store in stores))


async def test_a_store_of_another_version_is_refused(store: Database) -> None:
    assert await store.migrate() == ("0001", "0001")
    async with store.begin() as connection:
        await connection.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(StoreOutdated, match="update brokertask"):
        await store.open()
    with pytest.raises(StoreOutdated, match="update brokertask"):
        await store.migrate()


async def test_a_store_that_is_behind_is_refused_until_it_is_migrated(
    store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _next_version(tmp_path)
    store = Database(store_url)
    try:
        await store.open()
        monkeypatch.setattr("brokertask.server.store.migration.FOLDER", folder)
        with pytest.raises(StoreOutdated, match="brokertask migrate"):
            await store.open()
        assert await store.migrate() == ("0001", "0002")
        await store.open()
        async with store.read() as connection:
            assert (await connection.execute(text("select * from later"))).all() == []
    finally:
        await store.close()


def _next_version(folder: Path) -> Path:
    """Return migrations with one more than there is."""
    versions = folder / "migrations"
    shutil.copytree(migration.FOLDER, versions, ignore=shutil.ignore_patterns("__pycache__"))
    (versions / "later.py").write_text(
        "import sqlalchemy as sa\n"
        "from alembic import op\n"
        'revision, down_revision = "0002", "0001"\n'
        "def upgrade():\n"
        '    op.create_table("later", sa.Column("id", sa.Integer(), primary_key=True))\n'
    )
    return versions
