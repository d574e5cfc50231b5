"""Writes the migration that makes a store's tables: `python -m infra.migration`.

While nothing is released there is one, and it is written anew when a table changes; from then on a
change is a revision of its own, behind it.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Final, Literal

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from brokertask.server.store.columns import Text
from brokertask.server.store.migration import FOLDER
from brokertask.server.store.schema import metadata

PAGE: Final = '''"""The tables of the first version. Written by `python -m infra.migration`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make them."""
    {body}
'''


def main() -> None:
    """Write it."""
    file = FOLDER / "initial.py"
    options: dict[str, Any] = {"render_item": rendered}
    with create_engine("sqlite://").connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        operations = produce_migrations(context, metadata).upgrade_ops
        assert operations is not None
        body = render_python_code(operations, render_item=rendered, migration_context=context)
    lines = [line for line in body.splitlines() if "###" not in line]
    file.write_text(PAGE.format(body="\n".join(lines).strip()))
    for step in (["format", "--quiet"], ["check", "--quiet", "--fix"]):
        subprocess.run([sys.executable, "-m", "ruff", *step, str(file)], check=True)
    print(f"{file} is written")


def rendered(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Render our own type as what it is in a database."""
    return "sa.Text()" if kind == "type" and isinstance(item, Text) else False


if __name__ == "__main__":
    main()
