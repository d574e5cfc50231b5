"""The waits and tokens of one attempt: what a task asks for, and what has come of it.

The first time, a wait triggers its children and is remembered; then the run leaves its worker, and
its message waits in a server. When that sends it on, the wait holds what came of it, and the code
that runs again from the top gets it at once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pydantic import TypeAdapter

from brokertask.claim import Claim
from brokertask.claims import Claims
from brokertask.errors import ConfigurationError, InvalidOption, StepMismatch
from brokertask.memory import Step
from brokertask.places import Asked
from brokertask.steps import Steps
from brokertask.values import MSGPACK, decode, encode
from brokertask.wait import MAX_CONDITIONS, WAIT, Got, Target, Wait, read_gots
from brokertask.waitable import First, Happening, TimedOut, Token, Waitable

MAX_TOKEN_NAME: Final = 120
FETCHES: Final = 16
"""How many results are fetched from the payload store at a time."""
TOKEN: Final = "token"
"""The function of a token, among steps."""


class Waits:
    """What one attempt waits for."""

    def __init__(self, steps: Steps, run_id: str) -> None:
        self._steps = steps
        self._run_id = run_id

    def token(self, name: str, *, timeout: float | None, kind: TypeAdapter[Any]) -> Token[Any]:
        """Return the token of this name, made when it is first asked for.

        It is saved with what follows it: until then nobody else can know of it.

        Raises:
            InvalidOption: The name is too long, or empty.
        """
        if not (isinstance(name, str) and 0 < len(name) <= MAX_TOKEN_NAME):
            raise InvalidOption(f"the name of a token has 1 to {MAX_TOKEN_NAME} characters")
        key = f"{TOKEN}#{name}"
        known = self._steps.known(key)
        if known is None:
            now_ms = self._steps.clock.now_ms()
            due_ms = None if timeout is None else now_ms + round(timeout * 1000)
            made = encode([secrets.token_urlsafe(24), due_ms])
            known = Step(key, TOKEN, None, made)
            self._steps.remember(known)
        assert isinstance(known.result, bytes)
        secret, due_ms = decode(known.result, MSGPACK)
        return Token(name, secret, due_ms=due_ms, kind=kind)

    def event(self, key: str, where: Mapping[str, Any], *, timeout: float | None) -> Happening:
        """Return what waits for an event that this run has not had yet."""
        due_ms = None if timeout is None else self._steps.clock.now_ms() + round(timeout * 1000)
        return Happening(key, where, due_ms=due_ms, seen=self._seen(key))

    def wait_for(
        self,
        waitables: Sequence[Waitable[Any]],
        *,
        first: bool,
        timeout: float | None,
        name: str | None,
    ) -> Coroutine[Any, Any, Any]:
        """Return what gives all values in a list, or the `First` of them; it has its place now."""
        count = sum(waitable.target().count for waitable in waitables)
        if not waitables or count > MAX_CONDITIONS:
            raise InvalidOption(
                f"a wait is for 1 to {MAX_CONDITIONS} things, not {count}; let children have "
                "children"
            )
        asked = self._steps.ask(name, WAIT)
        return self._steps.awaited(asked, self._wait(asked, waitables, first, timeout))

    async def _wait(
        self,
        asked: Asked,
        waitables: Sequence[Waitable[Any]],
        first: bool,
        timeout: float | None,
    ) -> Any:
        steps = self._steps
        steps.admit(asked)
        targets = tuple(waitable.target() for waitable in waitables)
        known = steps.known(asked.key)
        if known is None:
            with steps.working(asked):
                wait = await self._begin(asked, waitables, Wait(targets, first), timeout)
        else:
            wait = Wait.unpack(known.result if isinstance(known.result, bytes) else b"")
            if wait.targets != targets or wait.first != first:
                steps.defect = steps.defect or _other(asked.key, wait.targets, targets)
                raise steps.defect
        if wait.got is None:
            await steps.wait([target.words for target in targets])
        return self._values(asked.key, wait, waitables, await self._fetched(wait))

    async def _begin(
        self,
        asked: Asked,
        waitables: Sequence[Waitable[Any]],
        wait: Wait,
        timeout: float | None,
    ) -> Wait:
        """Trigger the children, and remember the wait: not before, or a crash would lose them."""
        host = self._steps.host
        if host is None:
            raise ConfigurationError(
                "wait_for needs a worker; in a test, run the task in a Harness(app, server=True)"
            )
        redrives = await host.find_server()
        due_ms = None if timeout is None else self._steps.clock.now_ms() + round(timeout * 1000)
        wait = replace(wait, due_ms=due_ms, redrives=redrives)
        for place, waitable in enumerate(waitables):
            await waitable.begin(wait.children(self._run_id, asked.key, place))
        if not any(target.count for target in wait.targets):
            wait = wait.over(())
        self._steps.remember(Step(asked.key, asked.function, asked.after, wait.pack()))
        return wait

    async def _fetched(self, wait: Wait) -> list[Got | None]:
        """Return what came of each condition, with what is in the payload store."""
        steps, got = self._steps, wait.got
        if isinstance(got, Claim):
            got = read_gots(decode(await steps.stored(steps.claims.get(got)), MSGPACK))
        fetching = asyncio.Semaphore(FETCHES)
        found = (_fetch(one, steps.claims, fetching) for one in got or ())
        return list(await steps.stored(asyncio.gather(*found)))

    def _values(
        self,
        key: str,
        wait: Wait,
        waitables: Sequence[Waitable[Any]],
        got: Sequence[Got | None],
    ) -> Any:
        values: list[Any] = []
        place = 0
        for index, (target, waitable) in enumerate(zip(wait.targets, waitables, strict=True)):
            mine = got[place : place + target.count]
            place += target.count
            came = [one for one in mine if one is not None]
            if len(came) < target.count:
                continue  # Another one was first.
            run_ids = wait.children(self._run_id, key, index)
            if wait.first and any(one.kind == "timed_out" for one in came) and _late(wait, target):
                continue
            value = waitable.value(came, run_ids)
            if wait.first:
                return First(index, value)
            values.append(value)
        return TimedOut() if wait.first else values

    def _seen(self, key: str) -> list[str]:
        """Return the events of a key that the run has had."""
        seen: list[str] = []
        for step in self._steps.memory.steps:
            if step.function == WAIT and isinstance(step.result, bytes):
                for target in Wait.unpack(step.result).targets:
                    if (target.kind, target.subject) == ("event", key):
                        seen += target.seen
        return list(dict.fromkeys(seen))


def _late(wait: Wait, target: Target) -> bool:
    """Whether it was the wait's time that ran out, and not the target's own."""
    return target.due_ms is None or (wait.due_ms is not None and wait.due_ms < target.due_ms)


async def _fetch(got: Got | None, claims: Claims, fetching: asyncio.Semaphore) -> Got | None:
    if got is None or not isinstance(got.value, Claim):
        return got
    async with fetching:
        return replace(got, value=await claims.get(got.value))


def _other(key: str, before: Sequence[Target], now: Sequence[Target]) -> StepMismatch:
    told = [", ".join(f"{one.kind} {one.subject}" for one in targets) for targets in (before, now)]
    return StepMismatch(
        f"{key!r} waited for {told[0]}, and now for {told[1]}. What a task triggers and then waits "
        "for is triggered by task.call(...) or within a step: outside of them, it is triggered "
        "anew whenever the run goes on"
    )
