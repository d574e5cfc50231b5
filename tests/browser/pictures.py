"""Takes the pictures of the console in the documentation: `python -m tests.browser.pictures`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from playwright.async_api import BrowserContext, Locator, Page, async_playwright, expect

from brokertask import App, Context, Schedule, Settings
from brokertask.server.console.app import SECTIONS
from brokertask.statuses import STATUSES
from tests.browser.shop import Shop, shop

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs/images/console"
SIZE: Final = {"width": 1040, "height": 600}
PATIENCE_MS: Final = 30_000


def office() -> App:
    """Return an app with a task that waits for somebody, and one that has a schedule."""
    app = App("shop", settings=Settings(amqp_url="memory:"))

    @app.task
    async def refund(order: str, ctx: Context) -> str:
        return str(await ctx.wait_for(ctx.token("approval", str, timeout="7d")))

    @app.task(schedule=Schedule(cron="0 3 * * *", tz="Europe/Berlin"))
    async def report() -> None:
        pass

    return app


async def prepare(stage: Shop) -> dict[str, str]:
    """Have something to see; return the paths of the pages by the names of their pictures."""
    for number in range(6):
        await stage.tasks["order"].trigger({"customer": "Ada", "number": number})
        await stage.tasks["flaky"].trigger(f"order-{990 + number}")
    await stage.api.app.tasks["refund"].trigger("order-990")
    going = await stage.tasks["hold"].trigger("order-7")
    failed = await stage.tasks["flaky"].trigger("order-991")
    pages = {each.title.lower().replace(" ", "-"): each.path for each in SECTIONS if each.title}
    return {
        **pages,
        "task": "tasks/order",
        "new-job": "jobs/new/redrive?task=flaky",
        "run": f"runs/{failed.run_id}",
        "timeline": f"runs/{going.run_id}",
        "payload": f"runs/{failed.run_id}/payload",
        "log": f"runs/{going.run_id}/logs",
    }


def signs(page: Page, paths: dict[str, str]) -> Iterator[tuple[str, Locator]]:
    """Yield what says that everything was recorded, and the path of the page that says it."""
    yield "runs?status=failed", page.locator("[data-rows] tr").nth(6)
    yield "runs?status=completed", page.locator("[data-rows] tr").nth(5)
    yield "waits", page.locator("form").first
    yield paths["timeline"], page.locator(f".status-{STATUSES['running'].name}").first


async def take(context: BrowserContext, scheme: str, paths: dict[str, str]) -> None:
    page = await context.new_page()
    for path, sign in signs(page, paths):
        await page.goto(path)
        await expect(sign).to_be_visible(timeout=PATIENCE_MS)
    for name, path in paths.items():
        await page.goto(path)
        if "timeline" in await page.content():
            await expect(page.locator(".timeline-row").first).to_be_visible(timeout=PATIENCE_MS)
        # A traceback tells of the machine that the pictures are taken on.
        await page.evaluate(
            "for (const one of document.querySelectorAll('details')) one.open = false"
        )
        await page.screenshot(path=FOLDER / f"{name}-{scheme}.png")


async def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with shop(office()) as stage, async_playwright() as playwright:
        program = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        paths = await prepare(stage)
        for scheme in ("light", "dark"):
            context = await browser.new_context(
                base_url=stage.url,
                viewport={"width": SIZE["width"], "height": SIZE["height"]},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            await take(context, scheme, paths)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
