"""Which tasks' triggers come to servers as copies: those of tasks that have a queue.

A copy counts as routed. Bound to a task whose queue is gone, it would make the broker take triggers
that nobody will ever run, where it has to refuse them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from brokertask.errors import AccessDenied
from brokertask.server.resources import Resources
from brokertask.topology import Topology, copies

log = logging.getLogger("brokertask.server")


class Copies:
    """Binds and unbinds one server's view of triggers; what several do comes to the same."""

    def __init__(self, resources: Resources) -> None:
        self._names = resources.names
        self._transport = resources.transport
        self._bound: set[str] = set()

    async def want(self, tasks: Iterable[str]) -> None:
        """Have copies of the triggers of tasks from now on.

        Cost: two round trips to the broker for each task that is new.
        """
        for task in sorted(set(tasks) - self._bound):
            try:
                if await self._has_queue(task):
                    self._bound.add(task)
                    await self._transport.declare(Topology((), (), (copies(self._names, task),)))
            except AccessDenied as error:
                log.warning("runs of %s are recorded only when they begin: %s", task, error)

    async def check(self) -> None:
        """Have no copies of triggers to tasks whose queue is gone. Cost: a round trip for each."""
        for task in sorted(self._bound):
            if not await self._has_queue(task):
                gone = (copies(self._names, task),)
                await self._transport.declare(Topology((), (), (), gone))
                self._bound.discard(task)

    async def _has_queue(self, task: str) -> bool:
        try:
            return await self._transport.depth(self._names.queue(task)) is not None
        except AccessDenied:  # RabbitMQ 4.3 and later let only some users look.
            return True
