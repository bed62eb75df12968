"""A report's page as a PDF, printed by a browser, and as slides."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench import paths
from workbench.io import write_text, written

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Programs that print a page without showing it, all by the same options."""

_SLIDES = Path(__file__).with_name("slides.html.j2")


def find_browser() -> str:
    """The browser that prints.

    Raises
    ------
    FileNotFoundError
        If none of `BROWSERS` is on the PATH.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(
            "there is no Chromium or Chrome on the PATH to print a PDF; install one, or print the HTML in any browser"
        )
    return found


def print_pdf(page: str | Path, *, timeout: int = 300) -> Path:
    """Print a report's HTML beside it as PDF; plotly's figures stay vectors, pictures of matplotlib stay pictures.

    Raises RuntimeError if the browser writes nothing.
    """
    page, browser = paths.local(page).absolute(), find_browser()
    with TemporaryDirectory() as profile, written(page.with_suffix(".pdf")) as partial:
        options = ["--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        # Plotly draws at the width of the window: that of a page less its margins. Root may not use the sandbox.
        options += ["--window-size=718,1000", "--virtual-time-budget=20000", f"--print-to-pdf={partial}"]
        options += ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
        done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=timeout)
        if not partial.exists():
            said = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"{browser} could not print {page}: {said[0]}; print it in a browser by hand")
    return page.with_suffix(".pdf")


def write_slides(page: str | Path) -> Path:
    """Write a report's HTML beside it as slides, NAME.slides.html: one for each section, in one file, offline."""
    page = paths.local(page)
    text = page.read_text(encoding="utf-8")
    head, _, tail = text.rpartition("</body>")
    return write_text(page.with_suffix(".slides.html"), f"{head}{_SLIDES.read_text(encoding='utf-8')}</body>{tail}")
