"""What a trigger may be given beside its payload. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from brokertask.admission import Debounce, Singleton
from brokertask.durations import Duration


class ChildOptions(TypedDict, total=False):
    """What `trigger_many`, `task.call` and `task.map` take beside payloads."""

    delay: Duration
    """Start no sooner than after this long."""
    expires: Duration
    """Do not start later than after this long; the run then ends as expired."""
    tags: Sequence[str]
    """Up to 32 short labels, carried along and shown."""


class TriggerOptions(ChildOptions, total=False):
    """What `trigger` takes beside the payload."""

    run_id: str
    """The run's id, to repeat a trigger whose answer is unknown. Default: a new UUIDv7."""
    idempotency_key: str
    """Of triggers with the same key only the first makes a run; a server decides."""
    idempotency_ttl: Duration
    """How long the key is remembered after that; 24 hours by default."""
    debounce: Debounce
    """One run for those that come in quick succession; a server decides."""
    singleton: Singleton
    """No run while another one of this key is unfinished; a server decides."""
