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
    explorers: int = 0,
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
        Static figures and plotly figures that it must show, exactly.
    explorers : int
        Explorers whose maps must be drawn and whose points must show a thumbnail on hover, exactly.
    formulas : int
        Formulas that it must show, at least.
    screenshot : Path, optional
        Where to write a picture of the whole page, for people.
    patience : int
        Milliseconds to wait for a figure or a thumbnail to appear.
    """
    from playwright.sync_api import TimeoutError

    assert Path(html_path).stat().st_size <= 20e6, f"{html_path} is larger than 20 MB"
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

        found = page.locator(".hspace-explorer")
        assert found.count() == explorers, f"{found.count()} explorers, expected {explorers}"
        for i in range(explorers):
            hover_over(page, found.nth(i), patience)

    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert not outside, f"the report asks the network for {outside}"
    assert not errors, f"the page logs errors: {errors}"


def hover_over(page, explorer, patience: int) -> None:
    """Point at a sample of an explorer: its thumbnail shows, and goes with the mouse."""
    page.wait_for_function("(el) => el.explorer?.painted", arg=explorer.element_handle(), timeout=patience)
    canvas, tip = explorer.locator(".hx-frame canvas").first, explorer.locator(".hx-tip")
    canvas.scroll_into_view_if_needed()
    assert not tip.is_visible(), "a thumbnail shows before anything is hovered"
    page.mouse.move(*point_of(explorer, 0), steps=3)
    tip.locator("canvas").wait_for(state="visible", timeout=patience)
    page.wait_for_function(_HAS_COLOURS, arg=tip.locator("canvas").element_handle(), timeout=patience)
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden", timeout=patience)


_HAS_COLOURS = """(canvas) => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return data.some((value, k) => k % 4 < 3 && value > 0);
}"""


def point_of(explorer, i: int, which: int = 0) -> list[float]:
    """Where a sample is on the screen, on one of the maps."""
    return explorer.evaluate(
        """(el, [i, which]) => {
            const { canvas, screen } = el.explorer.maps[which], box = canvas.getBoundingClientRect();
            const scale = box.width / canvas.width;
            return [box.left + screen[2 * i] * scale, box.top + screen[2 * i + 1] * scale];
        }""",
        [i, which],
    )


def lasso(page, explorer, corners, which: int = 0) -> None:
    """Draw around these places of a map, given in its own coordinates."""
    canvas = explorer.locator(".hx-frame canvas").nth(which)
    canvas.scroll_into_view_if_needed()
    on_screen = explorer.evaluate(
        """(el, [corners, which]) => {
            const map = el.explorer.maps[which], { centre, half } = el.explorer.data.maps[which];
            const box = map.canvas.getBoundingClientRect(), scale = box.width / map.canvas.width;
            return corners.map(([x, y]) => map.place((x - centre[0]) / half, (y - centre[1]) / half))
                .map(([x, y]) => [box.left + x * scale, box.top + y * scale]);
        }""",
        [[[float(x), float(y)] for x, y in corners], which],
    )
    page.mouse.move(*on_screen[0])
    page.mouse.down()
    for corner in on_screen[1:]:
        page.mouse.move(*corner, steps=6)
    page.mouse.up()


def contrast(page, selector: str) -> float:
    """Contrast of a text with what is behind it, as WCAG 2 defines it; 4.5 is asked for small text."""
    return page.evaluate(
        """(selector) => {
            const parse = (color) => color.match(/[\\d.]+/g).map(Number);
            const luminance = ([r, g, b]) => {
                const part = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
                return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
            };
            const text = document.querySelector(selector);
            let behind = text, back = [0, 0, 0, 0];
            while (behind && (back[3] ?? 1) === 0) {
                back = parse(getComputedStyle(behind).backgroundColor);
                behind = behind.parentElement;
            }
            const [high, low] = [luminance(parse(getComputedStyle(text).color)), luminance(back)].sort((a, b) => b - a);
            return (high + 0.05) / (low + 0.05);
        }""",
        selector,
    )
