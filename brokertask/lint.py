"""The rules a topology and its tasks have to keep, whatever a broker would let pass. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from brokertask.durations import readable
from brokertask.topology import (
    LONGEST_RUNG_MS,
    UNLIMITED_DELIVERIES,
    Argument,
    Names,
    Queue,
    Topology,
)

Level: TypeAlias = Literal["error", "warning", "note"]
LEVELS: Final[tuple[Level, ...]] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at, and what to do about it."""

    level: Level
    where: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the rules need to know of a task."""

    task: str
    longest_delay: float
    """The longest delay its retries may take, in seconds."""
    bounded: bool
    """It has a `max_length`, and so an intake queue."""


def lint(topology: Topology, tasks: Sequence[Limits], names: Names) -> list[Finding]:
    """Return what breaks a rule, the errors first."""
    return [
        *_dangling(topology),
        *(finding for queue in topology.queues for rule in _RULES for finding in rule(queue)),
        *_limited_delay_targets(topology, names.resume),
        *_long_delays(tasks),
    ]


def _long_delays(tasks: Sequence[Limits]) -> Iterator[Finding]:
    rung = readable(LONGEST_RUNG_MS / 1000)
    for one in tasks:
        if one.longest_delay * 1000 > LONGEST_RUNG_MS:
            yield Finding(
                "note",
                one.task,
                f"retries up to {readable(one.longest_delay)} apart take several hops: the longest "
                f"rung of the delay ladder is {rung}",
                "nothing to do; or a shorter max_delay",
            )


def _dangling(topology: Topology) -> Iterator[Finding]:
    exchanges = {exchange.name for exchange in topology.exchanges}
    queues = {queue.name for queue in topology.queues}
    named = [
        *((queue.name, queue.arguments, "x-dead-letter-exchange") for queue in topology.queues),
        *((one.name, one.arguments, "alternate-exchange") for one in topology.exchanges),
    ]
    for name, arguments, key in named:
        target = arguments.get(key)
        if target is not None and target not in exchanges:
            yield Finding(
                "error",
                name,
                f"its {key} {target!r} is not declared",
                f"declare exchange {target!r}: what is sent to a missing one is lost or stalls",
            )
    for binding in topology.bindings:
        if binding.exchange not in exchanges or binding.queue not in queues:
            yield Finding(
                "error",
                binding.queue,
                f"bound to {binding.exchange!r}, and one of the two is not declared",
                "declare both",
            )


def _limited_delay_targets(topology: Topology, resume: str) -> Iterator[Finding]:
    targets = {binding.queue for binding in topology.bindings if binding.exchange == resume}
    for queue in topology.queues:
        limits = {"x-max-length", "x-max-length-bytes"} & set(queue.arguments)
        if queue.name in targets and limits:
            yield Finding(
                "error",
                queue.name,
                f"{min(limits)} on a queue that delays deliver to: once it is full, the delays of "
                "all tasks stall",
                "put the limit on an intake queue in front of it: the task's `max_length`",
            )


def _delivery_limit(queue: Queue) -> Iterator[Finding]:
    arguments = queue.arguments
    limit = arguments.get("x-delivery-limit")
    if arguments.get("x-queue-type") != "quorum" or "x-message-ttl" in arguments:
        return
    if limit is None:
        yield Finding(
            "error",
            queue.name,
            "no x-delivery-limit: RabbitMQ 4 then takes 20, and earlier ones have none",
            "write the number",
        )
    elif isinstance(limit, int) and limit < 1:
        yield Finding(
            "error",
            queue.name,
            f"x-delivery-limit {limit} buries at the first redelivery before RabbitMQ 4.0",
            f"for no limit write {UNLIMITED_DELIVERIES}",
        )
    elif limit != UNLIMITED_DELIVERIES and "x-dead-letter-exchange" not in arguments:
        yield Finding(
            "error",
            queue.name,
            f"without x-dead-letter-exchange, a message is dropped after {limit} lost deliveries",
            "set the dead-letter exchange",
        )


def _strategy(queue: Queue) -> Iterator[Finding]:
    arguments = queue.arguments
    safely = arguments.get("x-dead-letter-strategy") == "at-least-once"
    if "x-dead-letter-exchange" in arguments and not safely:
        yield Finding(
            "error",
            queue.name,
            "it dead-letters at most once: a crash of the broker loses messages on their way",
            "set x-dead-letter-strategy to at-least-once and x-overflow to reject-publish",
        )
    if safely and arguments.get("x-overflow") != "reject-publish":
        yield Finding(
            "error",
            queue.name,
            "at-least-once without x-overflow reject-publish is at-most-once; no broker says so",
            "set x-overflow to reject-publish",
        )
    if safely and arguments.get("x-queue-type") != "quorum":
        yield Finding(
            "error",
            queue.name,
            "only quorum queues dead-letter at least once",
            "set x-queue-type to quorum",
        )


def _expiry(queue: Queue) -> Iterator[Finding]:
    if "x-expires" in queue.arguments:
        yield Finding(
            "error",
            queue.name,
            "x-expires deletes it with all it holds; being published to does not keep it",
            "leave x-expires out",
        )


_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "x-queue-type": ("quorum", "classic", "stream"),
    "x-dead-letter-strategy": ("at-least-once", "at-most-once"),
    "x-overflow": ("reject-publish", "drop-head", "reject-publish-dlx"),
    "x-queue-leader-locator": ("balanced", "client-local"),
}
_NUMBERS: Final = (
    "x-delivery-limit",
    "x-message-ttl",
    "x-expires",
    "x-max-length",
    "x-max-length-bytes",
    "x-consumer-timeout",
    "x-quorum-initial-group-size",
    "x-stream-max-segment-size-bytes",
)
_TEXTS: Final = ("x-dead-letter-exchange", "x-dead-letter-routing-key", "x-max-age")
_SWITCHES: Final = ("x-single-active-consumer",)
_KNOWN: Final = (*_WORDS, *_NUMBERS, *_TEXTS, *_SWITCHES)


def _arguments(queue: Queue) -> Iterator[Finding]:
    # A broker takes any x-argument: a misspelt one does nothing, and nobody says so.
    for name, value in queue.arguments.items():
        if name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(_KNOWN)}"
            yield Finding("error", queue.name, f"{name!r} is no argument of a queue", fix)
        elif wanted := _wrong(name, value):
            yield Finding("error", queue.name, f"{name} is {value!r}", f"it has to be {wanted}")


def _wrong(name: str, value: Argument) -> str | None:
    """Return what `value` should have been; None if it is right."""
    if name in _WORDS:
        return None if value in _WORDS[name] else " or ".join(_WORDS[name])
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if name in _TEXTS:
        return None if isinstance(value, str) else "a text"
    lowest = -1 if name == "x-delivery-limit" else 0
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
    return None if whole else "a whole number"


_RULES: Final[Sequence[Callable[[Queue], Iterator[Finding]]]] = (
    _delivery_limit,
    _strategy,
    _expiry,
    _arguments,
)
