"""What a delivery came to: a closed set of values, each settled in its way by `executor.settle`.

| outcome        | settled by                                                              |
| -------------- | ----------------------------------------------------------------------- |
| Succeeded      | event, ack                                                              |
| Expired        | event, ack                                                              |
| Cancelled      | event, ack                                                              |
| Retrying       | publish the next attempt to the delay ladder, confirmed; event, ack     |
| Early          | publish the message to the delay ladder, confirmed; ack                 |
| Sleeping       | publish the run, as far as it is, to the ladder, confirmed; event, ack  |
| Waiting        | publish the run, as far as it is, to the server, confirmed; event, ack   |
| Failed         | publish to the dead-letter exchange, confirmed; event, ack              |
| Interrupted    | publish the message back to its queue, confirmed; ack: not counted      |
| Repeated       | ack                                                                     |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from brokertask.claim import Claim
from brokertask.errors import Reason
from brokertask.values import LAST_INSTANT_MS


@dataclass(frozen=True, slots=True)
class AttemptError:
    """What one attempt ended with; travels in the run's memory, never in headers."""

    attempt: int
    type: str
    message: str
    at_ms: int
    worker: str
    traceback: str = ""

    @staticmethod
    def read(raw: Any) -> AttemptError:
        """Return the error in a decoded map; fields that a newer version added are ignored.

        Raises:
            TypeError: It is no such map.
        """
        if not isinstance(raw, dict):
            raise TypeError("an error is a map")
        values = {one.name: raw[one.name] for one in fields(AttemptError) if one.name in raw}
        for name, value in values.items():
            if name in ("attempt", "at_ms"):
                fits = isinstance(value, int) and 0 <= value <= LAST_INSTANT_MS
            else:
                fits = isinstance(value, str)
            if not fits:
                raise TypeError(f"{name} of an error is not what it should be")
        return AttemptError(**values)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The task returned."""

    result: bytes
    """In msgpack; nothing if a claim stands for it."""
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """The run came too late to start."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The run was cancelled before it came to another end."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Retrying:
    """The attempt failed and another follows after `delay` seconds."""

    delay: float
    error: AttemptError


@dataclass(frozen=True, slots=True)
class Early:
    """The message is not due for `delay` more seconds; nothing has run."""

    delay: float


@dataclass(frozen=True, slots=True)
class Sleeping:
    """The task asked to sleep: it goes on after `delay` seconds, behind its finished steps."""

    delay: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The task waits for what only a server hears of: it goes on behind its finished steps."""

    on: tuple[str, ...]
    """What it waits for, in the words of `wait.Target`: `call:charge`, `token:approval`."""
    due_ms: int | None = None
    """When a sleep beside it ends, in ms since the epoch; it goes on then at the latest."""


@dataclass(frozen=True, slots=True)
class Failed:
    """No attempt is left, or none would help."""

    reason: Reason
    error: AttemptError


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The worker is going away; the attempt does not count."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """The run was settled before, but the ack was lost with its connection."""


Outcome: TypeAlias = (
    Succeeded
    | Expired
    | Cancelled
    | Retrying
    | Early
    | Sleeping
    | Waiting
    | Failed
    | Interrupted
    | Repeated
)
