"""Waits are decided, schedules and workers commanded, and all of it is in the audit log."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import expect

from brokertask import App, Context, Rejected, Schedule, Settings
from tests.browser.shop import Shop, shop
from tests.browser.sitting import Sitting
from tests.browser.test_queues import look

pytestmark = pytest.mark.anyio
LIMIT = 20
PATHS = ("waits", "waits?state=all", "schedules", "schedules/report", "workers", "settings")


@pytest.fixture
async def stage(anyio_backend: str) -> AsyncIterator[Shop]:
    app = App("shop", settings=Settings(amqp_url="memory:"))

    @app.task
    async def refund(order: str, ctx: Context) -> Any:
        decision = await ctx.wait_for(ctx.token("approval <b>", dict[str, Any], timeout="7d"))
        return f"rejected: {decision.reason}" if isinstance(decision, Rejected) else decision

    @app.task(schedule=Schedule(cron="0 3 * * *", payload="inbox"))
    async def report(folder: str) -> str:
        return folder

    async with shop(app) as made:
        made.tasks |= {"refund": refund, "report": report}
        yield made


async def test_a_wait_is_extended_and_approved_and_its_run_goes_on(
    stage: Shop, sitting: Sitting
) -> None:
    page = await sitting.go("waits")
    run = await stage.tasks["refund"].trigger("order-1")
    row = page.locator("[data-rows] tr", has_text=run.run_id)
    await expect(row).to_contain_text("approval <b>")
    before = await row.locator("[data-label=Expires] time").get_attribute("datetime")
    await row.get_by_text("Extend…").click()
    await row.get_by_label("Time from now").fill("30d")
    await row.get_by_role("button", name="Extend").click()
    await expect(page.get_by_role("status")).to_contain_text("new time")
    after = await row.locator("[data-label=Expires] time").get_attribute("datetime")
    assert before is not None
    assert after is not None
    assert after > before
    await row.get_by_text("Approve…").click()
    await row.get_by_label("Value, as JSON").fill('{"by": "Ada", "sum": 9007199254740993}')
    await row.get_by_role("button", name="Approve").click()
    await expect(page.get_by_role("status")).to_contain_text("goes on")
    await expect(row).to_have_count(0)
    assert await run.result(timeout=LIMIT) == {"by": "Ada", "sum": 9007199254740993}


async def test_a_wait_is_rejected_for_a_reason(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["refund"].trigger("order-2")
    page = await sitting.go("waits")
    row = page.locator("[data-rows] tr", has_text=run.run_id)
    await row.get_by_text("Reject…").click()
    await row.get_by_label("Reason").fill("too dear")
    await row.get_by_role("button", name="Reject").click()
    await expect(page.get_by_role("status")).to_contain_text("rejected")
    assert await run.result(timeout=LIMIT) == "rejected: too dear"
    await page.get_by_role("link", name="all", exact=True).click()
    await expect(row.locator("[data-label=Decided]")).to_contain_text("by local: too dear")


async def test_a_schedule_is_paused_resumed_and_run(stage: Shop, sitting: Sitting) -> None:
    page = await sitting.go("schedules")
    await page.get_by_role("link", name="report").first.click()
    await expect(page.locator(".times li").first).to_contain_text("03:00:00")
    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator(".facts")).to_contain_text("paused")
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator(".facts")).to_contain_text("active")
    assert await page.get_by_text("Delete…").count() == 0, "it is in the code of a worker"
    await page.get_by_role("button", name="Run now").click()
    await expect(page).to_have_url(re.compile("runs/"))
    await page.goto("runs?task=report")
    await expect(page.locator("[data-rows] .status")).to_contain_text("completed")


async def test_a_worker_is_drained_and_the_audit_log_says_so(stage: Shop, sitting: Sitting) -> None:
    page = await sitting.go("workers")
    row = page.locator("[data-rows] tr")
    await expect(row.locator("[data-label=State]")).to_have_text("working")
    await row.get_by_text("Drain…").click()
    await row.get_by_label("Reason").fill("the host <i> is old")
    await row.get_by_role("button", name="Drain").click()
    await expect(page.get_by_role("status")).to_contain_text("no more work")
    await expect(row.locator("[data-label=State]")).to_have_text("draining")
    await page.get_by_role("link", name="Audit").click()
    first = page.locator("[data-rows] tr").first
    await expect(first).to_contain_text("drain worker")
    await expect(first).to_contain_text("the host <i> is old")
    await expect(first.locator("[data-label=Result]")).to_have_text("202")
    await page.get_by_role("textbox", name="Action").fill("sign_out")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.get_by_text("Nothing meets these filters.")).to_be_visible()
    await page.get_by_role("textbox", name="Action").fill("drain_worker")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("[data-rows] tr")).to_have_count(1)


async def test_a_viewer_sees_no_button_and_no_audit_log(stage: Shop, sitting: Sitting) -> None:
    await stage.tasks["refund"].trigger("order-3")
    await expect((await sitting.go("waits")).get_by_text("Approve…")).to_have_count(1)
    token = await stage.api.token("viewer")
    page = await sitting.go("sign-in")
    await page.get_by_label("API token").fill(token)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("link", name="Audit")).to_have_count(0)
    for path in PATHS:
        await page.goto(path)
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
        await expect(page.locator("main button, main summary")).to_have_count(0)
    sitting.expect("403")
    answer = await page.goto("audit")
    assert answer is not None
    assert answer.status == 403


async def test_these_pages_are_accessible_and_fit_a_phone(stage: Shop, sitting: Sitting) -> None:
    run = await stage.tasks["refund"].trigger("order-4")
    page = await sitting.go("waits")
    await expect(page.locator("[data-rows] tr", has_text=run.run_id)).to_have_count(1)
    await look(page, *PATHS, "audit")
