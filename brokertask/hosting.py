"""What the steps of an attempt need of whoever performs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Host(Protocol):
    """What the steps of an attempt need of whoever performs it."""

    async def save(self) -> None:
        """Return when the memory, as it is now, survives a crash of this process."""
        ...

    def sleep(self, due_ms: int) -> None:
        """Let the run leave its slot until then: cancels the task's code."""
        ...

    def wait(self, on: Sequence[str], due_ms: int | None) -> None:
        """Let the run leave its slot until a server says so: cancels the task's code."""
        ...

    async def find_server(self) -> int:
        """Return how often the run was redriven, if there is a server that its waits can go to.

        Raises:
            NoServer: There has never been one.
        """
        ...

    def warn(self, message: str) -> None:
        """Tell of what will end the run if it goes on; from any thread."""
        ...
