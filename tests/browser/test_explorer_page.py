"""The explorer as a page without a kernel and without a network: linked, by mouse and by keyboard, in both themes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from report_checks import CHROMIUM, contrast, hover_over, lasso, point_of

from workbench import paths
from workbench.analysis.maps import Map
from workbench.editing.render import EditGrid
from workbench.studio.explorer import Explorer
from workbench.studio.payload import strips_of

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")]

N = 60
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(N, 2))
PATIENCE = 20_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    images = RNG.uniform(-1, 1, (N, 3, 16, 16)).astype(np.float32)
    turned = POINTS @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    moving = np.stack([POINTS * scale for scale in (0.2, 0.6, 1.0)])
    maps = [Map("straight", POINTS, ("x", "y"), (500,)), Map("turned", turned, ("-y", "x"), (100,))]
    maps.append(Map("moving", moving, ("x", "y"), (900, 500, 0), "One plane."))
    colours = {"x": POINTS[:, 0], "right": POINTS[:, 0] > 0, "some": np.where(np.arange(N) < 5, np.nan, POINTS[:, 1])}
    near = np.argsort(np.linalg.norm(POINTS[:, None] - POINTS[None], axis=-1), axis=1)[:, 1:5]
    made = Explorer(
        maps, names=range(N), colours=colours, images=lambda rows: images[rows], neighbours=(near, "by x, y")
    )
    grid = torch.from_numpy(RNG.uniform(-1, 1, (4, 5, 3, 16, 16)).astype(np.float32))
    labels = tuple(f"{name}\nseed {s}" for name in ("Smiling", "random") for s in (90, 91))
    made.strips = strips_of(EditGrid(grid, labels, ("-2 sigma", "-1 sigma", "0", "+1 sigma", "+2 sigma"), {}))
    return made.save_html(tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.fixture
def open_page(browser, address):
    """Open the page offline, at an address and in a theme; it must ask for nothing and log no error."""
    opened, wrong = [], []

    def open_(where=address, scheme="light"):
        context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and wrong.append(request.url))
        page.goto(where)
        page.wait_for_function("() => document.querySelector('.hspace-explorer')?.explorer?.painted", timeout=PATIENCE)
        return page

    yield open_
    for context in opened:
        context.close()
    assert not wrong


def explorer_of(page):
    return page.locator(".hspace-explorer")


def state(page, what: str):
    return explorer_of(page).evaluate(f"(el) => {{ const e = el.explorer; return {what}; }}")


CORNERS = [(-0.9, -0.8), (0.9, -0.9), (1.1, 0.4), (0.2, 0.9), (-0.7, 0.5)]


def test_a_lasso_selects_what_lies_in_it_on_all_maps_and_the_link_leads_back(open_page):
    page = open_page()
    lasso(page, explorer_of(page), CORNERS)
    expected = np.flatnonzero(Outline(CORNERS).contains_points(POINTS))
    assert 5 < len(expected) < N - 5
    assert state(page, "[...e.selected.a].sort((a, b) => a - b)") == expected.tolist()
    assert f"A: {len(expected)} of {N} samples" in page.locator(".hx-panel").nth(1).inner_text()
    page.get_by_label("into").select_option("b")
    lasso(page, explorer_of(page), [(-2.5, -2.4), (-1, -2.4), (-1, 2.4), (-2.5, 2.4)])
    left = np.flatnonzero((POINTS[:, 0] < -1) & (POINTS > -2.4).all(axis=1) & (POINTS[:, 1] < 2.4))
    assert state(page, "[...e.selected.b].sort((a, b) => a - b)") == left.tolist()
    # Orange and blue rings on the map that was not touched, where there were none before.
    counts = [ring_pixels(page, color) for color in ((213, 94, 0), (0, 114, 178))]
    assert min(counts) > 20
    page.locator("canvas").first.focus()
    page.keyboard.press("+")
    page.get_by_role("slider", name="Smiling").press("ArrowRight")
    page.wait_for_function("() => location.hash.includes('step%22%3A3')")
    again = open_page(page.url)
    for what in ("[...e.selected.a]", "[...e.selected.b]", "e.maps[2].camera", "e.view.step"):
        assert state(again, what) == state(page, what)
    assert state(again, "e.maps[2].camera.k") == 1.25 and again.locator("output", has_text="+1 sigma").count() == 1


def ring_pixels(page, color) -> int:
    return explorer_of(page).evaluate(
        """(el, color) => {
            const { canvas, context } = el.explorer.maps[1];
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            let count = 0;
            for (let k = 0; k < data.length; k += 4) count += color.every((v, c) => Math.abs(data[k + c] - v) < 3);
            return count;
        }""",
        list(color),
    )


def test_what_is_hovered_on_one_map_is_marked_on_all_with_its_neighbours(open_page):
    page = open_page()
    hover_over(page, explorer_of(page), PATIENCE)
    before = page.evaluate("() => document.querySelectorAll('.hx-frame canvas')[1].toDataURL()")
    page.mouse.move(*point_of(explorer_of(page), 7), steps=3)
    page.wait_for_function("() => document.querySelector('.hspace-explorer').explorer.hovered >= 0")
    i = state(page, "e.hovered")
    panel = page.locator(".hx-panel").first.inner_text()
    nearest = np.argsort(np.linalg.norm(POINTS - POINTS[i], axis=1))[1:5]
    assert f"seed {i}" in panel and all(f"seed {k}" in panel for k in nearest) and "by x, y" in panel
    assert f"right: {POINTS[i, 0] > 0}" in panel
    page.wait_for_function("(b) => document.querySelectorAll('.hx-frame canvas')[1].toDataURL() !== b", arg=before)


def test_everything_works_by_keyboard(open_page):
    page = open_page()
    canvas = page.locator(".hx-frame canvas").first
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.tagName") == "CANVAS":
            break
    assert canvas.evaluate("(el) => el === document.activeElement")
    for key in ("n", "n", " ", "n", " ", "p"):
        page.keyboard.press(key)
    assert state(page, "[...e.selected.a]") == [1, 2] and state(page, "e.view.pinned") == 1
    assert "seed 1; x:" in page.locator("[role=status]").inner_text()
    for key in ("+", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert state(page, "e.maps[1].camera") == {"x": 0.12, "y": 0.12, "k": 1.25}
    page.get_by_label("one camera").uncheck()
    canvas.focus()
    page.keyboard.press("0")
    assert state(page, "e.maps.map((map) => map.camera.k)") == [1, 1.25, 1.25]
    page.get_by_role("button", name="Clear").press("Enter")
    assert state(page, "e.selected.a.size") == 0
    page.get_by_label("timestep").press("End")
    assert page.locator("output", has_text="t = 0").count() == 1 and state(page, "e.view.frame") == 2


def test_a_camera_close_by_shows_pictures_and_what_is_in_view_can_be_selected(open_page):
    page = open_page()
    page.get_by_label("Drag").select_option("pan")
    page.locator("canvas").first.focus()
    assert not state(page, "e.maps[0].spritesFit(e.pictures, 1)")
    for _ in range(4):
        page.get_by_role("button", name="zoom in").click()
    page.wait_for_function("() => document.querySelector('.hspace-explorer').explorer.maps[0].camera.k > 5")
    page.wait_for_timeout(50)
    assert state(page, "e.maps[0].spritesFit(e.pictures, 1)")
    page.get_by_role("button", name="Select what is in view").click()
    x, y, k, unit, width, height = state(
        page, "Object.values(e.maps[0].camera).concat(e.maps[0].unit, e.maps[0].canvas.width, e.maps[0].canvas.height)"
    )
    centre, half = state(page, "[e.data.maps[0].centre, e.data.maps[0].half]")
    within = (POINTS - centre) / half - [x, y]
    inside = np.flatnonzero((np.abs(within) < np.array([width, height]) / (2 * unit * k)).all(axis=1))
    assert state(page, "[...e.selected.a]") == inside.tolist()


def test_what_is_in_view_is_that_of_the_map_that_was_worked_on_last(open_page):
    page = open_page()
    page.get_by_label("one camera").uncheck()
    page.locator("canvas").nth(1).focus()
    for _ in range(4):
        page.get_by_role("button", name="zoom in").click()
    page.get_by_role("button", name="Select what is in view").click()
    assert (
        state(page, "e.maps.map((map) => map.camera.k > 2)") == [False, True, False] and state(page, "e.view.map") == 1
    )
    assert state(page, "[...e.selected.a]") == state(page, "[...e.maps[1].visible()]")


def test_the_colour_and_what_is_missing_are_told(open_page):
    page = open_page()
    legend = page.locator(".hx-legend")
    assert legend.locator(".hx-ramp").count() == 1 and f"{POINTS[:, 0].min():.2f}" in legend.inner_text()
    page.get_by_label("Colour").select_option(label="right")
    assert "False" in legend.inner_text() and legend.locator(".hx-dot").count() == 2
    page.get_by_label("Colour").select_option(label="some")
    assert "grey: 5 of 60 samples have no value" in legend.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read_and_1280_pixels_are_enough(open_page, scheme):
    page = open_page(scheme=scheme)
    lasso(page, explorer_of(page), CORNERS)
    page.mouse.move(*point_of(explorer_of(page), 7), steps=3)
    page.locator(".hx-tip").wait_for()
    for selector in ("figcaption", ".hx-note", ".hx-x", "button", ".hx-panel b", ".hx-tip span"):
        assert contrast(page, f".hspace-explorer {selector}") > 4.5, selector
    corner = page.evaluate(
        "() => [...document.querySelector('.hx-frame canvas').getContext('2d').getImageData(1, 1, 1, 1).data]"
    )
    assert (sum(corner[:3]) < 200) == (scheme == "dark")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1280
    paths.reports().mkdir(exist_ok=True)
    page.screenshot(path=paths.reports() / f"explorer-{scheme}.png", full_page=True)


def test_a_broken_link_opens_the_page_as_it_is(open_page, address):
    assert state(open_page(address + "#maps=%7Bnothing"), "e.view.k") == 1
    view = json.dumps({"a": "0-3,9999", "colour": 1, "k": 2})
    assert state(open_page(f"{address}#maps={view}"), "[...e.selected.a, e.maps[0].camera.k]") == [0, 1, 2, 3, 2]
