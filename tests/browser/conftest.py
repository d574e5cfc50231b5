"""A browser for the tests of the console. What it complains of fails the test that was at it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, async_playwright

from tests.browser.shop import Shop, shop
from tests.browser.sitting import Sitting


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def browser(anyio_backend: str) -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "these tests need chromium: make tools"
    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        await made.close()


@pytest.fixture
async def stage(anyio_backend: str) -> AsyncIterator[Shop]:
    async with shop() as made:
        yield made


@pytest.fixture
async def sitting(browser: Browser, stage: Shop) -> AsyncIterator[Sitting]:
    async with Sitting(browser, stage.url) as made:
        yield made
