"""What a run leaves behind: nothing that only the garbage collector can find."""

from __future__ import annotations

import gc

import pytest

from tests.bench.worker import CASES, IN_FLIGHT, Case, Stand

pytestmark = pytest.mark.anyio

RUNS = 500


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_a_run_leaves_nothing_to_the_garbage_collector(case: Case) -> None:
    stand = Stand(case)
    async with stand.worker:
        await stand.cost(IN_FLIGHT)
        gc.collect()
        gc.disable()
        try:
            await stand.cost(RUNS)
            assert gc.collect() < RUNS
        finally:
            gc.enable()
