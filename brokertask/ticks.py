"""When a schedule is due: the ticks of a cron line in a time zone, or of an interval. Pure.

A cron line of every hour follows real time: it ticks whenever the clocks show a time that it names.
Any other line follows the wall clock: each wall time that it names is met once. One that the clocks
jump over is met at the first instant after the jump, one that they show twice, the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from brokertask.errors import InvalidOption

_FIELDS: Final = 5
_SAMPLE_MS: Final = 1_704_067_200_000
_LOOKBACK_MS: Final = 60_000
_FARTHEST_MS: Final = 60 * 366 * 86_400_000
"""As far as cronsim looks for a tick, and some more."""


@dataclass(frozen=True, slots=True)
class Ticks:
    """The ticks of one schedule, as instants in ms since the epoch. Same arguments, same ticks.

    Attributes:
        cron: Five fields; None for an interval.
        every_ms: The interval; its ticks are its multiples since the epoch.
        tz: The IANA time zone of `cron`.
    """

    cron: str | None = None
    every_ms: int | None = None
    tz: str = "UTC"

    def check(self) -> None:
        """Raise `InvalidOption` unless there are such ticks.

        Cost: some µs; up to a second for a cron line that names no date in 50 years.
        """
        if (self.cron is None) == (self.every_ms is None):
            raise InvalidOption("a schedule has a cron line or an interval: cron= or every=")
        if self.every_ms is not None and self.every_ms < 1000:
            raise InvalidOption("a schedule: every is 1 second or more")
        if next(self.after(_SAMPLE_MS), None) is None:
            raise InvalidOption(f"cron {self.cron!r} names a date that there never is")

    def after(self, instant_ms: int) -> Iterator[int]:
        """Yield the ticks later than an instant, in order; there may be no end to them.

        Wherever one begins, the ticks are the same. Cost: about 20 µs each.

        Raises:
            InvalidOption: The cron line or the time zone is not understood.
        """
        if self.every_ms is not None:
            yield from _multiples(self.every_ms, instant_ms)
            return
        latest = instant_ms
        for moment in _walls(self.cron or "", zone(self.tz), instant_ms):
            tick = round(moment.timestamp() * 1000)
            # Of wall times that were jumped over, all are met at one instant; and in the second of
            # two equal hours, those of the first are past.
            if tick > latest:
                latest = tick
                yield tick

    def latest(self, instant_ms: int, *, not_before_ms: int) -> int | None:
        """Return the last tick within `not_before_ms` to `instant_ms`, both included, if any."""
        span = _LOOKBACK_MS
        while True:
            begin = max(not_before_ms, instant_ms - span)
            seen = takewhile(lambda tick: tick <= instant_ms, self.after(begin - 1))
            found = max(seen, default=None)
            if found is not None or begin == not_before_ms or span > _FARTHEST_MS:
                return found
            span *= 8


def offset_ms(schedule: str, jitter_ms: int) -> int:
    """Return how long after each of its ticks a schedule is due: by its name, below `jitter_ms`."""
    if jitter_ms == 0:
        return 0
    return int.from_bytes(hashlib.sha256(schedule.encode()).digest()[:8]) % jitter_ms


def zone(name: str) -> ZoneInfo:
    """Return a time zone by its IANA name, or raise `InvalidOption`."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidOption(
            f'time zone {name!r:.60} is not known here; write an IANA name such as "Europe/Berlin"'
        ) from error


def _multiples(step: int, after: int) -> Iterator[int]:
    tick = (after // step + 1) * step
    while True:
        yield tick
        tick += step


def _walls(line: str, place: ZoneInfo, after_ms: int) -> Iterator[datetime]:
    """Yield the datetimes that a cron line names, from the wall time of an instant on."""
    fields = line.split()
    if len(fields) != _FIELDS:
        raise InvalidOption(
            f"cron {line!r:.80}: five fields are minute, hour, day of month, month, day of week"
        )
    begin = datetime.fromtimestamp(after_ms // 1000, UTC).astimezone(place)
    try:
        named = CronSim(line, begin)
        fields[1] = "*"
        if named.hours != set(range(24)):
            # cronsim takes a star in these fields for an interval in real time, which would never
            # come to "*/30 2" on the day when the clocks jump from 2 to 3.
            fields[0] = ",".join(str(minute) for minute in sorted(named.minutes))
            fields[1] = ",".join(str(hour) for hour in sorted(named.hours))
        return CronSim(" ".join(fields), begin)
    except CronSimError as error:
        raise InvalidOption(f"cron {line!r:.80} is not understood: {error}") from error
