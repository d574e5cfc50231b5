"""Jobs over runs that were chosen, that meet filters, or that wait in a queue."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import Page, expect

from tests.browser.shop import Shop
from tests.browser.sitting import Sitting
from tests.browser.test_queues import look

pytestmark = pytest.mark.anyio


async def queued(stage: Shop, count: int) -> list[str]:
    """Have so many runs wait behind a pause."""
    async with stage.api.client() as client:
        assert (await client.post("/tasks/echo/pause", json={})).is_success
    runs = await stage.tasks["echo"].trigger_many(list(range(count)))
    return [run.run_id for run in runs]


async def resumed(stage: Shop) -> None:
    async with stage.api.client() as client:
        assert (await client.post("/tasks/echo/resume", json={})).is_success


async def begun(page: Page, title: str) -> None:
    await expect(page).to_have_url(re.compile("/jobs/[^/]+$"))
    await expect(page.get_by_role("heading", level=1)).to_have_text(title)


async def test_chosen_runs_are_cancelled_and_no_other(stage: Shop, sitting: Sitting) -> None:
    first, second, third = await queued(stage, 3)
    page = await sitting.go("runs?task=echo")
    await expect(page.locator("[data-rows] tr")).to_have_count(3)
    await page.get_by_label(f"Choose {first}").check()
    await page.get_by_label(f"Choose {third}").check()
    await page.get_by_role("button", name="Cancel…").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Cancel 2 runs")
    await look(page, page.url)
    await page.get_by_label("Reason, for the audit log").fill("ordered by mistake")
    sitting.expect("422")
    await page.get_by_label("Type 2").fill("3")
    await page.get_by_role("button", name="Cancel 2 runs").click()
    await expect(page.get_by_role("alert")).to_contain_text("type how many runs there are")
    await page.get_by_label("Type 2").fill("2")
    await page.get_by_role("button", name="Cancel 2 runs").click()
    await begun(page, "Cancel 2 runs ✓ done")
    await resumed(stage)
    for run_id, status in ((first, "cancelled"), (second, "completed"), (third, "cancelled")):
        await page.goto(f"runs/{run_id}")
        await expect(page.locator("h1 .status")).to_contain_text(status)


async def test_none_chosen_is_not_all(stage: Shop, sitting: Sitting) -> None:
    await queued(stage, 1)
    page = await sitting.go("runs?task=echo")
    await expect(page.locator("[data-rows] tr")).to_have_count(1)
    sitting.expect("422")
    await page.get_by_role("button", name="Cancel…").click()
    await expect(page.locator("main")).to_contain_text("no run is chosen")


async def test_a_queue_is_emptied_of_what_waited_then(stage: Shop, sitting: Sitting) -> None:
    await queued(stage, 3)
    page = await sitting.go("queues")
    row = page.locator("[data-rows] tr", has_text="echo")
    await expect(row.locator("[data-label=Ready]")).to_have_text("3")
    await row.get_by_role("link", name="Empty echo…").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Cancel 3 runs")
    later = await stage.tasks["echo"].trigger(4)
    await page.get_by_label("Reason, for the audit log").fill("a storm of orders")
    await page.get_by_label("Type 3").fill("3")
    await page.get_by_role("button", name="Cancel 3 runs").click()
    await begun(page, "Cancel 3 runs ✓ done")
    await resumed(stage)
    assert await later.result(timeout=20) == 4
    await page.goto("runs?task=echo&status=cancelled")
    await expect(page.locator("[data-rows] tr")).to_have_count(3)


async def test_all_that_meet_filters_are_redriven(stage: Shop, sitting: Sitting) -> None:
    await stage.tasks["flaky"].trigger_many(["order-1", "order-2"])
    page = await sitting.go("runs?task=flaky&status=failed")
    await expect(page.locator("[data-rows] tr")).to_have_count(2)
    stage.broken = False
    await page.get_by_role("link", name="Redrive… all of these").click()
    await page.get_by_role("button", name="Redrive 2 runs").click()
    await begun(page, "Redrive 2 runs ✓ done")
    await page.goto("runs?task=flaky&status=completed")
    await expect(page.locator("[data-rows] tr")).to_have_count(2)
