"""The words for what a run is at, each with a mark and a colour: the same wherever it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["STATUSES", "Status", "status_of"]


@dataclass(frozen=True, slots=True)
class Status:
    """What a run is at."""

    name: str
    mark: str
    """One character, so that nobody needs to see colours."""
    meaning: str
    light: str
    """Its colour on a light ground, as `#rrggbb`: at least 4.5:1 on white."""
    dark: str
    """Its colour on a dark ground."""
    terminal: str
    """Its colour on a terminal, by the name that ANSI has for it."""


_ALL: Final = (
    Status("queued", "○", "it waits for a worker", "#475569", "#b6c2d1", "default"),
    Status("delayed", "◷", "its time has not come", "#6d28d9", "#c4b5fd", "magenta"),
    Status("running", "▶", "a worker is at it", "#1d4ed8", "#93c5fd", "blue"),
    Status("retrying", "↻", "an attempt failed, another follows", "#92400e", "#fbbf24", "yellow"),
    Status("sleeping", "☾", "it sleeps, and holds no slot", "#4338ca", "#a5b4fc", "bright_blue"),
    Status("waiting", "∥", "it waits for something to come", "#0f6b6b", "#5eead4", "cyan"),
    Status("completed", "✓", "it returned", "#166534", "#86efac", "green"),
    Status("failed", "✗", "it is in the dead-letter queue", "#b42318", "#fca5a5", "red"),
    Status("expired", "⊖", "it came too late to begin", "#7c4a21", "#e0b48c", "bright_black"),
    Status("cancelled", "⊘", "somebody ended it", "#5b5b66", "#c3c3cc", "bright_black"),
)
STATUSES: Final[Mapping[str, Status]] = {status.name: status for status in _ALL}
"""In the order in which a run may go through them."""


def status_of(name: str) -> Status:
    """Return the status of this name; one that a newer server added has no colour of its own."""
    return STATUSES.get(name) or Status(name, "?", "", "#475569", "#b6c2d1", "default")
