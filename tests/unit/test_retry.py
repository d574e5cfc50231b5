from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokertask import Abort, InvalidOption, Retry, RetryAfter
from brokertask.retry import RetryDecision

delays = st.floats(0, 100)
attempts = st.integers(1, 1_000)


def test_the_delays_are_those_of_the_manual() -> None:
    retry = Retry(max_attempts=5, jitter=False)
    assert [retry.decide(n, ValueError()).delay for n in range(1, 6)] == [1, 2, 4, 8, None]


@given(delays, delays, st.floats(1, 1_000), attempts)
def test_backoff_follows_the_formula_and_never_passes_the_cap(
    one: float, other: float, factor: float, attempt: int
) -> None:
    retry = Retry(min_delay=min(one, other), max_delay=max(one, other), factor=factor)
    try:
        grown = min(one, other) * factor ** (attempt - 1)
    except OverflowError:
        grown = float("inf") if min(one, other) else 0
    assert retry.backoff(attempt) == min(max(one, other), grown)


@given(attempts)
def test_jitter_takes_at_most_half_and_survives_the_cap(attempt: int) -> None:
    retry = Retry(max_attempts=1_000, min_delay=1, max_delay=8)
    decision = retry.decide(attempt, ValueError())
    if attempt == 1_000:
        assert decision == RetryDecision(None, "max_attempts")
    else:
        assert decision.delay is not None
        assert retry.backoff(attempt) / 2 <= decision.delay <= retry.backoff(attempt)


def test_jitter_spreads_also_at_the_cap() -> None:
    retry = Retry(max_attempts=10, min_delay=8, max_delay=8)
    assert len({retry.decide(5, ValueError()).delay for _ in range(20)}) > 10


class Transient(Exception):
    pass


class Lost(Transient):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Transient(), None),
        (Lost(), "never_retried"),
        (ValueError(), "never_retried"),
        (SystemExit(), "never_retried"),
        (Abort(), "aborted"),
    ],
)
def test_the_class_of_the_error_decides(error: BaseException, reason: str | None) -> None:
    decision = Retry(on=Transient, never_on=(Lost,)).decide(1, error)
    assert (decision.delay is None) == (reason is not None)
    assert reason is None or decision.reason == reason


def test_by_default_every_exception_is_retried_and_nothing_else() -> None:
    assert Retry().decide(1, ValueError()).delay is not None
    assert Retry().decide(1, KeyboardInterrupt()).reason == "never_retried"
    assert Retry().decide(1, asyncio.CancelledError()).reason == "never_retried"


def test_retry_after_sets_the_delay_whatever_the_classes_and_the_jitter() -> None:
    retry = Retry(max_attempts=2, on=ValueError, never_on=Exception)
    assert retry.decide(1, RetryAfter(7.5)) == RetryDecision(7.5)
    assert retry.decide(2, RetryAfter(7.5)) == RetryDecision(None, "max_attempts")


def test_one_attempt_means_one() -> None:
    assert Retry(max_attempts=1).decide(1, ValueError()).reason == "max_attempts"


def test_durations_are_read() -> None:
    assert Retry(min_delay="500ms", max_delay="1h").max_delay == 3_600


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_attempts": 1_001},
        {"max_attempts": 2.5},
        {"max_attempts": "3"},
        {"factor": 0.5},
        {"factor": float("nan")},
        {"factor": "2"},
        {"min_delay": 2, "max_delay": 1},
        {"min_delay": -1},
        {"max_delay": "soon"},
        {"on": ValueError()},
        {"on": "ValueError"},
        {"on": 5},
        {"never_on": (ValueError, int)},
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        Retry(**options)


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), 1e300, "5s", None])
def test_retry_after_refuses_what_is_no_delay(delay: Any) -> None:
    with pytest.raises(ValueError, match="RetryAfter: a delay is"):
        RetryAfter(delay)
