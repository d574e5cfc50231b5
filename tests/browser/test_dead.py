"""The pages of dead letters and of jobs over them, from a group of errors to each run's outcome."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import Page, expect

from tests.browser.shop import Shop
from tests.browser.sitting import Sitting

pytestmark = pytest.mark.anyio


async def group(stage: Shop, sitting: Sitting, count: int) -> Page:
    """Have so many runs die of one error, and go to the page of that."""
    await stage.tasks["flaky"].trigger_many([f"order-{number}" for number in range(count)])
    page = await sitting.go("dead")
    row = page.locator("[data-rows] tr")
    await expect(row.locator("[data-label=Runs]")).to_have_text(str(count))
    await expect(row).to_have_count(1)
    await row.get_by_role("link", name="no way to the bank").click()
    runs = "1 run" if count == 1 else f"{count} runs"
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"flaky {runs} dead")
    return page


async def test_a_dead_run_is_found_by_its_error_edited_redriven_and_completes(
    stage: Shop, sitting: Sitting
) -> None:
    page = await group(stage, sitting, 2)
    stage.broken = False
    row = page.locator("[data-rows] tr", has_text="order-1")
    await row.get_by_role("link", name="Edit and redrive").click()
    await page.get_by_label("Payload, as JSON").fill('"order-1b"')
    await page.get_by_role("button", name="Redrive 1 run").click()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.goto("dead")
    await expect(page.locator("[data-label=Runs]")).to_have_text("1")


async def test_a_group_is_redriven_at_a_rate_and_its_job_is_followed(
    stage: Shop, sitting: Sitting
) -> None:
    page = await group(stage, sitting, 5)
    stage.broken = False
    await page.get_by_text("Redrive…").click()
    await page.get_by_label("Runs a second").fill("fast")
    sitting.expect("422")
    await page.get_by_role("button", name="Redrive 5 runs").click()
    await expect(page.get_by_role("alert")).to_contain_text("rate")
    await page.get_by_label("Runs a second").fill("4")
    await page.get_by_label("Reason, for the audit log").fill("the bank is back")
    await page.get_by_role("button", name="Redrive 5 runs").click()
    await expect(page).to_have_url(re.compile("/jobs/"))
    await page.evaluate("window.same = true")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Redrive 5 runs ✓ done")
    await expect(page.locator(".counts")).to_contain_text("done 5")
    await expect(page.get_by_text("4 a second at most")).to_be_visible()
    assert await page.evaluate("window.same")
    await page.locator("[data-rows] a").first.click()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.goto("dead")
    await expect(page.locator(".empty")).to_contain_text("No run is dead.")


async def test_what_is_triggered_meanwhile_is_not_touched(stage: Shop, sitting: Sitting) -> None:
    page = await group(stage, sitting, 2)
    await one_more(stage, sitting, 3)
    stage.broken = False
    await page.get_by_text("Redrive…").click()
    await page.get_by_role("button", name="Redrive 2 runs").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Redrive 2 runs ✓ done")
    await page.goto("dead")
    await expect(page.locator("[data-label=Runs]")).to_have_text("1")


async def test_another_number_than_was_shown_is_not_redriven(stage: Shop, sitting: Sitting) -> None:
    page = await group(stage, sitting, 2)
    await one_more(stage, sitting, 3)
    # As if it had been triggered before the page was made, and had died only now.
    await page.evaluate("""() => document.querySelectorAll("[name=as_of]").forEach(
        (each) => { each.value = String(Number(each.value) + 600000) })""")
    sitting.expect("409")
    await page.get_by_text("Redrive…").click()
    await page.get_by_role("button", name="Redrive 2 runs").click()
    await expect(page.get_by_role("alert")).to_contain_text("3 runs, not 2")
    await expect(page.get_by_role("button", name="Redrive 3 runs")).to_be_visible()
    await page.goto("jobs")
    await expect(page.locator(".empty")).to_be_visible()


async def one_more(stage: Shop, sitting: Sitting, total: int) -> None:
    await stage.tasks["flaky"].trigger("order-9")
    other = await sitting.open()
    await other.goto("dead")
    await expect(other.locator("[data-label=Runs]")).to_have_text(str(total))


async def test_a_group_is_discarded_for_a_reason(stage: Shop, sitting: Sitting) -> None:
    page = await group(stage, sitting, 3)
    await page.get_by_text("Discard…").click()
    button = page.get_by_role("button", name="Discard 3 runs")
    sitting.expect("422")
    await page.get_by_label("Reason", exact=True).fill(" ")
    await button.click()
    await expect(page.get_by_role("alert")).to_contain_text("say why")
    await page.get_by_label("Reason", exact=True).fill("of a test order")
    await button.click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Discard 3 runs ✓ done")
    await page.goto("dead")
    await expect(page.locator(".empty")).to_contain_text("No run is dead.")
    await page.goto("jobs")
    await expect(page.locator("[data-rows] tr")).to_contain_text("of a test order")


async def test_a_job_is_aborted_and_leaves_the_rest(stage: Shop, sitting: Sitting) -> None:
    page = await group(stage, sitting, 9)
    stage.broken = False
    await page.get_by_text("Redrive…").click()
    await page.get_by_label("Runs a second").fill("0.5")
    await page.get_by_role("button", name="Redrive 9 runs").click()
    await page.get_by_text("Abort…").click()
    await page.get_by_role("button", name="Abort this job of 9 runs").click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("aborted")
    await expect(page.get_by_text("Abort…")).to_have_count(0)
    await page.get_by_role("link", name="waiting").click()
    await expect(page.locator("[data-rows] tr").first).to_contain_text("waiting")


async def test_a_viewer_sees_dead_letters_and_cannot_act_on_them(
    stage: Shop, sitting: Sitting
) -> None:
    page = await group(stage, sitting, 1)
    address = page.url
    token = await stage.api.token("viewer")
    await page.goto("sign-in")
    await page.get_by_label("API token").fill(token)
    await page.get_by_role("button", name="Sign in").click()
    await page.goto(address)
    await expect(page.get_by_role("heading", level=1)).to_have_text("flaky 1 run dead")
    await expect(page.locator(".actions")).to_have_count(0)
    await expect(page.get_by_role("link", name="Edit and redrive")).to_have_count(0)
    sitting.expect("403")
    csrf = await page.locator('form [name="csrf"]').first.get_attribute("value")
    status = await page.evaluate(
        """async ([path, csrf]) => (await fetch(path, {method: "POST", redirect: "manual",
            body: new URLSearchParams({csrf, expected: "1", reason: "x"})})).status""",
        [f"{address}/discard", csrf],
    )
    assert status == 403
