"""Every page: what it says, that it is accessible, and that it is readable on a phone."""

from __future__ import annotations

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import expect

from tests.browser.shop import Shop
from tests.browser.sitting import Sitting

pytestmark = pytest.mark.anyio
RUN_PAGES = (
    *("", "/steps", "/steps/results", "/payload", "/logs", "/related", "/raw"),
    "/edit/redrive",
)
PAGES = ("", "runs", "runs?status=waiting", "tasks", "tasks/order", "nothing", "sign-in")


async def test_every_page_is_accessible_and_fits_a_phone(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["flaky"].trigger("order-991")
    page = await sitting.go("runs")
    await expect(page.locator(f'[data-row="{run.run_id}"] .status')).to_contain_text("failed")
    sitting.expect("404")
    for path in (*PAGES, *(f"runs/{run.run_id}{each}" for each in RUN_PAGES)):
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.goto(path)
            found = await Axe().run(page)
            assert found.violations_count == 0, f"{path} {scheme}: {found.generate_report()}"
        await page.set_viewport_size({"width": 390, "height": 800})
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"{path} is {wide} wide"
        await page.set_viewport_size({"width": 1280, "height": 800})


async def test_the_overview_counts_and_leads_to_what_it_counts(
    stage: Shop, sitting: Sitting
) -> None:
    page = await sitting.go("")
    dead = page.locator(".tiles a", has_text="dead")
    await expect(dead).to_contain_text("0")
    run = await stage.tasks["flaky"].trigger("order-7")
    await expect(dead).to_contain_text("1")
    await dead.click()
    await expect(page.locator(f'[data-row="{run.run_id}"]')).to_be_visible()


async def test_a_task_is_triggered_by_a_form_of_its_schema(stage: Shop, sitting: Sitting) -> None:
    page = await sitting.go("tasks")
    await page.get_by_role("link", name="order", exact=True).click()
    await page.get_by_text("Trigger…").click()
    await page.get_by_label("customer").fill("Ada")
    await page.get_by_label("number").fill("nine")
    sitting.expect("422")
    await page.get_by_role("button", name="Trigger 1 run").click()
    await expect(page.get_by_role("alert")).to_contain_text("number")
    await expect(page.get_by_label("customer")).to_have_value("Ada")
    await page.get_by_label("number").fill("9007199254740993")
    await page.get_by_label("express").select_option("true")
    await page.get_by_role("button", name="Trigger 1 run").click()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.get_by_role("link", name="Payload and result").click()
    await expect(page.get_by_label("Result as JSON")).to_contain_text("9007199254740993")


async def test_a_task_is_paused_and_resumed_on_its_page(stage: Shop, sitting: Sitting) -> None:
    page = await sitting.go("tasks/echo")
    await page.get_by_text("Pause…").click()
    await page.get_by_role("button", name="Pause").click()
    await expect(page.get_by_role("status")).to_contain_text("begin no run")
    resume = page.get_by_role("button", name="Resume")
    await expect(resume).to_be_visible()
    run = await stage.tasks["echo"].trigger(1)
    await resume.click()
    assert await run.result(timeout=20) == 1
    await expect(page.get_by_text("Pause…")).to_be_visible()
