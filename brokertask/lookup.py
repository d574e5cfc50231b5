"""What a publisher looks for on the broker before it sends what only later could be refused."""

from __future__ import annotations

from contextlib import suppress

from brokertask.errors import AccessDenied, NoServer, Unroutable
from brokertask.run import Session
from brokertask.topology import Names

# Each costs a round trip to the broker, until a session has found what it looks for. RabbitMQ 4.3
# and later let only some users look; the others find out later.


async def find_queue(session: Session, names: Names, task: str, *, run_id: str | None) -> None:
    """Refuse a run of later that no queue is for: nobody would be told then.

    Raises:
        Unroutable: No worker has declared the task's queue.
    """
    if task in session.found:
        return
    with suppress(AccessDenied):
        if await session.transport.depth(names.queue(task)) is None:
            raise Unroutable(
                f"no queue on this broker is for task {task!r}: no worker has declared it. "
                "Start one, run `brokertask topology apply`, or mend the task's id",
                run_id=run_id,
            )
    session.found.add(task)


async def find_server(session: Session, names: Names) -> None:
    """Return if there is, or was, a server on this broker: its queues keep what comes.

    Raises:
        NoServer: There has never been one.
    """
    queue = f"{names.server}.waits"
    if queue in session.found:
        return
    with suppress(AccessDenied):
        if await session.transport.depth(queue) is None:
            raise NoServer(
                "this needs a server, and none was ever started on this broker: start "
                "`brokertask server`"
            )
    session.found.add(queue)
