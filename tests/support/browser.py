"""Headless Chromium, driven by Playwright; the browser is that of the operating system."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find_browser() -> str | None:
    """Path of an installed Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium, and ends it afterwards."""
    from playwright.sync_api import sync_playwright

    path = find_browser()
    assert path is not None, f"no browser is installed; looked for {', '.join(NAMES)}"
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers lack; it opens pages of this repository alone.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield started
        finally:
            started.close()
