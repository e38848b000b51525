"""A page in headless Chromium, and what is asked of it in every state: no error, no request elsewhere, no jump, axe."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect

ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SCREENSHOTS = os.environ.get("SDTPU_TEST_SCREENSHOTS")
"""The folder in which screenshots are kept, so that somebody can look at them; CI keeps it as an artifact."""
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)  # else five seconds, which a busy machine needs more than
_COUNT_SHIFTS = """
window.shifts = []
new PerformanceObserver(list => {
  const name = ({node}) => node?.id || node?.className || node?.nodeName
  for (const {hadRecentInput, value, sources} of list.getEntries())
    if (!hadRecentInput) window.shifts.push([value, ...sources.map(name)])
}).observe({type: "layout-shift", buffered: true})
"""
_NETWORK_ERROR = re.compile("Failed to load resource")
"""What Chromium itself writes for an answer of 400 or more, and for a server that is away."""


def find_chromium() -> str:
    """Return the path of Chromium; without it the test is skipped, but for CI, where it fails."""
    found = shutil.which("chromium")
    if found is None and os.environ.get("CI"):
        pytest.fail("no chromium on the PATH: CI needs Debian's package chromium")
    if found is None:
        pytest.skip("no chromium on the PATH: Debian's package chromium brings it")
    return found


class Visitor:
    """Somebody who looks at the page, in a browser profile of their own.

    Args:
        browser: Chromium.
        url: of the page.
        options: of the browser's context, such as `color_scheme` and `viewport`.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        viewport = {"width": 1200, "height": 900}
        self.context: BrowserContext = browser.new_context(**{"viewport": viewport, **options})
        self.context.add_init_script(_COUNT_SHIFTS)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.network_errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._hear)
        self._url = url
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            (self.network_errors if _NETWORK_ERROR.search(message.text) else self.errors).append(message.text)

    def make(self, prompt: str, count: int = 1, **fields: str) -> Locator:
        """Fill the form, send it, and return the newest card."""
        self.page.fill("#prompt", prompt)
        self.page.fill("#count", str(count))
        needs_more = bool(fields.keys() - {"num_inference_steps"})
        if needs_more and not self.page.locator("#more").evaluate("more => more.open"):
            self.page.click("#more summary")
        for name, value in fields.items():
            self.page.fill(f"#{name}", value)
        self.page.click("#send")
        return self.card(prompt).first

    def card(self, text: str) -> Locator:
        """Return the cards with a text."""
        return self.page.locator(".card", has_text=text)

    def wait_until_live(self) -> None:
        """Wait until the page has its stream."""
        expect(self.page.locator("#connection")).to_have_text("live", timeout=WAIT_MS)

    def check(self, *, state: str, allows_network_errors: bool = False) -> None:
        """Check what must hold in every state, and keep a screenshot of it.

        Args:
            state: names the screenshot.
            allows_network_errors: the server has refused something, or was away.
        """
        self.page.wait_for_timeout(500)  # for animations: half a picture has no contrast
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        assert not serious, json.dumps([(each["id"], [n["html"] for n in each["nodes"]]) for each in serious], indent=1)
        assert self.errors == []
        assert allows_network_errors or self.network_errors == []
        here = urlsplit(self._url).netloc
        asked = {urlsplit(each.url).netloc for each in self.requests if each.url.startswith("http")}
        assert asked == {here}
        shifts = self.page.evaluate("shifts")
        assert sum(value for value, *_ in shifts) < 0.01, shifts
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{state}.png"))

    def close(self) -> None:
        """Close the profile."""
        self.context.close()
