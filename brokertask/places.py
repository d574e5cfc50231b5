"""Which steps a run asks for, held against those it has finished.

Each call gets a key, its name and number, and a place: the call before it in its branch. Both are
the same whenever the code runs again, as long as the code and the results are; where they are not,
the run must not go on with what belongs to something else.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeGuard

from brokertask.errors import BrokertaskError, InvalidOption, StepMismatch
from brokertask.memory import Step
from brokertask.wait import WAIT

MAX_NAME: Final = 128
SLEEP: Final = "sleep"
"""What sleeps call, and what they are named unless they have a name or a branch of their own."""
UNNAMED: Final = (SLEEP, WAIT)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of `step` or `sleep`: what is asked for, or why it cannot be."""

    key: str
    function: str
    after: str | None = None
    problem: BrokertaskError | None = None
    name: str = ""
    number: int = 0


class Places:
    """The keys and places of one attempt."""

    def __init__(self, finished: Iterable[Step]) -> None:
        self._finished = {step.key: step for step in finished}
        self._followers = {
            step.after: step.key for step in self._finished.values() if step.after is not None
        }
        self._asked: set[str] = set()
        self._names: dict[str, tuple[object, int]] = {}
        self._failed: dict[str, list[int]] = {}
        self._last: dict[object, str] = {}
        """The latest call of each branch."""
        self._steps: dict[object, str] = {}
        """The same without sleeps, which are named after it."""
        self._main: object = None
        # What failed may have sent the task another way, which need not be taken again.
        self._strict = True

    def begin(self) -> None:
        """Take the current asyncio task for the one that the task's function runs in."""
        self._main = _branch()

    def ask(self, name: str | None, function: str) -> Asked:
        """Give a call its key and its place; at once, as later others may have come between.

        A sleep or wait without a name is named after the branch it is in.
        """
        branch = _branch()
        if self._main is None:
            self._main = branch  # The thread of a sync task, which only shows here.
        if name is None and function in UNNAMED:
            name = self._name(function, branch)
        elif not _is_name(name):
            wrong = InvalidOption(
                f"step name {name!r}: 1 to {MAX_NAME} characters of valid text, and no '#', which "
                "numbers them"
            )
            return Asked("", function, problem=wrong)
        if sys.exc_info()[0] is not None:
            # In an `except` or `finally`: the next attempt may not come here.
            self._strict = False
        owner, count = self._names.get(name, (branch, 0))
        self._names[name] = owner, count + 1
        key = self._key(name, count + 1)
        after = self._last.get(branch, "" if branch == self._main else None)
        self._last[branch] = key
        if function not in UNNAMED:
            self._steps[branch] = key
        self._asked.add(key)
        after = after if self._strict else None
        asked = Asked(key, function, after, name=name, number=count + 1)
        problem = _doubled(name, function) if owner != branch else self._mismatch(asked)
        return asked if problem is None else replace(asked, problem=problem)

    def failed(self, asked: Asked) -> None:
        """Take note of a call that came to nothing, as the task may go on without it.

        Later calls of its name are numbered apart. If this one goes well next time, they are
        others, and nothing is taken for what it is not: they are only done once more.
        """
        self._strict = False
        self._failed.setdefault(asked.name, []).append(asked.number)

    def _name(self, function: str, branch: object) -> str:
        last = self._steps.get(branch)
        return function if branch == self._main or last is None else f"{function} after {last}"

    def _key(self, name: str, number: int) -> str:
        failed = self._failed.get(name)
        if failed:
            return f"{name}#{number} without {','.join(map(str, sorted(failed)))}"
        return name if number == 1 else f"{name}#{number}"

    def _mismatch(self, asked: Asked) -> StepMismatch | None:
        known = self._finished.get(asked.key)
        if known is None:
            other = None if asked.after is None else self._followers.get(asked.after)
            if other is None or other in self._asked:
                return None
            return _differs(f"after {asked.after!r}" if asked.after else "first", other, asked.key)
        if known.function != asked.function:
            return _differs(f"step {asked.key!r} calls", known.function, asked.function)
        if None not in (known.after, asked.after) and known.after != asked.after:
            before, now = known.after or "nothing", asked.after or "nothing"
            return _differs(f"step {asked.key!r} comes after", before, now)
        return None


def _is_name(name: object) -> TypeGuard[str]:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or "#" in name:
        return False
    return name.encode("utf-8", "ignore").decode() == name


def _branch() -> object:
    """Return what is the same for calls one after the other: the asyncio task, or the thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return threading.get_ident()


def _doubled(name: str, function: str) -> StepMismatch:
    unnamed = {SLEEP: "ctx.sleep(..., name=...)", WAIT: "ctx.wait_for(..., name=...)"}
    named = unnamed.get(function, f"such as f'{name} {{number}}'")
    return StepMismatch(
        f"{name!r} is asked for in two asyncio tasks or threads, so which of them is first may be "
        f"different next time; give each a name of its own, {named}"
    )


def _differs(what: str, before: str, now: str) -> StepMismatch:
    return StepMismatch(
        f"the code has changed under this run: {what} {before!r} when it ran, now {now!r}. Bring "
        "back what it expects and redrive it, or redrive it without its steps (--forget)"
    )
