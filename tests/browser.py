"""Pages in headless Chromium, the system's own: for the tests of the pages and for `make screenshots`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = 1200, 390
"""Widths of the window in pixels."""


def executable() -> str | None:
    """Return the path of the system's Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield the system's Chromium, without a window. There must be one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page of a file, and all that goes wrong with it.

    Parameters
    ----------
    browser: from `chromium`.
    path: the HTML file.
    width: of the window, pixels.
    options: of `Browser.new_context`.
    """

    def __init__(self, browser: Browser, path: Path, width: int = DESKTOP, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("console", self._say)
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.absolute().as_uri())

    def _say(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(message.text)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *exc: object) -> None:
        self.context.close()

    def elsewhere(self) -> list[str]:
        """Return what was asked of the network, which is everything but files and inlined data."""
        return [url for url in self.requests if not url.startswith(("file:", "data:"))]

    def broken_pictures(self) -> list[str]:
        """Return the pictures that did not load."""
        found: list[str] = self.page.evaluate(
            """() => [...document.images].filter(i => !(i.complete && i.naturalWidth > 0))
                .map(i => i.alt + ' ' + i.src.slice(0, 60))"""
        )
        return found

    def overhang(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        wide: int = self.page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wide
