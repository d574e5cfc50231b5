"""The schema of a store, by alembic: made where there is none, and led on by `brokertask migrate`.

A server makes the tables of an empty store by itself, and refuses one that is older or newer than
itself: what migrates is told to by somebody who knows that the other servers are of that version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from brokertask.errors import StoreOutdated

FOLDER: Final = Path(__file__).parent / "migrations"
LOCK: Final = 0x62_72_6F_6B_65_72
"""Of PostgreSQL: servers that start at once make its tables one after the other."""


def ensure(connection: Connection) -> None:
    """Make the tables of an empty store; one that has some is left as it is.

    Raises:
        StoreOutdated: They are of another version than this one.
    """
    script = _script()
    _lock(connection)
    found = _revision(connection)
    if found is None:
        _upgrade(connection, script)
    elif found != script.get_current_head():
        _refuse_newer(found, script)
        raise StoreOutdated(
            f"the store's schema is {found}, and this version needs {script.get_current_head()}: "
            "stop the servers, then run `brokertask migrate`"
        )


def migrate(connection: Connection) -> tuple[str | None, str]:
    """Lead the schema to this version; return the revisions before and after.

    Raises:
        StoreOutdated: It is newer than this version.
    """
    script = _script()
    _lock(connection)
    found = _revision(connection)
    if found is not None:
        _refuse_newer(found, script)
    _upgrade(connection, script)
    return found, str(script.get_current_head())


def _refuse_newer(found: str, script: ScriptDirectory) -> None:
    if found not in {each.revision for each in script.walk_revisions()}:
        raise StoreOutdated(
            f"the store's schema is {found}, which this version does not know: update brokertask"
        )


def _script() -> ScriptDirectory:
    return ScriptDirectory(str(FOLDER), version_locations=[str(FOLDER)])


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": LOCK})


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection, script: ScriptDirectory) -> None:
    def steps(revision: Any, _: Any) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()
