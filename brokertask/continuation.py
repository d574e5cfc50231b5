"""What follows a message of a run: pure rules from an outcome to the next message and its route."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from brokertask.deadletter import bury
from brokertask.envelope import Envelope, Message
from brokertask.outcome import (
    Cancelled,
    Early,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
    Waiting,
)
from brokertask.topology import IN_PLACE_MS, Names, Route


def continuation(
    names: Names, envelope: Envelope, outcome: Outcome, *, now_ms: int
) -> tuple[Route, Message] | None:
    """Return what is published in place of a message that is settled, and where to.

    Args:
        names: The names on the broker.
        envelope: The message, with what the run remembers now.
        outcome: What it came to.
        now_ms: The present, in ms since the epoch.
    """
    if isinstance(outcome, Succeeded | Expired | Cancelled | Repeated):
        return None
    again = envelope.again(attempt=envelope.attempt, now_ms=now_ms)
    match outcome:
        case Retrying(delay=delay, error=error):
            memory = envelope.memory.with_error(error)
            again = replace(again, attempt=envelope.attempt + 1, memory=memory, wait="retry")
            return _delayed(names, again, round(delay * 1000), now_ms + round(delay * 1000))
        case Sleeping(delay=delay):
            again = replace(again, wait="sleep")
            return _delayed(names, again, round(delay * 1000), now_ms + round(delay * 1000))
        case Waiting(on=on, due_ms=due_ms):
            kind = on[0].partition(":")[0] if on else "wait"
            return names.server_route("wait"), replace(again, wait=kind, due_ms=due_ms).message()
        case Early(delay=delay):
            return _delayed(names, envelope, round(delay * 1000), envelope.due_ms)
        case Failed():
            return names.dead_route(envelope.task), bury(envelope, outcome, now_ms=now_ms)
        case Interrupted():
            return names.resume_route(envelope.task), again.message()
        case _ as unreachable:
            assert_never(unreachable)


def early_ms(envelope: Envelope, now_ms: int) -> int:
    """Return how many ms too early a delayed message is.

    What was left when it was sent bounds it, so that a publisher whose clock is wrong delays no
    longer than it asked for.
    """
    return 0 if envelope.due_ms is None else min(envelope.left_ms, envelope.due_ms - now_ms)


def expired(envelope: Envelope, now_ms: int) -> bool:
    """Whether a run comes too late to start; one that has begun was started in time."""
    begun = envelope.attempt > 1 or bool(envelope.memory.steps)
    return envelope.expires_ms is not None and now_ms > envelope.expires_ms and not begun


def _delayed(
    names: Names, envelope: Envelope, delay_ms: int, due_ms: int | None
) -> tuple[Route, Message]:
    """Return route and message for the delay ladder."""
    if delay_ms <= IN_PLACE_MS:
        return names.resume_route(envelope.task), envelope.message()
    route, left = names.delay_route(envelope.task, delay_ms)
    return route, replace(envelope, due_ms=due_ms, left_ms=left).message()
