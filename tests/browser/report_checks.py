"""What must hold for every exported report, checked in a headless Chromium without network."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_PICTURES = """() => [...document.querySelectorAll('.jp-RenderedImage img')].map(
    (img) => [img.naturalWidth, img.naturalHeight, img.getBoundingClientRect().height])"""
_PLOTS = """() => [...document.querySelectorAll('.js-plotly-plot')].map(
    (plot) => [plot.querySelectorAll('svg.main-svg').length, plot.getBoundingClientRect().height])"""
_FORMULAS = "() => [...document.querySelectorAll('math')].map((math) => math.getBoundingClientRect().width)"


def check_report(
    browser,
    html_path: Path,
    *,
    images: int,
    plotly: int,
    hover: int = 0,
    formulas: int = 0,
    screenshot: Path | None = None,
    patience: int = 20_000,
) -> None:
    """Open a report offline and assert that nothing of it is missing.

    Parameters
    ----------
    browser : playwright.sync_api.Browser
    html_path : Path
    images, plotly : int
        Static figures and plotly figures (those with thumbnails included) that it must show, exactly.
    hover : int
        Plotly figures in the plane whose points must show a thumbnail on hover, exactly.
    formulas : int
        Formulas that it must show, at least.
    screenshot : Path, optional
        Where to write a picture of the whole page, for people.
    patience : int
        Milliseconds to wait for a figure or a thumbnail to appear.
    """
    from playwright.sync_api import TimeoutError

    requests, errors = [], []
    with browser.new_context(offline=True, viewport={"width": 1100, "height": 900}) as context:
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(Path(html_path).absolute().as_uri(), wait_until="load")
        with suppress(TimeoutError):  # the assertions below say what is missing
            page.wait_for_function(f"({_PLOTS})().filter(([count]) => count).length >= {plotly}", timeout=patience)
        if screenshot is not None:
            page.screenshot(path=screenshot, full_page=True)

        pictures = page.evaluate(_PICTURES)
        assert len(pictures) == images, f"{len(pictures)} static figures, expected {images}"
        assert all(min(sizes) > 10 for sizes in pictures), f"an empty static figure: {pictures}"

        plots = page.evaluate(_PLOTS)
        assert len(plots) == plotly, f"{len(plots)} live plotly figures, expected {plotly}"
        assert all(count >= 1 and height > 100 for count, height in plots), f"an empty plotly figure: {plots}"

        drawn = page.evaluate(_FORMULAS)
        assert len(drawn) >= formulas, f"{len(drawn)} formulas, expected {formulas}"
        assert all(width > 0 for width in drawn), f"an empty formula: {drawn}"
        unconverted = page.locator("code.latex").all_inner_texts()
        assert not unconverted, f"formulas that stayed LaTeX: {unconverted}"
        text = page.inner_text("main")
        assert "$$" not in text and "\\begin{" not in text, "a formula is still LaTeX"

        plots_with_tips = page.locator(".js-plotly-plot:has(.hover-thumbnail):has(.scatterlayer)")
        assert plots_with_tips.count() == hover, f"{plots_with_tips.count()} figures with thumbnails, expected {hover}"
        for i in range(hover):
            plot = plots_with_tips.nth(i)
            assert not plot.locator(".hover-thumbnail").is_visible(), "a thumbnail shows before anything is hovered"
            plot.scroll_into_view_if_needed()
            point = plot.locator(".scatterlayer .points path").first.bounding_box()
            page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2, steps=3)
            plot.locator(".hover-thumbnail img").wait_for(state="visible", timeout=patience)
            width = plot.locator(".hover-thumbnail img").evaluate(
                "async (img) => { await img.decode(); return img.naturalWidth; }"
            )
            assert width > 1, "the thumbnail on hover is empty"
            page.mouse.move(5, 5)
            plot.locator(".hover-thumbnail").wait_for(state="hidden", timeout=patience)

    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert not outside, f"the report asks the network for {outside}"
    assert not errors, f"the page logs errors: {errors}"
