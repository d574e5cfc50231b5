"""What a delivery came to: a closed set of values, each settled in its way by `executor.settle`.

| outcome        | settled by                                                            |
| -------------- | --------------------------------------------------------------------- |
| Succeeded      | event, ack                                                            |
| Expired        | event, ack                                                            |
| Retrying       | publish the continuation to the delay ladder, confirmed; event, ack   |
| Sleeping       | publish the message to the delay ladder, confirmed; ack               |
| Failed         | publish to the dead-letter exchange, confirmed; event, ack            |
| Interrupted    | publish the message back to its queue, confirmed; ack: not counted    |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from brokertask.errors import Reason


@dataclass(frozen=True, slots=True)
class AttemptError:
    """What one attempt ended with; travels in the run's memory, never in headers."""

    attempt: int
    type: str
    message: str
    at_ms: int
    worker: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The task returned; `result` is already in msgpack."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Expired:
    """The run came too late to start."""


@dataclass(frozen=True, slots=True)
class Retrying:
    """The attempt failed and another follows after `delay` seconds."""

    delay: float
    error: AttemptError


@dataclass(frozen=True, slots=True)
class Sleeping:
    """The run is not due for `delay` more seconds; nothing has run."""

    delay: float


@dataclass(frozen=True, slots=True)
class Failed:
    """No attempt is left, or none would help."""

    reason: Reason
    error: AttemptError


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The worker is going away; the attempt does not count."""


Outcome: TypeAlias = Succeeded | Expired | Retrying | Sleeping | Failed | Interrupted
