"""When a failed attempt is tried again: a pure policy, asked once per failure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from brokertask.durations import Duration, seconds
from brokertask.errors import (
    Abort,
    ChildFailed,
    ConfigurationError,
    InvalidOption,
    PayloadUnavailable,
    Reason,
    RetryAfter,
)

MAX_ATTEMPTS_LIMIT: Final = 1_000
Errors = type[BaseException] | Sequence[type[BaseException]]


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Either a delay in seconds, or the reason why the run is buried."""

    delay: float | None
    reason: Reason = "max_attempts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often, how late and after which errors a run is attempted again.

    The delay after a failed attempt is `min(max_delay, min_delay * factor ** (attempt - 1))`,
    with jitter uniform in [0.5, 1.0] of it: the spread survives the cap. Without jitter,
    `Retry(max_attempts=5)` waits 1, 2, 4, 8 s.

    A lost worker counts as an attempt. With `max_attempts=1` a run is never started twice: one
    whose worker or broker died in the middle goes to the dead letters.
    """

    max_attempts: int = 3
    """Attempts in all, the first included; 1 to 1000."""
    factor: float = 2.0
    """Growth from one delay to the next; 1 or more."""
    min_delay: Duration = 1.0
    max_delay: Duration = 60.0
    jitter: bool = True
    on: Errors = Exception
    """Retry only these; and `PayloadUnavailable`, which is not the task's own failure."""
    never_on: Errors = field(default=())
    """Do not retry these, even when `on` names them."""

    def __post_init__(self) -> None:
        attempts = self.max_attempts
        if not (isinstance(attempts, int) and 1 <= attempts <= MAX_ATTEMPTS_LIMIT):
            raise InvalidOption(
                f"Retry: max_attempts is 1 to {MAX_ATTEMPTS_LIMIT}, not {attempts!r}"
            )
        if not (isinstance(self.factor, int | float) and 1 <= self.factor <= 1_000):
            raise InvalidOption(f"Retry: factor is 1 to 1000, not {self.factor!r}")
        object.__setattr__(self, "min_delay", seconds(self.min_delay))
        object.__setattr__(self, "max_delay", seconds(self.max_delay))
        object.__setattr__(self, "on", _classes("on", self.on))
        object.__setattr__(self, "never_on", _classes("never_on", self.never_on))
        if seconds(self.max_delay) < seconds(self.min_delay):
            raise InvalidOption("Retry: max_delay is shorter than min_delay")

    def decide(self, attempt: int, error: BaseException) -> RetryDecision:
        """Return what follows after attempt number `attempt` (1-based) raised `error`."""
        if isinstance(error, Abort):
            return RetryDecision(None, "aborted")
        if not isinstance(error, RetryAfter) and not self._retries(error):
            return RetryDecision(None, "never_retried")
        if attempt >= self.max_attempts:
            return RetryDecision(None, "max_attempts")
        if isinstance(error, RetryAfter):
            return RetryDecision(error.delay)
        return RetryDecision(self.backoff(attempt) * (random.uniform(0.5, 1) if self.jitter else 1))

    def _retries(self, error: BaseException) -> bool:
        # The code, the settings or a child have to change first.
        never = (*_classes("never_on", self.never_on), ConfigurationError, ChildFailed)
        wanted = (*_classes("on", self.on), PayloadUnavailable)
        return isinstance(error, wanted) and not isinstance(error, never)

    def backoff(self, attempt: int) -> float:
        """Return the seconds to wait after attempt `attempt`, before jitter.

        >>> [Retry(max_attempts=5, max_delay=5).backoff(attempt) for attempt in (1, 2, 3, 4)]
        [1.0, 2.0, 4.0, 5.0]
        """
        shortest = seconds(self.min_delay)
        try:
            grown = shortest * self.factor ** (attempt - 1)
        except OverflowError:
            grown = math.inf if shortest else 0.0
        return min(seconds(self.max_delay), grown)


def _classes(name: str, errors: Errors) -> tuple[type[BaseException], ...]:
    classes: Iterable[object] = (errors,)
    if isinstance(errors, Iterable) and not isinstance(errors, type):
        classes = errors
    found = []
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, BaseException)):
            raise InvalidOption(f"Retry: {name} takes exception classes, not {cls!r}")
        found.append(cls)
    return tuple(found)
