"""Somebody at a browser, and what the browser complains of."""

from __future__ import annotations

from types import TracebackType

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect

LIMIT_MS = 20_000
expect.set_options(timeout=LIMIT_MS)
VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => {
  console.error(`CSP: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""


class Sitting:
    """A browser with cookies of its own; at its end nothing may have been complained of."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        self._url = url
        self._complaints: list[str] = []
        self._expected: list[str] = []
        self.page: Page
        self._context: BrowserContext

    async def __aenter__(self) -> Sitting:
        self._context = await self._browser.new_context(
            base_url=self._url, viewport={"width": 1280, "height": 800}, color_scheme="light"
        )
        self._context.set_default_timeout(LIMIT_MS)
        await self._context.add_init_script(VIOLATIONS)
        self.page = await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._context.close()
        if error is None:
            assert self.complaints() == []

    async def open(self) -> Page:
        """Open another tab."""
        page = await self._context.new_page()
        page.on("console", self._said)
        page.on("pageerror", self._failed)
        return page

    async def go(self, path: str) -> Page:
        """Go to a page of the console; return it."""
        await self.page.goto(path)
        return self.page

    def expect(self, part: str) -> None:
        """Pass over complaints with this in them: the test is about what they tell of."""
        self._expected.append(part)

    def complaints(self) -> list[str]:
        return [
            each for each in self._complaints if not any(part in each for part in self._expected)
        ]

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._complaints.append(f"{message.type}: {message.text}")

    def _failed(self, error: Error) -> None:
        self._complaints.append(f"uncaught: {error.message}")
