"""Every table of a server's store. Instants are ms since the epoch."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    Table,
    text,
)

from brokertask.server.store.bulk import bulk_items as bulk_items
from brokertask.server.store.bulk import bulk_jobs as bulk_jobs
from brokertask.server.store.columns import Text
from brokertask.server.store.columns import metadata as metadata

# -- runs: what is known of each, and of its attempts

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("task", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("place", BigInteger, nullable=False),
    Column("asked_place", BigInteger, nullable=False),
    Column("noted_ms", BigInteger, nullable=False),
    Column("done_ms", BigInteger, nullable=False),
    Column("redrives", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("triggered_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger),
    Column("ended_ms", BigInteger),
    Column("worker", Text),
    Column("reason", Text),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("fingerprint", Text),
    Column("waits", LargeBinary),
    Column("done", Float),
    Column("total", Float),
    Column("notes", LargeBinary),
    Column("tags", Text, nullable=False),
    Column("parent", Text),
    Column("root", Text),
    Column("trace_id", Text),
    Column("app_id", Text),
    Column("payload", LargeBinary),
    Column("content_type", Text),
    Column("payload_state", Text),
    Column("discarded_ms", BigInteger),
    Index("runs_newest", "triggered_ms", "run_id"),
    Index("runs_status", "status", "triggered_ms", "run_id"),
    Index("runs_task", "task", "status", "triggered_ms", "run_id"),
    # Most runs have none of these.
    *(
        Index(
            f"runs_{name}",
            name,
            "triggered_ms",
            "run_id",
            sqlite_where=text(f"{name} is not null"),
            postgresql_where=text(f"{name} is not null"),
        )
        for name in ("parent", "root", "trace_id", "worker", "fingerprint")
    ),
    # What statistics read of the latest ends is in the indices: no row of a run is looked up.
    *(
        Index(
            name,
            *columns,
            sqlite_where=text("ended_ms is not null"),
            postgresql_where=text("ended_ms is not null"),
        )
        for name, columns in (
            ("runs_ended", ("ended_ms", "task", "status", "attempt", "triggered_ms")),
            ("runs_task_ended", ("task", "ended_ms", "status", "attempt", "triggered_ms")),
        )
    ),
    Index(
        "runs_dead",
        *("ended_ms", "task", "fingerprint", "redrives", "run_id"),
        sqlite_where=text("status = 'failed' and discarded_ms is null"),
        postgresql_where=text("status = 'failed' and discarded_ms is null"),
    ),
    Index(
        "runs_failing",
        "triggered_ms",
        "run_id",
        sqlite_where=text("error_type is not null"),
        postgresql_where=text("error_type is not null"),
    ),
)
run_tags = Table(
    "run_tags",
    metadata,
    Column("tag", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("triggered_ms", BigInteger, nullable=False),
    Column("place", BigInteger, nullable=False),
    Index("run_tags_newest", "tag", "triggered_ms", "run_id"),
    Index("run_tags_run", "run_id"),
)
attempts = Table(
    "attempts",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("outcome", Text, nullable=False),
    Column("worker", Text, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("delay_ms", BigInteger),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("traceback", Text),
)
known_tasks = Table(
    "known_tasks",
    metadata,
    Column("task", Text, primary_key=True),
    Column("since_ms", BigInteger, nullable=False),
    Column("schemas", Text),
    Column("schemas_ms", BigInteger),
)

beginnings = Table(
    "beginnings",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("worker", Text, nullable=False),
    Column("began_ms", BigInteger, nullable=False),
)
steps = Table(
    "steps",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("redrives", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("result", LargeBinary),
)
log_lines = Table(
    "log_lines",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("worker", Text, primary_key=True),
    Column("batch_ms", BigInteger, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("level", Text, nullable=False),
    Column("text", Text, nullable=False),
    Index("log_lines_read", "run_id", "at_ms", "batch_ms", "number"),
)
workers = Table(
    "workers",
    metadata,
    Column("worker", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),
    Column("tasks", LargeBinary, nullable=False),
    Column("version", Text, nullable=False),
)

servers = Table(
    "servers",
    metadata,
    Column("server", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),
    Column("lag_ms", BigInteger, nullable=False),
)

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
    Index("signals_at", "at_ms"),
)
asks = Table(
    "asks",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("reply_to", Text, primary_key=True),
    Column("since_ms", BigInteger, nullable=False),
)

# -- control: what was said to all workers, as long as it holds

cancels = Table(
    "cancels",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("children", Boolean, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Index("cancels_at", "at_ms"),
)
pauses = Table(
    "pauses",
    metadata,
    Column("task", Text, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
)

# -- admission: the keys of triggers that a server decides on

keys = Table(
    "keys",
    metadata,
    Column("task", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("due_ms", BigInteger),
    Column("message", LargeBinary),
    Index("keys_expires", "expires_ms"),
    Index("keys_due", "due_ms"),
)

# -- schedules, and what became of their ticks

schedules = Table(
    "schedules",
    metadata,
    Column("name", Text, primary_key=True),
    Column("task", Text, nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("payload", LargeBinary),
    Column("declared", Boolean, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("tick_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger, nullable=False),
    Column("checked_ms", BigInteger, nullable=False),
    Column("run_id", Text),
    Column("run_ms", BigInteger),
    Column("created_ms", BigInteger, nullable=False),
    Column("changed_ms", BigInteger, nullable=False),
    Index("schedules_due", "due_ms"),
    Index("schedules_task", "task"),
)
ticks = Table(
    "ticks",
    metadata,
    Column("schedule", Text, primary_key=True),
    Column("tick_ms", BigInteger, primary_key=True),
    Column("outcome", Text, nullable=False),
    Column("run_id", Text),
    Column("until_ms", BigInteger),
    Column("decided_ms", BigInteger, nullable=False),
)

# -- api: who may ask, and what was asked for

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("role", Text, nullable=False),
    Column("payloads", Boolean, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
    Column("used_ms", BigInteger),
)
console_sessions = Table(
    "console_sessions",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("token", Text, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Index("console_sessions_until", "until_ms"),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Text, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("token", Text),
    Column("role", Text, nullable=False),
    Column("address", Text),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("reason", Text),
    Column("status", Integer),
    Index("audit_at", "at_ms", "id"),
)

# -- outbox: messages that follow from what was written with them

outbox = Table(
    "outbox",
    metadata,
    # SQLite counts up by itself in a column of this type only.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("exchange", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("also", LargeBinary, nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("due_ms", BigInteger),
    Column("claimed_ms", BigInteger),
    Index("outbox_due", "due_ms"),
)
