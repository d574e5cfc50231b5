from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice, pairwise, takewhile

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st

from brokertask import InvalidOption
from brokertask.ticks import Ticks, offset_ms, zone

YEAR_MS = 366 * 86_400_000
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo"]
LINES = [
    "* * * * *",
    "*/20 * * * *",
    "30 2 * * *",
    "*/30 1-3 * * *",
    "15 */2 * * *",
    "0 0 * * SUN",
    "59 23 L * *",
    "0,30 0,1,2,3 * * *",
]
instants = st.integers(1_700_000_000_000, 1_900_000_000_000)


def walls(ticks: Ticks, after: str, count: int) -> list[str]:
    """Return ticks as the clocks on the wall show them, with their offsets from UTC."""
    place = zone(ticks.tz)
    begin = ms(after, ticks.tz)
    found = islice(ticks.after(begin), count)
    return [datetime.fromtimestamp(tick / 1000, place).strftime("%d %H:%M %z") for tick in found]


def ms(wall: str, tz: str) -> int:
    return round(datetime.fromisoformat(wall).replace(tzinfo=zone(tz)).timestamp() * 1000)


@pytest.mark.parametrize(
    ("line", "tz", "after", "expected"),
    [
        # The clocks jump over it: at the first instant after, once.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T12:00",
            ["29 03:00 +0200", "30 02:30 +0200"],
        ),
        (
            "*/30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T12:00",
            ["29 03:00 +0200", "30 02:00 +0200", "30 02:30 +0200"],
        ),
        (
            "0 2,3 * * *",
            "Europe/Berlin",
            "2026-03-28T12:00",
            ["29 03:00 +0200", "30 02:00 +0200"],
        ),
        # The clocks show it twice: the first time.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T12:00",
            ["25 02:30 +0200", "26 02:30 +0100"],
        ),
        # Every hour follows real time: both hours that are called 2, none that there is not.
        (
            "30 * * * *",
            "Europe/Berlin",
            "2026-10-25T00:50",
            ["25 01:30 +0200", "25 02:30 +0200", "25 02:30 +0100", "25 03:30 +0100"],
        ),
        (
            "30 * * * *",
            "Europe/Berlin",
            "2026-03-29T00:50",
            ["29 01:30 +0100", "29 03:30 +0200"],
        ),
        (
            "30 1 * * *",
            "America/New_York",
            "2026-10-31T12:00",
            ["01 01:30 -0400", "02 01:30 -0500"],
        ),
        (
            "15 2 * * *",
            "America/New_York",
            "2026-03-07T12:00",
            ["08 03:00 -0400", "09 02:15 -0400"],
        ),
        # A day that begins at 1, and one whose last hour comes twice.
        (
            "15 0 * * *",
            "America/Santiago",
            "2026-09-05T12:00",
            ["06 01:00 -0300", "07 00:15 -0300"],
        ),
        (
            "30 23 * * *",
            "America/Santiago",
            "2026-04-03T12:00",
            ["03 23:30 -0300", "04 23:30 -0300", "05 23:30 -0400"],
        ),
        # Half an hour.
        (
            "15 2 * * *",
            "Australia/Lord_Howe",
            "2026-10-03T12:00",
            ["04 02:30 +1100", "05 02:15 +1100"],
        ),
        (
            "45 1 * * *",
            "Australia/Lord_Howe",
            "2026-04-04T12:00",
            ["05 01:45 +1100", "06 01:45 +1030"],
        ),
        # A leap day, the last day of a month, a weekday by its number.
        ("0 12 29 2 *", "UTC", "2026-01-01", ["29 12:00 +0000"]),
        ("0 12 L * *", "UTC", "2026-02-01", ["28 12:00 +0000", "31 12:00 +0000"]),
        ("0 9 * * MON#1", "Europe/Berlin", "2026-03-01", ["02 09:00 +0100", "06 09:00 +0200"]),
    ],
)
def test_a_cron_line_on_difficult_days(line: str, tz: str, after: str, expected: list[str]) -> None:
    assert walls(Ticks(cron=line, tz=tz), after, len(expected)) == expected


@given(st.sampled_from(LINES), st.sampled_from(ZONES), instants, st.data())
def test_wherever_one_begins_the_ticks_are_the_same(
    line: str, tz: str, begin: int, data: st.DataObject
) -> None:
    ticks = Ticks(cron=line, tz=tz)
    found = list(islice(ticks.after(begin), 60))
    assert all(before < after for before, after in pairwise([begin, *found]))
    middle = data.draw(st.integers(begin, found[-2]))
    rest = [tick for tick in found if tick > middle]
    assert list(islice(ticks.after(middle), len(rest))) == rest
    past = [tick for tick in found if tick <= middle]
    assert ticks.latest(middle, not_before_ms=begin + 1) == (past[-1] if past else None)


@given(st.sampled_from(LINES), instants)
def test_in_utc_they_are_those_of_cronsim(line: str, begin: int) -> None:
    reference = CronSim(line, datetime.fromtimestamp(begin // 1000, UTC))
    expected = [round(moment.timestamp() * 1000) for moment in islice(reference, 20)]
    assert list(islice(Ticks(cron=line).after(begin), 20)) == expected


@pytest.mark.parametrize("tz", ZONES[1:])
@pytest.mark.parametrize("hour", range(24))
def test_a_daily_line_ticks_once_a_day_all_year(tz: str, hour: int) -> None:
    begin = ms("2026-01-01", tz)
    ticks = Ticks(cron=f"30 {hour} * * *", tz=tz).after(begin)
    found = list(takewhile(lambda tick: tick < begin + 365 * 86_400_000, ticks))
    days = [datetime.fromtimestamp(tick / 1000, zone(tz)).date() for tick in found]
    assert len(days) == len(set(days)) == 365


@given(st.integers(1_000, YEAR_MS), instants)
def test_an_interval_ticks_at_its_multiples(step: int, begin: int) -> None:
    ticks = Ticks(every_ms=step)
    found = list(islice(ticks.after(begin), 5))
    assert found[0] - step <= begin < found[0]
    assert all(tick % step == 0 for tick in found)
    assert [after - before for before, after in pairwise(found)] == [step] * 4
    assert ticks.latest(found[2], not_before_ms=0) == found[2]


def test_the_latest_tick_is_found_years_back() -> None:
    leap = Ticks(cron="0 0 29 2 *")
    begin = ms("2027-01-01", "UTC")
    assert leap.latest(begin, not_before_ms=0) == ms("2024-02-29", "UTC")
    assert leap.latest(begin, not_before_ms=ms("2025-01-01", "UTC")) is None


@given(st.text(min_size=1, max_size=40), st.integers(1, 86_400_000))
def test_jitter_is_the_same_each_time_and_within_its_window(name: str, jitter: int) -> None:
    assert 0 <= offset_ms(name, jitter) < jitter
    assert offset_ms(name, jitter) == offset_ms(name, jitter)


def test_jitter_spreads_schedules() -> None:
    offsets = [offset_ms(f"report-{number}", 60_000) for number in range(600)]
    quarters = [sum(offset // 15_000 == quarter for offset in offsets) for quarter in range(4)]
    assert offset_ms("report", 0) == 0
    assert all(100 < count < 200 for count in quarters)


@pytest.mark.parametrize(
    "ticks",
    [
        Ticks(),
        Ticks(cron="* * * * *", every_ms=1000),
        Ticks(every_ms=999),
        Ticks(cron="* * * *"),
        Ticks(cron="* * * * * *"),
        Ticks(cron="60 * * * *"),
        Ticks(cron="@daily"),
        Ticks(cron="0 0 30 2 *"),
        Ticks(cron="0 0 * * *", tz="Europe/Berln"),
        Ticks(cron="0 0 * * *", tz="../etc/passwd"),
        Ticks(cron="0 0 * * *", tz=""),
    ],
)
def test_what_never_ticks_is_refused(ticks: Ticks) -> None:
    with pytest.raises(InvalidOption):
        ticks.check()
