"""Durations as users write them: seconds as a number, or text such as "1h30m"."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Final, TypeAlias

from brokertask.errors import InvalidOption

Duration: TypeAlias = float | str | timedelta
"""Seconds as a number, text of the units d, h, m, s and ms ("1h30m", "250ms"), or a timedelta."""

UNITS: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
LONGEST: Final = 36_525 * 86_400.0
"""A century: whatever it is added to stays a date."""
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")


def seconds(duration: Duration) -> float:
    """Return a duration in seconds.

    >>> seconds("1h30m"), seconds("250ms"), seconds(5)
    (5400.0, 0.25, 5.0)

    Raises:
        InvalidOption: It is negative, longer than a century, or not understood.
    """
    if isinstance(duration, timedelta):
        value = duration.total_seconds()
    elif isinstance(duration, str):
        value = _parse(duration)
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        value = float(duration) if duration <= LONGEST else math.inf
    else:
        raise InvalidOption(f"a duration is a number of seconds or text, not {duration!r}")
    if not 0 <= value <= LONGEST:
        raise InvalidOption(f"a duration is 0 seconds to 100 years, not {duration!r}")
    return value


def _parse(text: str) -> float:
    compact = text.replace(" ", "").lower()
    parts = _PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise InvalidOption(
            f'duration {text!r} is not understood; write seconds as a number or text like "1h30m"'
        )
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def readable(value: float) -> str:
    """Return seconds as short text for people.

    >>> readable(0.0312), readable(4.25), readable(5400)
    ('31 ms', '4.2 s', '1h30m')
    """
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    text = ""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        text += f"{count}{unit}" if count else ""
    return text
