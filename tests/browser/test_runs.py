"""The pages of runs, as somebody sees them: filters, what is new, what a run is at."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from tests.browser.shop import Shop
from tests.browser.sitting import Sitting

pytestmark = pytest.mark.anyio


async def test_a_failing_run_is_found_by_its_error(stage: Shop, sitting: Sitting) -> None:
    for number in range(3):
        await stage.tasks["echo"].trigger(number)
    failed = await stage.tasks["flaky"].trigger("order-991")
    page = await sitting.go("runs?status=failed")
    await expect(page.locator(f'[data-row="{failed.run_id}"]')).to_be_visible()
    await page.goto("runs")
    await expect(page.locator("[data-rows] tr")).to_have_count(4)
    await page.get_by_label("Error").fill("bank for order-991")
    await page.get_by_role("button", name="Filter").click()
    await expect(page).to_have_url(re.compile(r"\?.*error=bank"))
    await expect(page.locator("[data-rows] tr")).to_have_count(1)
    await expect(page.locator(".counts")).to_contain_text("failed 1")
    await page.get_by_role("link", name=failed.run_id).click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("flaky")
    await expect(page.locator(".alert")).to_contain_text("no way to the bank for order-991")
    await expect(page.locator(".attempt")).to_have_count(1)


async def test_a_run_is_followed_without_loading_its_page_again(
    stage: Shop, sitting: Sitting
) -> None:
    run = await stage.tasks["hold"].trigger("order-1")
    page = await sitting.go("runs")
    await page.get_by_role("link", name=run.run_id).click()
    await page.evaluate("window.same = true")
    await expect(page.locator("h1 .status")).to_contain_text("running")
    stage.open.set()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    assert await page.evaluate("window.same")


async def test_new_runs_are_a_number_and_move_no_row(stage: Shop, sitting: Sitting) -> None:
    first = await stage.tasks["echo"].trigger(1)
    page = await sitting.go("runs")
    await expect(page.locator(f'[data-row="{first.run_id}"] .status')).to_contain_text("completed")
    await stage.tasks["echo"].trigger(2)
    await expect(page.locator(".fresh")).to_contain_text("1 new")
    await expect(page.locator("[data-rows] tr")).to_have_count(1)
    await page.locator(".fresh a").click()
    await expect(page.locator("[data-rows] tr")).to_have_count(2)
