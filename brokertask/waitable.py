"""What a task may wait for: its children, other runs, tokens, events; and what may come of it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from pydantic import TypeAdapter

from brokertask.errors import (
    AccessDenied,
    BatchError,
    ChildFailed,
    EnvelopeError,
    InvalidPayload,
    PublishError,
    ResultUnavailable,
    Unroutable,
)
from brokertask.run import Run
from brokertask.typed import load
from brokertask.values import MSGPACK, decode
from brokertask.wait import Failing, Got, Target, token_id

log = logging.getLogger("brokertask.task")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

SEND_BACKOFF_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class TimedOut:
    """What was waited for has not come in time. False where a condition is asked for."""

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A token was rejected. False where a condition is asked for."""

    reason: str = ""

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class Failure:
    """A child of a map that gave no result. False where a condition is asked for."""

    run_id: str
    task: str
    reason: str
    """As of `ChildFailed`; or `timed_out`: it has not ended in the time of the wait."""
    error: Mapping[str, str] = field(default_factory=dict)
    """What its last attempt raised: `type` and `message`; empty if nothing was."""

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class First(Generic[R_co]):
    """The first of several that came."""

    index: int
    """Which it was, in the order in which they were given."""
    value: R_co


class Waitable(Generic[R_co]):
    """What `ctx.wait_for` takes."""

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        raise NotImplementedError

    async def begin(self, run_ids: Sequence[str]) -> None:
        """Do what has to be done before it can be waited for, with these ids for children."""

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> R_co:
        """Return what the task gets; claims are bytes by now."""
        raise NotImplementedError


class Sender(Protocol):
    """What triggers children: see `client.trigger_many`."""

    async def __call__(self, payloads: Sequence[object], run_ids: Sequence[str], /) -> object:
        """Return when the runs are on the broker's disk."""
        ...


class _Children(Waitable[R_co]):
    def __init__(
        self,
        task: str,
        payloads: Sequence[object],
        *,
        result: TypeAdapter[Any],
        send: Sender,
    ) -> None:
        self._task = task
        self._payloads = payloads
        self._result = result
        self._send = send

    async def begin(self, run_ids: Sequence[str]) -> None:
        """Trigger them, until the broker has them all.

        Asked for by an attempt that was lost before, they are the same runs.

        Raises:
            Unroutable, AccessDenied: What no patience mends.
        """
        left, pause = list(zip(self._payloads, run_ids, strict=True)), 0.2
        while left:
            try:
                await self._send([payload for payload, _ in left], [run_id for _, run_id in left])
                return
            except BatchError as error:
                results = error.results
            except PublishError as error:
                results = tuple(error for _ in left)
            problems = [result for result in results if isinstance(result, PublishError)]
            for problem in problems:
                if isinstance(problem, Unroutable | AccessDenied):
                    raise problem
            taken = [not isinstance(result, PublishError) for result in results]
            left = [one for one, done in zip(left, taken, strict=True) if not done]
            log.warning("%d children of %s not triggered yet: %s", len(left), self._task, results)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(SEND_BACKOFF_MAX, pause * 2)


class Call(_Children[R_co]):
    """One child run; made by `task.call`."""

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        return Target("call", self._task)

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> R_co:
        """Return its result.

        Raises:
            ChildFailed: It gave none.
        """
        value: R_co = _result(got[0], self._result, run_ids[0], self._task)
        return value


class Map(_Children[list[R_co | Failure]], Generic[R_co]):
    """One child run for each of several payloads; made by `task.map`."""

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        return Target("map", self._task, len(self._payloads))

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> list[R_co | Failure]:
        """Return the results in the order of the payloads, a `Failure` where there is none."""
        return [self._one(one, run_id) for one, run_id in zip(got, run_ids, strict=True)]

    def _one(self, got: Got, run_id: str) -> R_co | Failure:
        if got.kind == "timed_out":
            return Failure(run_id, self._task, "timed_out")
        if isinstance(failing := got.value, Failing):
            return Failure(failing.run_id, failing.task, failing.reason, _error(failing))
        value: R_co = _result(got, self._result, run_id, self._task)
        return value


class OtherRun(Waitable[R_co]):
    """A run that was triggered elsewhere, or in a step."""

    def __init__(self, run: Run[R_co]) -> None:
        self._run = run

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        return Target("run", self._run.run_id)

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> R_co:
        """Return its result.

        Raises:
            ChildFailed: It gave none.
        """
        run = self._run
        value: R_co = _result(got[0], run.result_type, run.run_id, run.task)
        return value


class Token(Waitable[R_co | TimedOut | Rejected], Generic[R_co]):
    """A decision that somebody else makes: a person, or a service that calls back.

    Attributes:
        name: Its name in the run.
        id: What it is completed by in the API and on the command line; no secret.
        secret: What a callback proves itself with; whoever has it can complete the token.
    """

    def __init__(
        self, name: str, secret: str, *, due_ms: int | None, kind: TypeAdapter[Any]
    ) -> None:
        self.name = name
        self.id = token_id(secret)
        self.secret = secret
        self._due_ms = due_ms
        self._kind = kind

    def __repr__(self) -> str:
        return f"<Token {self.name} {self.id}>"

    @property
    def callback(self) -> str:
        """The path at a server that completes it by a POST of `{"value": ...}` in JSON."""
        return f"/api/v1/callbacks/{self.secret}"

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        return Target("token", self.id, due_ms=self._due_ms, name=self.name)

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> R_co | TimedOut | Rejected:
        """Return what it was completed with.

        Raises:
            InvalidPayload: It is not of the token's type.
        """
        (one,) = got
        if one.kind == "timed_out":
            return TimedOut()
        if one.kind == "rejected":
            return Rejected(one.value if isinstance(one.value, str) else "")
        try:
            value: R_co = load(self._kind, _plain(one))
        except InvalidPayload as error:
            raise InvalidPayload(f"token {self.name!r} was completed otherwise: {error}") from None
        return value


class Happening(Waitable[dict[str, Any] | TimedOut]):
    """An event that anybody publishes to `bt.events`; made by `ctx.event`."""

    def __init__(
        self, key: str, where: Mapping[str, Any], *, due_ms: int | None, seen: Sequence[str]
    ) -> None:
        self._target = Target("event", key, 1, where, due_ms, tuple(seen))

    def target(self) -> Target:
        """Return what is waited for, as it travels."""
        return self._target

    def value(self, got: Sequence[Got], run_ids: Sequence[str]) -> dict[str, Any] | TimedOut:
        """Return what was published."""
        (one,) = got
        if one.kind == "timed_out":
            return TimedOut()
        value: dict[str, Any] = _plain(one)
        return value


def _result(got: Got, kind: TypeAdapter[Any], run_id: str, task: str) -> Any:
    if got.kind == "timed_out":
        return TimedOut()
    if isinstance(failing := got.value, Failing):
        task = failing.task or task
        said = f": {failing.type}: {failing.message}" if failing.type else ""
        raise ChildFailed(
            f"run {failing.run_id} of {task!r} gave no result ({failing.reason}){said}. Redrive "
            "it, and then this one",
            run_id=failing.run_id,
            task=task,
            reason=failing.reason,
            error=_error(failing),
        )
    try:
        return load(kind, _plain(got))
    except InvalidPayload as error:
        raise ResultUnavailable(
            f"run {run_id} of {task!r} completed, but its result is of another type here: {error}",
            run_id=run_id,
            task=task,
        ) from None


def _plain(got: Got) -> Any:
    if not isinstance(got.value, bytes):
        raise EnvelopeError("what came of a wait is no value", reason="undecodable")
    return decode(got.value, MSGPACK)


def _error(failing: Failing) -> dict[str, str]:
    return {"type": failing.type, "message": failing.message} if failing.type else {}
