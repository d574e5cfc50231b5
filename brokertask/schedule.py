"""What a schedule is, as its author writes it and as it travels to the server. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, get_args

from brokertask.durations import Duration, seconds
from brokertask.errors import InvalidOption
from brokertask.ticks import Ticks

CatchUp: TypeAlias = Literal["skip", "last", "all"]
Overlap: TypeAlias = Literal["allow", "skip"]
LONGEST_JITTER_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True)
class Tick:
    """The payload of a scheduled run whose task takes one: which tick it is of.

    Attributes:
        schedule: The schedule's name.
        at: When the run was due, before any jitter: the same however late it starts.
        previous: The tick that was decided before; None for the first.
    """

    schedule: str
    at: datetime
    previous: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When runs of a task are triggered by a `brokertask server`, each tick at most once.

    Attributes:
        cron: Minute, hour, day of month, month, day of week; or:
        every: An interval of 1 second or more; its ticks are its multiples since the epoch.
        tz: The IANA time zone of `cron`.
        payload: What each run is triggered with. A task that takes a `Tick` is given one instead.
        catch_up: What becomes of ticks that no server was there for. `skip`: those more than
            a minute late are dropped. `last`: as `skip`, but the latest is run. `all`: they are
            run, as far as `catch_up_window` reaches back.
        overlap: `skip` drops a tick while the schedule's run before is unfinished.
        jitter: Up to a day: each schedule is due that much later than its ticks, or less; always
            as much, by its name, so that not all begin at once.

    Raises:
        InvalidOption: An option is out of range, or there are no such ticks.
    """

    cron: str | None = None
    every: Duration | None = None
    tz: str = "UTC"
    payload: object = None
    catch_up: CatchUp = "skip"
    catch_up_window: Duration = "1d"
    overlap: Overlap = "allow"
    jitter: Duration = 0

    def __post_init__(self) -> None:
        if not isinstance(self.cron, str | None) or not isinstance(self.tz, str):
            raise InvalidOption("a schedule: cron and tz are text")
        self.ticks.check()
        if self.catch_up not in get_args(CatchUp):
            raise InvalidOption(f"catch_up is 'skip', 'last' or 'all', not {self.catch_up!r}")
        if self.overlap not in get_args(Overlap):
            raise InvalidOption(f"overlap is 'allow' or 'skip', not {self.overlap!r}")
        if self.jitter_ms > LONGEST_JITTER_MS:
            raise InvalidOption(f"jitter is up to a day, not {self.jitter!r}")
        seconds(self.catch_up_window)

    @property
    def ticks(self) -> Ticks:
        """When it is due, before jitter."""
        every_ms = None if self.every is None else round(seconds(self.every) * 1000)
        return Ticks(self.cron, every_ms, self.tz)

    @property
    def jitter_ms(self) -> int:
        """Its jitter in milliseconds."""
        return round(seconds(self.jitter) * 1000)

    @property
    def catch_up_window_ms(self) -> int:
        """How far back `all` reaches, in milliseconds."""
        return round(seconds(self.catch_up_window) * 1000)

    def plain(self) -> dict[str, Any]:
        """Return all but the payload as plain values, for `read`; durations in seconds."""
        return {
            "cron": self.cron,
            "every": None if self.every is None else seconds(self.every),
            "tz": self.tz,
            "catch_up": self.catch_up,
            "catch_up_window": seconds(self.catch_up_window),
            "overlap": self.overlap,
            "jitter": seconds(self.jitter),
        }

    @staticmethod
    def read(plain: Mapping[str, Any], *, payload: object = None) -> Schedule:
        """Return the schedule in plain values; those that a newer version added are ignored.

        Raises:
            InvalidOption: It is none.
        """
        known = {name: plain[name] for name in Schedule.__slots__ if name in plain}
        try:
            return Schedule(**{**known, "payload": payload})
        except TypeError as error:
            raise InvalidOption(f"not a schedule: {error}") from error
