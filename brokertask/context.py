"""What a task may know of the run it executes."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

log = logging.getLogger("brokertask.task")


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds `run_id`, `task`, `attempt` and `trace_id` to each record, as attributes."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message as it is, with the run's fields among its extras."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


@dataclass(slots=True, kw_only=True)
class Context:
    """The run a task executes in; ask for it with a parameter of this type."""

    run_id: str
    """The run's id: the same in every attempt, so a key against doing things twice."""
    task: str
    attempt: int = 1
    """Which attempt this is, 1-based."""
    max_attempts: int = 1
    payload: Any = None
    """The validated payload."""
    tags: tuple[str, ...] = ()
    triggered_at: datetime | None = None
    deadline: datetime | None = None
    """When this attempt is cancelled; None without a timeout."""
    parent: str | None = None
    """The id of the run that triggered this one, if one did."""
    root: str | None = None
    """The id of the first run of the tree, if this is not it."""
    worker: str = "local"
    trace_id: str | None = None
    state: Any = None
    """What the app's lifespan yielded: pools, clients, models."""
    cancelled: str | None = None
    """Why this attempt was cancelled, `timeout` or `drain`; threads should look at it."""
    log: RunLogger = field(init=False)

    def __post_init__(self) -> None:
        fields = {
            "run_id": self.run_id,
            "task": self.task,
            "attempt": self.attempt,
            "trace_id": self.trace_id,
        }
        self.log = RunLogger(log, fields)
