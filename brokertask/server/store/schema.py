"""Every table of a server's store. Instants are ms since the epoch."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, Table, Text

metadata = MetaData()

# -- waits: runs that wait, and what they wait for

parked = Table(
    "parked",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("task", Text, nullable=False),
    Column("message", LargeBinary),
    Column("state", Text, nullable=False),
    Column("triggered_ms", BigInteger, nullable=False),
    Column("since_ms", BigInteger, nullable=False),
    Column("wake_ms", BigInteger),
    Index("parked_wake", "wake_ms"),
)
waits = Table(
    "waits",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("spec", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("since_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger),
    Column("over_ms", BigInteger),
    Index("waits_due", "due_ms"),
)
conditions = Table(
    "conditions",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Index("conditions_subject", "kind", "subject"),
)
endings = Table(
    "endings",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("task", Text, nullable=False),
    Column("redrives", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
tokens = Table(
    "tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run_id", Text),
    Column("name", Text),
    Column("state", Text, nullable=False),
    Column("value", LargeBinary),
    Column("reason", Text),
    Column("created_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger),
    Column("decided_ms", BigInteger),
    Column("decided_by", Text),
    Index("tokens_run", "run_id"),
)
signals = Table(
    "signals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Index("signals_key", "key", "at_ms"),
)
asks = Table(
    "asks",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("reply_to", Text, primary_key=True),
    Column("since_ms", BigInteger, nullable=False),
)
