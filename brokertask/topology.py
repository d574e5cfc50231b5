"""Every exchange, queue and binding of a namespace, as data, and the routes over them.

    trigger ──► bt.tasks ──► bt.q.<task> ──► worker ──┬─► ack
                   ▲ (max_length: bt.in.<task>)       ├─► bt.delay ─► bt.delay.<ms> ─┐ (TTL)
                redrive                               │                bt.resume ◄───┘
                                                      │                   └─► bt.q.<task>
                                                      └─► bt.dead ──► bt.dead.<task>
    bt.resume's unroutable ──► bt.unrouted                worker ──► bt.events (topic)
    worker ──► bt.inflight ──► bt.inflight.<worker> ──► the same worker; if it dies ──► bt.resume
    cancel, pause, resume ──► bt.control (fanout) ──► bt.control (stream) ──► every worker

Nothing here talks to a broker; `transport.*` declares it, `drift` compares it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from brokertask.errors import InvalidOption

Argument: TypeAlias = str | int | bool

DELIVERY_LIMIT: Final = 50
"""The broker's own backstop; a run's attempts are counted by brokertask, far below it.

Source: research on RabbitMQ 3.10 to 4.3: the default differs by version, and -1 buries at once
on 3.10 to 3.13, so the number is always written.
"""
UNLIMITED_DELIVERIES: Final = 1_000_000_000
"""For dead-letter queues: looking into one counts as a delivery, and must never drop a message."""
LADDER_MANTISSAS: Final = (100, 125, 160, 200, 250, 300, 400, 500, 600, 800)
"""Ten rungs a decade, a step of at most 1.34; the usual 1, 2, 3, 4, 5, 6, 8 times 10**n are exact.

Source: after ISO 3 preferred numbers, series R10, with 3.15 and 6.3 moved to 3 and 6.
"""
SHORTEST_RUNG_MS: Final = 10
LONGEST_RUNG_MS: Final = 86_400_000
IN_PLACE_MS: Final = 20
"""What is left of a delay, at most, when a worker waits it out instead of sending it round."""

LATEST_MANIFESTS: Final = 10_000
INFLIGHT_TTL_MS: Final = 100
"""How long a checkpoint waits for its own worker before it goes back to the task's queue."""
INFLIGHT_EXPIRES_MS: Final = 3_600_000
"""A dead worker's queue goes, long after its messages have gone."""

CONTROL_LOG: Final[Mapping[str, Argument]] = {
    "x-queue-type": "stream",
    "x-max-age": "7D",
    "x-max-length-bytes": 16_000_000,
    "x-stream-max-segment-size-bytes": 2_000_000,
}
"""Some 80,000 entries, which a worker that starts reads in a few seconds. The broker forgets in
whole segments, so small ones make the week true."""

_TASK_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,126}")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    kind: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue; its type is among its arguments."""

    name: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Binding:
    """`exchange` delivers to `queue` what carries `key`."""

    exchange: str
    queue: str
    key: str


@dataclass(frozen=True, slots=True)
class Route:
    """Where a message is published: `also` are further routing keys, sent in the CC header."""

    exchange: str
    key: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """What a task may ask of its queue.

    Attributes:
        max_length: Refuse triggers with `QueueFull` beyond this many waiting runs. Delays and
            retries are never refused: they wait in the task's queue behind the intake.
        delivery_limit: How often the broker delivers one message before it buries it by itself.
    """

    max_length: int | None = None
    delivery_limit: int = DELIVERY_LIMIT

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise InvalidOption(f"queue: max_length is 1 or more, not {self.max_length}")
        if not 1 <= self.delivery_limit <= UNLIMITED_DELIVERIES:
            raise InvalidOption(
                f"queue: delivery_limit is 1 or more, not {self.delivery_limit}; "
                "-1 would bury at once on RabbitMQ before 4.0"
            )


@dataclass(frozen=True, slots=True)
class TaskQueue:
    """What the topology needs to know of a task."""

    task: str
    options: QueueOptions = QueueOptions()


@dataclass(frozen=True, slots=True)
class Topology:
    """All that a set of tasks needs on a broker. Equal tasks give equal topologies."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]
    absent_bindings: tuple[Binding, ...] = ()
    """Bindings that earlier options may have made and that must not be there now."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names below one namespace, and the routes over them."""

    namespace: str = "bt"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", self.namespace):
            raise InvalidOption(
                f"namespace {self.namespace!r}: 1 to 32 letters, digits, '_' or '-'"
            )

    @property
    def tasks(self) -> str:
        """The exchange that triggers go to."""
        return f"{self.namespace}.tasks"

    @property
    def delay(self) -> str:
        """The exchange in front of the delay ladder."""
        return f"{self.namespace}.delay"

    @property
    def resume(self) -> str:
        """The exchange that delays deliver to."""
        return f"{self.namespace}.resume"

    @property
    def unrouted(self) -> str:
        """Exchange and queue of what a delay found no target for."""
        return f"{self.namespace}.unrouted"

    @property
    def dead(self) -> str:
        """The dead-letter exchange."""
        return f"{self.namespace}.dead"

    @property
    def events(self) -> str:
        """The topic exchange of events."""
        return f"{self.namespace}.events"

    @property
    def inflight(self) -> str:
        """The exchange of checkpoints, and what the names of workers' own queues begin with."""
        return f"{self.namespace}.inflight"

    @property
    def server(self) -> str:
        """The exchange of what servers are asked to do, and what their queues begin with."""
        return f"{self.namespace}.server"

    @property
    def control(self) -> str:
        """Exchange and stream of the control log."""
        return f"{self.namespace}.control"

    def died_inflight(self, headers: Mapping[str, object]) -> int:
        """Return 1 if a message came back from the inflight queue of a worker that died, else 0."""
        match headers.get("x-death"):
            case [{"queue": str(queue)}, *_]:
                return int(queue.startswith(f"{self.inflight}."))
            case _:
                return 0

    def queue(self, task: str) -> str:
        """The queue a task's workers consume."""
        return f"{self.namespace}.q.{task}"

    def intake(self, task: str) -> str:
        """The bounded queue in front of it, for tasks with `max_length`."""
        return f"{self.namespace}.in.{task}"

    def dead_queue(self, task: str) -> str:
        """The dead-letter queue of a task."""
        return f"{self.namespace}.dead.{task}"

    def rung(self, milliseconds: int) -> str:
        """Queue and binding key of one rung of the delay ladder."""
        return f"{self.namespace}.delay.{milliseconds}"

    def reply(self, client: str) -> str:
        """Queue and binding key by which one client hears of its runs."""
        return f"{self.namespace}.reply.{client}"

    def trigger_route(self, task: str) -> Route:
        """Where a trigger goes."""
        return Route(self.tasks, task)

    def resume_route(self, task: str) -> Route:
        """Where a run goes that is handed back."""
        return Route(self.resume, task)

    def dead_route(self, task: str) -> Route:
        """Where a dead run goes."""
        return Route(self.dead, task)

    def inflight_route(self, task: str, queue: str) -> Route:
        """Where a checkpoint goes; if its worker dies, it comes back under its task."""
        return Route(self.inflight, task, (queue,))

    def server_route(self, what: str) -> Route:
        """Where a request to the servers goes: `wait`, `ask`, `admit` or `manifest`."""
        return Route(self.server, what)

    def control_route(self) -> Route:
        """Where an entry of the control log goes: to every worker, now and later."""
        return Route(self.control, "")

    def event_route(self, event: str, task: str, *, reply_to: str | None = None) -> Route:
        """Where an event goes: to whoever listens, and to the caller that waits for the run."""
        return Route(self.events, f"{event}.{task}", (reply_to,) if reply_to else ())

    def delay_route(self, task: str, delay_ms: int) -> tuple[Route, int]:
        """Return the longest rung within `delay_ms`, as a route, and the milliseconds left then.

        What is left is waited for by another hop when the message arrives, so a delay of any
        length is met without being early, in one hop per digit or so.
        """
        milliseconds = rung_below(delay_ms)
        return Route(self.delay, task, (self.rung(milliseconds),)), max(0, delay_ms - milliseconds)


def check_task_id(task: str) -> str:
    """Return `task`, or raise `InvalidOption`: it names queues and routing keys on the broker."""
    if not (isinstance(task, str) and _TASK_ID.fullmatch(task)):
        raise InvalidOption(
            f"task id {task!r}: use 1 to 127 letters, digits and '_', '-', '.', ':', "
            "beginning with a letter, a digit or '_'"
        )
    return task


def ladder() -> tuple[int, ...]:
    """Return the rungs of the delay ladder in milliseconds, shortest first."""
    rungs = {
        mantissa * 10**power // 100
        for power in range(1, 9)
        for mantissa in LADDER_MANTISSAS
        if SHORTEST_RUNG_MS <= mantissa * 10**power // 100 <= LONGEST_RUNG_MS
    }
    # Below 100 ms a hop through the broker costs about as much as the rungs are apart.
    fine = {10, 20, 50}
    return tuple(sorted({rung for rung in rungs if rung >= 100} | fine | {LONGEST_RUNG_MS}))


_LADDER: Final = ladder()


def rung_below(delay_ms: int) -> int:
    """Return the longest rung that is not longer than `delay_ms`; at least the shortest."""
    return max((rung for rung in _LADDER if rung <= delay_ms), default=SHORTEST_RUNG_MS)


def topology(names: Names, tasks: Iterable[TaskQueue] = ()) -> Topology:
    """Return everything that `tasks` need on the broker, shared parts included."""
    exchanges = [
        Exchange(names.tasks, "direct"),
        Exchange(names.delay, "direct"),
        Exchange(names.resume, "direct", {"alternate-exchange": names.unrouted}),
        Exchange(names.unrouted, "fanout"),
        Exchange(names.dead, "direct", {"alternate-exchange": names.unrouted}),
        Exchange(names.events, "topic"),
        Exchange(names.inflight, "direct"),
        Exchange(names.control, "fanout"),
    ]
    queues = [_kept(names.unrouted), Queue(names.control, CONTROL_LOG)]
    bindings = [
        Binding(names.unrouted, names.unrouted, ""),
        Binding(names.control, names.control, ""),
    ]
    for milliseconds in _LADDER:
        rung = names.rung(milliseconds)
        expiry: dict[str, Argument] = {
            "x-message-ttl": milliseconds,
            "x-dead-letter-exchange": names.resume,
        }
        queues.append(_quorum(rung, **expiry))
        bindings.append(Binding(names.delay, rung, rung))
    absent = []
    for task in tasks:
        made, bound, unbound = _task(names, task)
        queues += made
        bindings += bound
        absent += unbound
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings), tuple(absent))


def inflight(names: Names, queue: str) -> Topology:
    """Return what one worker needs for its checkpoints, beside the shared exchanges."""
    arguments: dict[str, Argument] = {
        "x-message-ttl": INFLIGHT_TTL_MS,
        "x-expires": INFLIGHT_EXPIRES_MS,
        "x-dead-letter-exchange": names.resume,
        "x-delivery-limit": DELIVERY_LIMIT,
    }
    return Topology((), (_quorum(queue, **arguments),), (Binding(names.inflight, queue, queue),))


def server(names: Names) -> Topology:
    """Return what servers need, beside the shared exchanges; who asks for something waits in it."""
    keys = {"waits": "wait", "admissions": "admit", "asks": "ask", "manifests": "manifest"}
    asked = [Binding(names.server, f"{names.server}.{name}", key) for name, key in keys.items()]
    lasting = ("waits", "admissions", "asks", "events", "triggers")
    kept = [_kept(f"{names.server}.{name}") for name in lasting]
    # Workers that start over and over fill it with what is the same: the oldest go.
    latest: dict[str, Argument] = {"x-max-length": LATEST_MANIFESTS, "x-overflow": "drop-head"}
    manifests = Queue(f"{names.server}.manifests", {"x-queue-type": "quorum", **latest})
    events = Binding(names.events, f"{names.server}.events", "#")
    exchanges = (Exchange(names.server, "direct"),)
    return Topology(exchanges, (*kept, manifests), (*asked, events))


def copies(names: Names, task: str) -> Binding:
    """Return what lets servers see each trigger of a task, before its run begins."""
    return Binding(names.tasks, f"{names.server}.triggers", task)


def _task(names: Names, task: TaskQueue) -> tuple[list[Queue], list[Binding], list[Binding]]:
    work, dead = names.queue(task.task), names.dead_queue(task.task)
    arguments: dict[str, Argument] = {
        "x-dead-letter-exchange": names.dead,
        "x-dead-letter-routing-key": task.task,
        "x-delivery-limit": task.options.delivery_limit,
    }
    queues = [_quorum(work, **arguments), _kept(dead)]
    bindings = [Binding(names.resume, work, task.task), Binding(names.dead, dead, task.task)]
    direct = Binding(names.tasks, work, task.task)
    intake = names.intake(task.task)
    bounded = Binding(names.tasks, intake, task.task)
    if task.options.max_length is None:
        return queues, [*bindings, direct], [bounded]
    # The limit is on the intake only: a delay whose target is full would stall its whole rung.
    queues.append(_quorum(intake, **arguments, **{"x-max-length": task.options.max_length}))
    return queues, [*bindings, bounded], [direct]


def _quorum(name: str, **arguments: Argument) -> Queue:
    # At-least-once dead-lettering needs reject-publish: without it, it is silently at-most-once.
    return Queue(
        name,
        {
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            **arguments,
        },
    )


def _kept(name: str) -> Queue:
    """Return a queue at the end of the line: nothing leaves it but by hand."""
    return Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": UNLIMITED_DELIVERIES})
