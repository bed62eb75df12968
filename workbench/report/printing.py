"""A report's page as a PDF, printed by a browser, and as slides."""

from __future__ import annotations

import contextlib
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
        raise FileNotFoundError("there is no Chromium or Chrome on the PATH to print a PDF; install one")
    return found


def print_pdf(page: str | Path, *, timeout: int = 120) -> Path:
    """Print a report's HTML beside it as NAME.pdf.

    Plotly's figures are vectors, and those of matplotlib if the page is `Report.vectors`, with outlines as letters.
    Raises RuntimeError if the browser writes nothing within so many seconds.
    """
    page, browser = paths.local(page).absolute(), find_browser()
    with TemporaryDirectory() as profile, written(_beside(page, ".pdf")) as partial:
        options = ["--headless", "--no-pdf-header-footer", f"--user-data-dir={profile}", f"--print-to-pdf={partial}"]
        # Plotly draws at the width of the window: that of a page less its margins. Plots in 3D need WebGL, here without
        # a GPU. Root may not use the sandbox.
        options += ["--window-size=718,1000", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        options += ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
        log = Path(profile) / "messages.txt"
        with log.open("w") as messages:  # no pipe, which helpers of the browser would keep open after it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([browser, *options, page.as_uri()], stdout=messages, stderr=messages, timeout=timeout)
        if not partial.exists():
            said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"{browser} could not print {page}: {said[0]}; print it in a browser by hand")
    return _beside(page, ".pdf")


def write_slides(page: str | Path) -> Path:
    """Write a report's HTML beside it as slides, NAME.slides.html: one for each section, in one file, offline."""
    page = paths.local(page)
    text = page.read_text(encoding="utf-8")
    head, _, tail = text.rpartition("</body>")
    return write_text(_beside(page, ".slides.html"), f"{head}{_SLIDES.read_text(encoding='utf-8')}</body>{tail}")


def _beside(page: Path, suffix: str) -> Path:
    """NAME of NAME.html or NAME.vectors.html, with another suffix."""
    return page.with_name(page.name.removesuffix(".html").removesuffix(".vectors") + suffix)
