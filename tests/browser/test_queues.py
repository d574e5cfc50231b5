"""The page of queues, and the pages beside it: accessible, and readable on a phone."""

from __future__ import annotations

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from brokertask.server.console.html import NOTHING
from tests.browser.shop import Shop
from tests.browser.sitting import Sitting

pytestmark = pytest.mark.anyio
HOSTILE = '<img src=x onerror="document.title=1"> \u202eevil'


async def test_a_task_is_paused_fills_its_queue_and_is_resumed(
    stage: Shop, sitting: Sitting
) -> None:
    page = await sitting.go("queues")
    row = page.locator("[data-rows] tr", has_text="echo")
    await expect(row.locator('[data-label="Limited by"]')).to_have_text(NOTHING)
    await row.get_by_text("Pause…").click()
    await row.get_by_label("Reason").fill("the bank is away")
    await row.get_by_role("button", name="Pause echo").click()
    await expect(page.get_by_role("status")).to_contain_text("told to begin no run")
    await expect(row.locator('[data-label="Limited by"]')).to_have_text("paused")
    await expect(row.locator("[data-label=Consumers]")).to_have_text("0")
    other = await sitting.open()
    await other.goto("tasks/echo")
    await expect(other.get_by_role("button", name="Resume")).to_be_visible()
    run = await stage.tasks["echo"].trigger(1)
    await expect(row.locator("[data-label=Ready]")).to_have_text("1")
    await expect(row.locator("[data-label=Oldest]")).not_to_have_text(NOTHING)
    await row.get_by_role("button", name="Resume echo").click()
    assert await run.result(timeout=20) == 1
    await expect(row.locator('[data-label="Limited by"]')).to_have_text(NOTHING)
    await expect(row.locator("[data-label=Ready]")).to_have_text("0")


async def test_a_form_that_is_open_stays_while_queues_change(stage: Shop, sitting: Sitting) -> None:
    page = await sitting.go("queues")
    row = page.locator("[data-rows] tr", has_text="hold")
    await row.get_by_text("Pause…").click()
    await stage.tasks["flaky"].trigger("order-1")
    other = await sitting.open()
    await other.goto("queues")
    dead = other.locator("[data-rows] tr", has_text="flaky").locator("[data-label=Dead]")
    await expect(dead).to_have_text("1")
    async with page.expect_response(lambda answer: answer.url.endswith("/queues")):
        await stage.tasks["flaky"].trigger("order-2")
    await expect(dead).to_have_text("2")
    await expect(row.get_by_role("button", name="Pause hold")).to_be_visible()


async def test_these_pages_are_accessible_and_fit_a_phone(stage: Shop, sitting: Sitting) -> None:
    await stage.tasks["flaky"].trigger(HOSTILE)
    page = await sitting.go("dead")
    link = page.locator("[data-rows] a.error")
    await expect(link).to_contain_text('<img src=x onerror="document.title=1"> \\u202eevil')
    group = await link.get_attribute("href")
    assert group is not None
    await look(page, "dead", "queues", "jobs", "dead?task=echo", group, "dead/echo/-")
    await page.goto(group)
    await page.get_by_text("Discard…").click()
    await page.get_by_label("Reason", exact=True).fill(HOSTILE.replace("\u202e", ""))
    await page.get_by_role("button", name="Discard 1 run").click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("done")
    await expect(page.get_by_text("<img src=x")).to_be_visible()
    await look(page, page.url, "jobs", "dead")


async def look(page: Page, *paths: str) -> None:
    for path in paths:
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            await page.goto(path)
            for summary in await page.locator("main summary").all():
                await summary.click()
            found = await Axe().run(page)
            assert found.violations_count == 0, f"{path} {scheme}: {found.generate_report()}"
        await page.set_viewport_size({"width": 390, "height": 800})
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"{path} is {wide} wide"
        await page.set_viewport_size({"width": 1280, "height": 800})
