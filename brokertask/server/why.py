"""What a run waits for, in words: from its row, its task's queue, its workers and what was ordered.

    facts ──► reasons, the one that matters most first

Pure: `api.why` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brokertask.durations import readable
from brokertask.events import CANCELLED, COMPLETED, ENDS, EXPIRED, RETRYING, SLEEPING, WAITING
from brokertask.server.runs import DELAYED, QUEUED
from brokertask.transport.base import Depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known at one moment."""

    run: Mapping[str, Any]
    waits: Sequence[str]
    """What a waiting run waits for: `token:approval`."""
    now_ms: int
    paused: Mapping[str, Any] | None
    """The pause of its task: `reason` and `at_ms`."""
    queue: Depth | None
    """None if there is no such queue, or this server may not look."""
    workers: Sequence[Mapping[str, Any]]
    """Those that have its task, as `workers.listed` has them."""
    cancelled: bool


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that a run waits for, or why it waits for nothing."""

    code: str
    what: str


def reasons(facts: Facts) -> list[Reason]:
    """Return what a run waits for, what matters most first; at least one."""
    run = facts.run
    status = run["status"]
    if status in ENDS:
        return [_end(run)]
    found = [*_ordered(facts)]
    match status:
        case _ if status in (DELAYED, RETRYING, SLEEPING) and _early(facts):
            found.append(_due(facts))
        case _ if status == WAITING:
            found.append(Reason("waits", f"it waits for {', '.join(facts.waits) or 'its server'}"))
        case _ if status in (QUEUED, DELAYED, RETRYING, SLEEPING):
            found += _queued(facts)
        case _:
            found.append(_running(facts))
    return found


def _end(run: Mapping[str, Any]) -> Reason:
    match run["status"]:
        case status if status == COMPLETED:
            return Reason("completed", "nothing: it has completed")
        case status if status == EXPIRED:
            return Reason("expired", "nothing: it came too late to start, and has expired")
        case status if status == CANCELLED:
            return Reason("cancelled", f"nothing: it was cancelled{_because(run['reason'])}")
    if run["discarded_ms"] is not None:
        return Reason("discarded", "nothing: it is dead, and was discarded")
    return Reason(
        "dead",
        f"somebody who redrives or discards it: it is dead ({run['reason']}), by "
        f"{run['error_type']}: {run['error_message']}",
    )


def _ordered(facts: Facts) -> list[Reason]:
    found = []
    if facts.cancelled:
        found.append(Reason("cancelling", "it is cancelled, and ends when a worker comes to it"))
    if facts.paused is not None and facts.run["status"] != WAITING:
        since = readable(max(0, facts.now_ms - facts.paused["at_ms"]) / 1000)
        told = f"its task was paused {since} ago{_because(facts.paused['reason'])}"
        found.append(Reason("paused", f"{told}; no worker begins runs of it"))
    return found


def _early(facts: Facts) -> bool:
    due_ms = facts.run["due_ms"]
    return due_ms is not None and due_ms > facts.now_ms


def _due(facts: Facts) -> Reason:
    left = readable((facts.run["due_ms"] - facts.now_ms) / 1000)
    run = facts.run
    match run["status"]:
        case status if status == RETRYING:
            error = f"{run['error_type']}: {run['error_message']}"
            what = f"attempt {run['attempt']} failed by {error}; the next one begins in {left}"
            return Reason("retry", what)
        case status if status == SLEEPING:
            return Reason("sleep", f"it sleeps, and goes on in {left}")
        case _:
            return Reason("delay", f"it is delayed, and begins in {left}")


def _queued(facts: Facts) -> list[Reason]:
    """Return why a run that may begin has not begun."""
    task, found = facts.run["task"], list[Reason]()
    if facts.queue is None:
        what = f"no queue of {task} is to be seen: no worker has declared it, or it is denied"
        return [Reason("no_queue", what)]
    working = [one for one in facts.workers if one["state"] == "working"]
    slots = sum(int(one["tasks"][facts.run["task"]].get("slots", 0)) for one in working)
    busy = sum(int(one["tasks"][facts.run["task"]].get("busy", 0)) for one in working)
    if not facts.queue.consumers and facts.paused is None:
        draining = sum(one["state"] == "draining" for one in facts.workers)
        also = f"; {draining} that have it take no more work" if draining else ""
        found.append(Reason("no_worker", f"no worker consumes the queue of {task}{also}"))
    elif slots and busy >= slots:
        told = f"all {slots} slots of {len(working)} workers are busy"
        found.append(Reason("slots", f"{told}, as they said last"))
    found.append(
        Reason(
            "queue",
            f"{facts.queue.ready} runs of {task} wait in its queue, and {facts.queue.consumers} "
            f"consumers take from it",
        )
    )
    return found


def _running(facts: Facts) -> Reason:
    run = facts.run
    since = readable(max(0, facts.now_ms - run["at_ms"]) / 1000)
    state = next((one["state"] for one in facts.workers if one["worker"] == run["worker"]), None)
    told = f"it runs, attempt {run['attempt']}, on {run['worker']}; heard of {since} ago"
    if state in ("silent", "stopped"):
        return Reason(
            "lost", f"{told}. That worker is {state}: the broker gives the run to another one"
        )
    return Reason("running", told)


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""
