"""The tables of jobs over frozen selections of runs."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, Table, text

from brokertask.server.store.columns import Text, metadata

bulk_jobs = Table(
    "bulk_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("action", Text, nullable=False),
    Column("options", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("total", Integer, nullable=False),
    Column("rate", Float),
    Column("reason", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("ended_ms", BigInteger),
    Column("server", Text),
    Column("claimed_ms", BigInteger),
    Index("bulk_jobs_newest", "created_ms", "id"),
    Index(
        "bulk_jobs_going",
        "created_ms",
        sqlite_where=text("ended_ms is null"),
        postgresql_where=text("ended_ms is null"),
    ),
)
bulk_items = Table(
    "bulk_items",
    metadata,
    Column("job", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("redrives", Integer),
    Column("detail", Text),
    Column("at_ms", BigInteger),
    Index("bulk_items_state", "job", "state", "number"),
)
