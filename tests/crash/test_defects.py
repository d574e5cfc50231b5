"""What is wrong with brokertask itself must not hold a slot for ever, nor lose a run."""

from __future__ import annotations

import pytest

from brokertask import App, Settings, executor
from brokertask.testing import Harness

pytestmark = pytest.mark.anyio


async def test_a_run_that_breaks_brokertask_ends_in_the_dead_letters(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = App("defective", settings=Settings(amqp_url="memory:"))

    @app.task(concurrency=1)
    async def double(number: int) -> int:
        return number * 2

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect of ours")

    async with Harness(app) as harness:
        with monkeypatch.context() as patch:
            patch.setattr(app.telemetry, "attempt", broken)
            patch.setattr(executor, "DEFECT_PAUSE", 0)
            lost = await double.trigger(1)
            await harness.drain()
        (dead,) = harness.dead_letters("double")
        assert dead.run_id == lost.run_id
        assert dead.reason == "delivery_limit"
        assert "a defect of ours" in caplog.text
        good = await double.trigger(2)
        await harness.drain()
        assert await good.result(timeout=1) == 4
