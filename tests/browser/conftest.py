"""What the tests in a browser share."""

from __future__ import annotations

import pytest
from report_checks import CHROMIUM


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium for all tests of a file: to start it takes longer than to look at a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()
