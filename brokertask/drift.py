"""A topology against a live broker: what is missing, differs, waits. Changes nothing.

`plan` says what `topology apply` would do; `lacking` and `observe` what somebody should look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from brokertask.errors import AccessDenied
from brokertask.lint import Finding, Limits
from brokertask.topology import UNLIMITED_DELIVERIES, Exchange, Names, Queue, Topology
from brokertask.transport.base import Difference, Transport

IMMUTABLE: Final = "the arguments of an exchange or queue are fixed when it is first declared"

_REFUSED: Final = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)'.*?: "
    r"received (?P<wanted>.+?) but current is (?P<found>.+)"
)
_DIFFERS: Final = re.compile(
    r"(?P<argument>[\w-]+) is (?P<found>.+?) on the broker, (?P<wanted>.+?) in the code"
)
_QUOTED: Final = re.compile(r"(?:the value )?'(?P<value>[^']*)'(?: of type '\w+')?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One object that the broker lacks, or has with another argument."""

    kind: Literal["exchange", "queue"]
    name: str
    missing: bool
    argument: str = ""
    """Which one differs; of several, brokers name only the first."""
    found: str = ""
    wanted: str = ""
    fix: str = ""
    """How to mend what cannot be changed; empty for what is only missing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What stands between a broker and a topology.

    Bindings are not in it: AMQP cannot ask for them, and `topology apply` makes them each time.
    """

    changes: tuple[Change, ...]

    @property
    def missing(self) -> list[Change]:
        """What `topology apply` would make."""
        return [change for change in self.changes if change.missing]

    @property
    def mismatches(self) -> list[Change]:
        """What it cannot change."""
        return [change for change in self.changes if not change.missing]


async def plan(transport: Transport, topology: Topology) -> Plan:
    """Compare a topology with the broker.

    Raises:
        AccessDenied: This user may not configure; only declaring again tells whether it is equal.
    """
    changes = [_change(difference) for difference in await transport.compare(topology)]
    return Plan(tuple(sorted(changes, key=lambda change: (change.kind, change.name))))


async def lacking(transport: Transport, topology: Topology) -> list[Finding]:
    """Return one error if the broker lacks queues or exchanges of a topology, else nothing.

    A user who may not configure can ask for queues alone: of exchanges nothing is said then.
    """
    try:
        names = [change.name for change in (await plan(transport, topology)).missing]
    except AccessDenied:
        queues = [queue.name for queue in topology.queues]
        names = [name for name in queues if await transport.depth(name) is None]
    if not names:
        return []
    what = f"{names[0]} is missing"
    if len(names) > 1:
        what = f"{len(names)} queues and exchanges are missing, such as {names[0]}"
    return [Finding("error", "topology", what, "brokertask topology apply --app MODULE:APP")]


async def observe(transport: Transport, names: Names, tasks: Iterable[Limits]) -> list[Finding]:
    """Return what the queues of a live broker hold that somebody should look at."""
    found = []
    unrouted = await transport.depth(names.unrouted)
    if unrouted is not None and unrouted.ready:
        found.append(
            Finding(
                "error",
                names.unrouted,
                f"{_count(unrouted.ready, 'message')} found no queue after a delay or a burial",
                "run `brokertask topology apply` for the app they belong to, then move them with "
                f"a shovel to exchange {names.resume}; they keep their routing keys",
            )
        )
    for task in tasks:
        found += await _observe_task(transport, names, task)
    return found


async def _observe_task(transport: Transport, names: Names, task: Limits) -> list[Finding]:
    found = []
    work, dead = names.queue(task.task), names.dead_queue(task.task)
    depth = await transport.depth(work)
    if depth is not None and depth.ready and not depth.consumers:
        what = f"{_count(depth.ready, 'message')} and no worker"
        found.append(Finding("warning", work, what, "start one: brokertask worker MODULE:APP"))
    depth = await transport.depth(dead)
    if depth is not None and depth.ready:
        what = _count(depth.ready, "dead run")
        fix = f"brokertask dead list --task {task.task} --group"
        found.append(Finding("warning", dead, what, fix))
    intake = names.intake(task.task)
    depth = None if task.bounded else await transport.depth(intake)
    if depth is not None and depth.ready:
        what = f"{_count(depth.ready, 'run')} that no worker takes: the task has no max_length now"
        fix = "give it a max_length again until it is empty, or move them to the task's queue"
        found.append(Finding("error", intake, what, fix))
    elif depth is not None:
        what = "empty and no longer used: the task has no max_length now"
        fix = f"rabbitmqctl delete_queue {intake} --if-empty"
        found.append(Finding("note", intake, what, fix))
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _change(difference: Difference) -> Change:
    item = difference.item
    kind: Literal["exchange", "queue"] = "queue" if isinstance(item, Queue) else "exchange"
    if difference.missing:
        return Change(kind=kind, name=item.name, missing=True)
    told = _REFUSED.search(difference.detail) or _DIFFERS.search(difference.detail)
    argument = told["argument"] if told else "something"
    found = _value(told["found"]) if told else difference.detail
    return Change(
        kind=kind,
        name=item.name,
        missing=False,
        argument=argument,
        found=found,
        wanted=_value(told["wanted"]) if told else "",
        fix=_mend_queue(item, argument, found) if isinstance(item, Queue) else _mend(item),
    )


def _value(text: str) -> str:
    quoted = _QUOTED.fullmatch(text.strip())
    value = quoted["value"] if quoted else text.strip()
    return "not set" if value in ("none", "None") else value


def _mend(exchange: Exchange) -> str:
    return (
        f"delete it (`rabbitmqadmin delete exchange name={exchange.name}`; an exchange holds no "
        "messages, and what is published to it meanwhile is refused) and at once run `brokertask "
        "topology apply`; or choose another BROKERTASK_NAMESPACE"
    )


def _mend_queue(queue: Queue, argument: str, found: str) -> str:
    if "x-message-ttl" in queue.arguments:
        empty = "stop workers and publishers until its messages have left it by their TTL"
    elif queue.arguments.get("x-delivery-limit") == UNLIMITED_DELIVERIES:
        empty = "redrive or discard what it holds"
    else:
        empty = "stop what publishes to it and let its workers empty it"
    steps = (
        f"{empty}, delete it (`rabbitmqctl delete_queue {queue.name} --if-empty`) and run "
        "`brokertask topology apply`; or choose another BROKERTASK_NAMESPACE and drain the old one"
    )
    if argument in ("x-delivery-limit", "x-max-length") and found.isdigit():
        return (
            f"set it back to {found} in the code (a policy with {argument.removeprefix('x-')} can "
            f"then still lower it); or {steps}"
        )
    return steps
