"""What a run waits for, as it travels: to the server, and back with what came of it. Pure.

A wait is remembered like a step, with the function `wait` and a map for its result: `for` says
what is waited for, in targets; `got`, once it is over, what came of each of their conditions. The
children of a run have ids that follow from its own, so that nobody has to write them down, and
asked for once more they are the same.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from brokertask.claim import Claim
from brokertask.errors import EnvelopeError
from brokertask.values import MSGPACK, decode, pack

WAIT: Final = "wait"
"""The function of a wait, among steps; what one without a name is called."""
MAX_CONDITIONS: Final = 10_000
"""Of all the waits of a run together; a larger fan-out is done in several runs."""
SECRET: Final = "token"
"""What the ids of tokens begin with."""

TargetKind: TypeAlias = Literal["call", "map", "run", "token", "event"]
GotKind: TypeAlias = Literal["value", "failed", "timed_out", "rejected"]


@dataclass(frozen=True, slots=True)
class Target:
    """One of the things that a wait is for. Equal ones wait for the same."""

    kind: TargetKind
    subject: str
    """The task of children; the id of a run or a token; the routing key of an event."""
    count: int = 1
    """How many children."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """What an event has to hold."""
    due_ms: int | None = field(default=None, compare=False)
    """When it is given up, in ms since the epoch."""
    seen: tuple[str, ...] = field(default=(), compare=False)
    """The events of this key that the run has had."""
    name: str = field(default="", compare=False)
    """That of a token in its run."""

    @staticmethod
    def read(raw: Any) -> Target:
        """Return the target in a decoded array.

        Raises:
            EnvelopeError: It is none.
        """
        match raw:
            case [str(kind), str(subject), int(count), dict(where), int() | None as due, *rest]:
                if kind in get_args(TargetKind) and 0 <= count <= MAX_CONDITIONS:
                    match rest:
                        case [list(seen), str(name), *_]:
                            had = tuple(str(one) for one in seen)
                            known = cast("TargetKind", kind)
                            return Target(known, subject, count, where, due, had, name)
        raise EnvelopeError("a wait is for something unknown", reason="undecodable")

    def plain(self) -> list[object]:
        """Return what `read` reads."""
        common: list[object] = [self.kind, self.subject, self.count, self.where, self.due_ms]
        return [*common, list(self.seen), self.name]

    @property
    def words(self) -> str:
        """What is waited for, for people: `call:charge`, `token:approval`."""
        return f"{self.kind}:{self.name or self.subject}"


@dataclass(frozen=True, slots=True)
class Failing:
    """How a run ended that gave no result."""

    run_id: str
    task: str
    reason: str
    """That of its dead letter; or `expired`, `cancelled`, or `too_large`: its result does not fit
    into what the run that waits may remember."""
    type: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Got:
    """What came of one condition."""

    kind: GotKind
    value: bytes | Claim | Failing | str | None = None
    """A result in msgpack or the claim for it; how a run failed; why a token was rejected."""
    source: str = field(default="", compare=False)
    """The id of the event that it came with; does not travel."""

    @staticmethod
    def read(raw: Any) -> Got:
        """Return what is in a decoded array.

        Raises:
            EnvelopeError: It is none.
        """
        match raw:
            case ["value", bytes() as value, *_]:
                return Got("value", value)
            case ["value", dict(claim), *_]:
                return Got("value", Claim.read(claim))
            case ["failed", [str(run_id), str(task), str(reason), str(kind), str(message)], *_]:
                return Got("failed", Failing(run_id, task, reason, kind, message))
            case ["rejected", str(reason), *_]:
                return Got("rejected", reason)
            case ["timed_out", *_]:
                return Got("timed_out")
        raise EnvelopeError("what came of a wait is not understood", reason="undecodable")

    def plain(self) -> list[object]:
        """Return what `read` reads."""
        match self.value:
            case Claim() as claim:
                return [self.kind, asdict(claim)]
            case Failing() as failing:
                return [self.kind, list(asdict(failing).values())]
            case value:
                return [self.kind, value]


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the facts that a target is made of: one for each child."""

    kind: Literal["run", "token", "event"]
    subject: str
    target: Target


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait of a run: what it is for, and what came of it."""

    targets: tuple[Target, ...]
    first: bool = False
    """It is over with the first of its targets, not with the last."""
    due_ms: int | None = None
    redrives: int = 0
    """How often the run had been redriven when it first asked; part of its children's ids."""
    got: tuple[Got | None, ...] | Claim | None = None
    """What came of each condition, None for those that were not waited for any longer."""

    def pack(self) -> bytes:
        """Return it as msgpack."""
        raw: dict[str, object] = {"for": [target.plain() for target in self.targets]}
        if self.first:
            raw["first"] = True
        if self.due_ms is not None:
            raw["due"] = self.due_ms
        if self.redrives:
            raw["redrives"] = self.redrives
        if isinstance(self.got, Claim):
            raw["claim"] = asdict(self.got)
        elif self.got is not None:
            raw["got"] = plain_gots(self.got)
        return pack(raw)

    @staticmethod
    def unpack(data: bytes) -> Wait:
        """Read what `pack` wrote.

        Raises:
            EnvelopeError: It is damaged.
        """
        raw = decode(data, MSGPACK)
        match raw:
            case {"for": list(targets)}:
                due, redrives = raw.get("due"), raw.get("redrives", 0)
                if isinstance(due, int | None) and isinstance(redrives, int):
                    read = tuple(Target.read(target) for target in targets)
                    return Wait(read, bool(raw.get("first")), due, redrives, _got(raw))
        raise EnvelopeError("a wait that is remembered is damaged", reason="undecodable")

    def conditions(self, run_id: str, key: str) -> Iterator[Condition]:
        """Return what it waits for, one by one; `key` is what the wait is remembered by."""
        for place, target in enumerate(self.targets):
            match target.kind:
                case "call" | "map":
                    for child in self.children(run_id, key, place):
                        yield Condition("run", child, target)
                case "token" | "event" | "run" as kind:
                    yield Condition(kind, target.subject, target)

    def children(self, run_id: str, key: str, place: int) -> list[str]:
        """Return the ids of the children of the target at a place."""
        seed = f"{run_id}\n{self.redrives}\n{key}\n{place}\n"
        return [child_id(f"{seed}{number}") for number in range(self.targets[place].count)]

    def decide(
        self, got: Sequence[Got | None], now_ms: int
    ) -> tuple[tuple[Got | None, ...], int | None]:
        """Return what the wait came to, and otherwise nothing and when to look again.

        Args:
            got: What is known of each condition.
            now_ms: The present.
        """
        late = self.due_ms is not None and self.due_ms <= now_ms
        found, dues, over = list(got), [self.due_ms], []
        place = 0
        for target in self.targets:
            span = range(place, place + target.count)
            place += target.count
            missing = [at for at in span if found[at] is None]
            if missing and target.due_ms is not None and target.due_ms <= now_ms:
                for at in missing:
                    found[at] = Got("timed_out")
                missing = []
            elif missing:
                dues.append(target.due_ms)
            over.append(not missing)
        if any(over) if self.first else all(over):
            return tuple(found), None
        if late:
            return tuple(one or Got("timed_out") for one in found), None
        return (), min((due for due in dues if due is not None), default=None)

    @property
    def failed(self) -> bool:
        """Whether it raises in the task: of a run that it waits for itself there is no result."""
        if not isinstance(self.got, tuple):
            return False
        place, failed = 0, False
        for target in self.targets:
            for got in self.got[place : place + target.count]:
                if target.kind in ("call", "run") and got is not None and got.kind == "failed":
                    failed = True
            place += target.count
        return failed

    def over(self, got: Sequence[Got | None]) -> Wait:
        """Return it with what came of it, and the events it came with among those it has seen."""
        place, targets = 0, []
        for target in self.targets:
            came = tuple(one.source for one in got[place : place + target.count] if one)
            seen = (*target.seen, *filter(None, came))
            targets.append(replace(target, seen=seen) if target.kind == "event" else target)
            place += target.count
        return replace(self, targets=tuple(targets), got=tuple(got))

    def reopened(self) -> Wait:
        """Return it as it was before anything came of it."""
        return replace(self, got=None)


def reopened(result: bytes) -> bytes:
    """Return a wait, packed, that is asked for anew if it raised in the task; else as it is."""
    try:
        wait = Wait.unpack(result)
    except EnvelopeError:
        return result  # Whoever performs the run says so.
    return wait.reopened().pack() if wait.failed else result


def plain_gots(got: Sequence[Got | None]) -> list[object]:
    """Return what came of conditions as plain values."""
    return [None if one is None else one.plain() for one in got]


def read_gots(raw: Any) -> tuple[Got | None, ...]:
    """Return what `plain_gots` has written.

    Raises:
        EnvelopeError: It is damaged.
    """
    if not isinstance(raw, list):
        raise EnvelopeError("what came of a wait is no array", reason="undecodable")
    return tuple(None if one is None else Got.read(one) for one in raw)


def _got(raw: dict[str, Any]) -> tuple[Got | None, ...] | Claim | None:
    if "claim" in raw:
        return Claim.read(raw["claim"])
    return read_gots(raw["got"]) if "got" in raw else None


def child_id(seed: str) -> str:
    """Return a run id that is the same for the same seed."""
    return str(uuid.UUID(bytes=hashlib.sha256(seed.encode()).digest()[:16], version=5))


def token_id(secret: str) -> str:
    """Return the id of the token with a secret: what is public of it, and what proves it.

    So nothing that is stored or shown lets anybody use the callback of a token, and whoever has
    the secret can be believed before the run has come to wait for it.
    """
    return f"{SECRET}_{hashlib.sha256(secret.encode()).hexdigest()[:32]}"


def holds(value: object, where: Mapping[str, Any]) -> bool:
    """Whether a map holds all that `where` does, in the maps inside it, too."""
    if not isinstance(value, Mapping):
        return False
    return all(
        name in value and (holds(value[name], wanted) if _is_map(wanted) else value[name] == wanted)
        for name, wanted in where.items()
    )


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)
