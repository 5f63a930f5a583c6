"""MLflow's UI as a person sees it: pages of a headless Chromium, from Debian's package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # where it is not installed, tests are skipped
    from playwright.sync_api import Page, Request

CHROMIUM = shutil.which("chromium")
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
_PATIENCE_MILLISECONDS = 60_000
# To a fresh profile it shows a panel and a modal over the page; that they were seen is remembered here.
_SEEN = """
if (window === window.top && location.protocol.startsWith('http')) {
  localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
  localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
  localStorage.setItem('_mlflow_model_registry_promo_modal_dismissed_v1', 'true');
}
"""
# Artifacts, not icons.
_PICTURES = "[...document.images].filter(i => /^blob:|get-artifact/.test(i.src) && i.complete && i.naturalWidth > 0)"


class Ui:
    """One page.

    Args:
        page: of the browser.
        base: URL of the server.
        shots: folder for screenshots.
    """

    def __init__(self, page: Page, base: str, shots: Path) -> None:
        self.page, self._base, self._shots = page, base, shots
        self.problems: list[str] = []
        """Errors of the page's scripts, and requests that left the server."""
        page.set_default_timeout(_PATIENCE_MILLISECONDS)
        page.add_init_script(_SEEN)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._look_at)

    def open(self, route: str, text: str) -> None:
        """Go to a route of the UI, until a text can be seen there."""
        self.page.goto("about:blank")  # a change of what follows # alone does not load the page
        self.page.goto(f"{self._base}/#{route}", wait_until="domcontentloaded")  # it polls: it is never idle
        self.page.get_by_text(text).first.wait_for(state="visible")

    def shoot(self, name: str) -> None:
        self.page.wait_for_timeout(500)  # of what fades in
        self.page.screenshot(path=str(self._shots / f"{name}.png"))

    def picture_widths(self) -> list[int]:
        """Widths in pixels of the pictures that have loaded, one at least."""
        self.page.wait_for_function(f"() => {_PICTURES}.length > 0")
        return list(self.page.evaluate(f"() => {_PICTURES}.map(i => i.naturalWidth)"))

    def _look_at(self, request: Request) -> None:
        if request.url.startswith("http") and not request.url.startswith(self._base):
            self.problems.append(f"left the machine: {request.url}")


@contextmanager
def opened(base: str, shots: Path) -> Iterator[Ui]:
    """A browser, while the block runs."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield Ui(browser.new_page(viewport={"width": 1400, "height": 1000}), base, shots)
        finally:
            browser.close()
