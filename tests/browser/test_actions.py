"""What is done to runs in the console, by whom it may be done."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from tests.browser.shop import Shop
from tests.browser.sitting import Sitting

pytestmark = pytest.mark.anyio


async def test_a_dead_run_is_edited_redriven_and_completes(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["flaky"].trigger("order-991")
    page = await sitting.go(f"runs?error={'order-991'}")
    await expect(page.locator(f'[data-row="{run.run_id}"] .status')).to_contain_text("failed")
    await page.get_by_role("link", name=run.run_id).click()
    await page.get_by_text("Redrive…").click()
    await page.get_by_role("link", name="Edit and redrive").click()
    text = page.get_by_label("Payload, as JSON")
    await expect(text).to_have_value('"order-991"')
    sitting.expect("422")
    await text.fill("{")
    await page.get_by_role("button", name="Redrive 1 run").click()
    await expect(page.get_by_role("alert")).to_contain_text("no JSON")
    stage.broken = False
    await page.get_by_label("Payload, as JSON").fill('"order-992"')
    await page.get_by_label("Reason").fill("the bank is back")
    await page.get_by_role("button", name="Redrive 1 run").click()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.get_by_role("link", name="Payload and result").click()
    await expect(page.get_by_label("Result as JSON")).to_have_text('"paid order-992"')


async def test_a_running_run_is_cancelled(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["hold"].trigger("order-1")
    page = await sitting.go("runs")
    await page.get_by_role("link", name=run.run_id).click()
    await expect(page.locator("h1 .status")).to_contain_text("running")
    await page.get_by_text("Cancel…").click()
    await page.get_by_role("textbox", name="Reason").fill("not wanted any more")
    await page.get_by_role("button", name="Cancel 1 run").click()
    await expect(page.get_by_role("status")).to_contain_text("told to cancel")
    await expect(page.locator("h1 .status")).to_contain_text("cancelled")


async def test_a_run_is_replayed_as_a_new_one(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["echo"].trigger({"number": 2**63 - 1})
    page = await sitting.go("runs")
    await page.get_by_role("link", name=run.run_id).click()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.get_by_text("Replay…").click()
    await page.get_by_role("button", name="Trigger 1 run").click()
    await expect(page).not_to_have_url(re.compile(run.run_id))
    await expect(page.get_by_text(f"replay:{run.run_id}")).to_be_visible()
    await expect(page.locator("h1 .status")).to_contain_text("completed")
    await page.get_by_role("link", name="Payload and result").click()
    await expect(page.get_by_label("Result as JSON")).to_contain_text("9223372036854775807")


async def test_a_viewer_signs_in_sees_no_action_and_no_payload(
    stage: Shop, sitting: Sitting
) -> None:
    run = await stage.tasks["echo"].trigger("a secret of somebody")
    assert await run.result(timeout=20)
    token = await stage.api.token("viewer")
    page = await sitting.go(f"runs/{run.run_id}?x")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    sitting.expect("401")
    await page.get_by_label("API token").fill("bt_wrong")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert")).to_contain_text("no token")
    await page.get_by_label("API token").fill(token)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("echo")
    await expect(page.locator(".actions")).to_have_count(0)
    await expect(page.get_by_role("link", name="Payload and result")).to_have_count(0)
    sitting.expect("403")
    await page.goto(f"runs/{run.run_id}/payload")
    await expect(page.get_by_role("heading", level=1)).to_contain_text("may not do that")
    assert "secret of somebody" not in await page.content()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
