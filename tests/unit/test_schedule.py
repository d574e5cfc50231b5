from __future__ import annotations

from typing import Any

import pytest

from brokertask import InvalidOption, Schedule


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(cron="0 3 * * *", tz="Europe/Berlin", overlap="skip", jitter="10m"),
        Schedule(every="90s", catch_up="all", catch_up_window="2h"),
        Schedule(every=1.5, catch_up="last"),
    ],
)
def test_it_is_read_as_it_was_written(schedule: Schedule) -> None:
    read = Schedule.read({**schedule.plain(), "of_a_newer_version": 1})
    assert read.plain() == schedule.plain()
    assert read.ticks == schedule.ticks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "cron= or every="),
        ({"cron": "0 3 * * *", "every": 60}, "cron= or every="),
        ({"every": 0.5}, "1 second or more"),
        ({"cron": "0 25 * * *"}, "Bad hour"),
        ({"cron": "0 3 * *"}, "five fields"),
        ({"cron": "0 3 * * *", "tz": "Berlin"}, "IANA name"),
        ({"every": 60, "catch_up": "none"}, "catch_up is"),
        ({"every": 60, "overlap": "queue"}, "overlap is"),
        ({"every": 60, "jitter": "2d"}, "up to a day"),
        ({"every": 60, "catch_up_window": "soon"}, "not understood"),
    ],
)
def test_what_is_wrong_is_said_where_it_is_written(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        Schedule(**options)


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(InvalidOption):
        Schedule.read({"cron": 5})
    with pytest.raises(InvalidOption):
        Schedule.read({"every": [1]})
