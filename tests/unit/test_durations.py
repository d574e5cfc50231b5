from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokertask.durations import LONGEST, UNITS, readable, seconds
from brokertask.errors import InvalidOption


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (0, 0.0),
        (2.5, 2.5),
        ("250ms", 0.25),
        ("1h30m", 5_400.0),
        ("1 d 2 H", 93_600.0),
        ("1.5m", 90.0),
        ("0s", 0.0),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_what_is_understood(written: Any, expected: float) -> None:
    assert seconds(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        *("", "5", "soon", "-1s", "1.5.5h", "1e3s", "1h 5", "h", "5 minutes", "36526d"),
        *(True, None, [], b"5s", -1, -0.001, float("nan"), float("inf"), 10**400, LONGEST * 2),
        timedelta(-1),
    ],
)
def test_what_is_not_understood_is_an_invalid_option(written: Any) -> None:
    with pytest.raises(InvalidOption):
        seconds(written)


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from(sorted(UNITS))), min_size=1))
def test_parts_add_up(parts: list[tuple[int, str]]) -> None:
    total = sum(number * UNITS[unit] for number, unit in parts)
    text = "".join(f"{number}{unit}" for number, unit in parts)
    if total <= LONGEST:
        assert seconds(text) == pytest.approx(total)
    else:
        with pytest.raises(InvalidOption):
            seconds(text)


@given(st.integers(60, int(LONGEST)))
def test_what_people_read_can_be_written_again(value: int) -> None:
    assert seconds(readable(value)) == value


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0 ms"), (0.0312, "31 ms"), (4.25, "4.2 s"), (90_061, "1d1h1m1s")]
)
def test_readable(value: float, expected: str) -> None:
    assert readable(value) == expected
