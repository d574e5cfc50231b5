"""What aiormq raises and how it waits, made bearable: for everybody in this package."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from aiormq.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import AMQPError, InvalidFrameError

from brokertask.errors import BrokerBlocked, BrokerUnavailable

CLOSE_TIMEOUT: Final = 2.0
PROBE_TIMEOUT: Final = 0.005
BLOCKED_CHECK: Final = 1.0
"""A connection that is lost while it is blocked never says that it is not blocked any more."""


def closed_on_opening(error: BaseException | None) -> bool:
    """Whether it is how aiormq tells of a Connection.Close in answer to the virtual host's name."""
    return isinstance(error, InvalidFrameError) and "got <Connection.Close " in str(error)


def describe(error: BaseException | None) -> str:
    """Return a foreign error as short text."""
    if closed_on_opening(error):
        return "it closed the connection when it heard the virtual host's name"
    if error is None:
        return "closed"
    return ", ".join(str(part) for part in error.args) or type(error).__name__


def raise_if_cancelled(error: asyncio.CancelledError) -> None:
    """Raise `error` again if the running task was cancelled by somebody.

    aiormq ends what is in flight on a lost connection with a CancelledError of its own, which
    would pass for a cancellation of ours.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error


async def close_quietly(resource: AbstractConnection | AbstractChannel) -> None:
    """Close a connection or channel that may be half dead, within a bounded time."""
    with quietly():
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await resource.close()


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress what a dying connection raises; a cancellation of ours is none of that."""
    try:
        with suppress(AMQPError, OSError, RuntimeError, TimeoutError):
            yield
    except asyncio.CancelledError as error:
        raise_if_cancelled(error)


def alarmed(*, unknown: bool) -> BrokerBlocked:
    """Return the error for a publish that an alarm holds up."""
    fate = "it may be stored once the alarm ends" if unknown else "nothing was sent"
    return BrokerBlocked(
        f"a memory or disk alarm on the broker blocks publishing; {fate}. "
        "`rabbitmqctl status` names the alarm",
        unknown=unknown,
    )


async def until_unblocked(connection: AbstractConnection, deadline: float) -> None:
    """Return when no alarm keeps this connection from publishing."""
    loop = asyncio.get_running_loop()
    while not connection.is_closed:
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + BLOCKED_CHECK)):
                return await connection.ready()
        except TimeoutError:
            if loop.time() >= deadline:
                raise alarmed(unknown=False) from None
    raise BrokerUnavailable("the connection was lost; nothing was sent")


async def is_blocked(connection: AbstractConnection) -> bool:
    """Return whether an alarm keeps this connection from publishing."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            await connection.ready()
    except TimeoutError:
        return True
    return False
