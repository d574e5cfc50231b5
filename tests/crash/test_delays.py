"""Delays and retries are on time: never early, and hardly late."""

from __future__ import annotations

import random
import statistics

import pytest

from tests.crash.delays import CLOCK_STEP, early, lateness, report
from tests.crash.stage import Stage

pytestmark = pytest.mark.anyio


async def test_retries_come_after_1_2_4_and_8_seconds(stage: Stage) -> None:
    await stage.worker()
    runs = [await stage.trigger("backing_off") for _ in range(5)]
    dead = await stage.until_dead("backing_off", count=5, timeout=25)
    assert {(letter.reason, letter.attempts) for letter in dead} == {("max_attempts", 5)}
    waited: list[list[float]] = [[], [], [], []]
    for run in runs:
        starts = stage.journal.of(run.run_id, "started")
        ends = stage.journal.of(run.run_id, "left")
        for attempt, (end, start) in enumerate(zip(ends, starts[1:], strict=False)):
            waited[attempt].append(start.at - end.at)
    for expected, measured in zip((1, 2, 4, 8), waited, strict=True):
        assert min(measured) >= expected - CLOCK_STEP
        assert statistics.median(measured) <= expected + 0.25
    await stage.check()


async def test_delays_of_any_length_in_any_order_are_on_time(stage: Stage) -> None:
    await stage.worker()
    choice = random.Random(11)
    lates = await lateness(stage, [5.0, 1.0, *(choice.uniform(0.1, 5) for _ in range(38))])
    assert early(lates) == 0, report(lates)
    assert lates[1] < 1, "the shorter one waited for the longer one in front of it"
    assert statistics.median(lates) < 0.25, report(lates)
    assert max(lates) < 2, report(lates)
    await stage.check()
