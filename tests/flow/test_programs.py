"""Any program of steps and sleeps, under any faults: the result of it without faults.

Programs are generated: steps in a row and side by side, sleeps, steps that fail and are retried or
replaced, attempts that fail. So are faults, each at some turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brokertask import Context, Retry
from tests.flow.rehearsal import (
    Fault,
    Rehearsal,
    StagedApp,
    alarm,
    crash,
    cut,
    cut_twice,
    drain,
    late_cut,
    restart,
)


@dataclass(frozen=True)
class Do:
    """A step that takes some turns; its first calls fail, and its own retries make up for it."""

    turns: int = 0
    fails: int = 0
    named: bool = True
    """Else it shares its name with others."""


@dataclass(frozen=True)
class Attempted:
    """A step whose first calls fail, and another in its place while it does."""

    fails: int


@dataclass(frozen=True)
class Sleep:
    """A sleep in its slot or out of it."""

    seconds: float


@dataclass(frozen=True)
class Stumble:
    """Code that is no step and fails some times; with it the attempt."""

    times: int


@dataclass(frozen=True)
class Together:
    """Programs side by side: in gather, or in a task group, which cancels what is left over."""

    branches: tuple[Program, ...]
    group: bool


Node: TypeAlias = Do | Attempted | Sleep | Stumble | Together
Program: TypeAlias = tuple[Node, ...]

OWN_RETRIES: Final = Retry(max_attempts=4, min_delay=2, jitter=False)
MANY: Final = Retry(max_attempts=500, min_delay=0, jitter=False)


class StepDown(Exception):
    pass


class Stumbled(Exception):
    pass


class Play:
    """One run of a program, and what its steps did."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.began: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.stumbled: Counter[str] = Counter()
        self.came_back: set[str] = set()
        self.repeated: list[str] = []

    async def task(self, ctx: Context) -> list[Any]:
        return await self._perform(ctx, self.program, "")

    async def _perform(self, ctx: Context, program: Program, path: str) -> list[Any]:
        results = [
            await self._node(ctx, node, f"{path}{place}") for place, node in enumerate(program)
        ]
        return [result for result in results if result is not None]

    async def _node(self, ctx: Context, node: Node, label: str) -> Any:
        match node:
            case Do(turns=turns, fails=fails, named=named):
                name = label if named or "." in label else "shared"
                return await self._step(ctx, name, label, turns, fails, OWN_RETRIES)
            case Attempted(fails=fails):
                try:
                    await self._step(ctx, label, label, 1, fails)
                except StepDown:
                    await self._step(ctx, f"{label} instead", f"{label} instead", 1, 0)
                return label
            case Sleep(seconds=seconds):
                await ctx.sleep(seconds, name=f"sleep {label}" if "." in label else None)
                return None
            case Stumble(times=times):
                self.stumbled[label] += 1
                if self.stumbled[label] <= times:
                    raise Stumbled(label)
                return None
            case Together(branches=branches, group=group):
                work = [
                    self._perform(ctx, each, f"{label}.{i}.") for i, each in enumerate(branches)
                ]
                if not group:
                    return await asyncio.gather(*work)
                async with asyncio.TaskGroup() as tasks:
                    begun = [tasks.create_task(each) for each in work]
                return [each.result() for each in begun]

    async def _step(
        self,
        ctx: Context,
        name: str,
        label: str,
        turns: int,
        fails: int,
        retry: Retry | None = None,
    ) -> str:
        result = await ctx.step(name, self._work, label, turns, fails, retry=retry)
        self.came_back.add(label)
        return result

    async def _work(self, label: str, turns: int, fails: int) -> str:
        self.began[label] += 1
        if label in self.came_back:
            self.repeated.append(label)
        for _ in range(turns):
            await asyncio.sleep(0)
        if self.began[label] <= fails:
            raise StepDown(label)
        self.ended[label] += 1
        return label


def expected(program: Program, path: str = "") -> list[Any]:
    """Return what a program comes to, whatever happens on the way."""
    results: list[Any] = []
    for place, node in enumerate(program):
        match node:
            case Do() | Attempted():
                results.append(f"{path}{place}")
            case Together(branches=branches):
                results.append(
                    [expected(each, f"{path}{place}.{i}.") for i, each in enumerate(branches)]
                )
            case _:
                pass
    return results


steps = st.builds(Do, turns=st.integers(0, 3), fails=st.integers(0, 2), named=st.booleans())
attempted = st.builds(Attempted, fails=st.integers(0, 3))
sleeps = st.builds(Sleep, seconds=st.sampled_from([0, 2, 30, 3_600]))
stumbles = st.builds(Stumble, times=st.integers(1, 2))
simple = steps | steps | attempted | sleeps | stumbles


def side_by_side(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    rows = st.lists(inner, min_size=1, max_size=3).map(tuple)
    branches = st.lists(rows, min_size=2, max_size=3).map(tuple)
    return st.builds(Together, branches=branches, group=st.booleans())


nodes = simple | side_by_side(simple | side_by_side(simple))
programs = st.lists(nodes, min_size=1, max_size=5).map(tuple)
moments = st.tuples(
    st.integers(0, 40),
    st.sampled_from([cut, cut_twice, late_cut, restart, alarm, drain, crash]),
)
faults = st.lists(moments, max_size=4)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(programs, faults, st.integers(0, 4))
def test_faults_change_nothing_but_when(
    program: Program, faults: Sequence[tuple[int, Fault]], latency: int
) -> None:
    asyncio.run(perform(program, faults, latency))


async def perform(program: Program, faults: Sequence[tuple[int, Fault]], latency: int = 0) -> None:
    """Run a program under faults, and hold what came of it against what was promised."""
    app, play, struck = StagedApp(latency=latency), Play(program), Counter[str]()
    app.task(id="program", retry=MANY, concurrency=1)(play.task)
    async with Rehearsal(app) as rehearsal:
        run = await app.client.trigger("program")
        for gap, fault in faults:
            await rehearsal.pass_turns(gap)
            if not rehearsal.over(run):
                struck[fault.__name__] += 1
                await fault(rehearsal)
        await rehearsal.until_over(run)
        last = rehearsal.last(run)
        assert (last.event, last.reason) == ("completed", None)
        assert await run.result(timeout=1) == expected(program)
        assert await rehearsal.left() == {}
    if not struck["crash"] or struck["crash"] + struck["drain"] == 1:
        # One more worker does not know which of the messages that a crash has left is stale.
        assert play.repeated == [], "a step that had come back was done again"
    if not struck["crash"] + struck["drain"]:
        assert max(play.ended.values(), default=0) <= 1, "a step was done twice by one worker"
