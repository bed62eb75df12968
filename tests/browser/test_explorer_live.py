"""The page that `workbench explore STORE` serves, where a lasso becomes a direction, its pictures and a file.

The store's h is planted: an attribute moves it along one direction, which is saved as a known one. One server and one
page for all tests, in the order of a person's work; each goes on where the one before stopped.
"""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from matplotlib.path import Path as Outline
from PIL import Image
from report_checks import CHROMIUM, hover_over, lasso, point_of
from servers import announced, serving
from small_domain import build

import workbench as wb
from workbench.directions.direction import Direction, origin_of, random_like
from workbench.editing.render import render
from workbench.studio.desk import SCALES

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH"),
    pytest.mark.filterwarnings("ignore:the samples diverge"),
]

N, STEPS, PATIENCE = 60, 4, 60_000
ATTRIBUTE = "Bright"


@pytest.fixture(scope="module")
def planted_store(make_unet, tmp_path_factory):
    """A store in whose h an attribute is planted, its model's folder, the scores, and the home of the page."""
    folder = tmp_path_factory.mktemp("live")
    make_unet().save_pretrained(folder / "tiny" / "unet")
    DDPMScheduler().save_pretrained(folder / "tiny" / "scheduler")
    named = build(folder, {"model_name": str(folder / "tiny")})
    model = wb.load_model(folder / "tiny", device="cpu")
    store = wb.extract(model, N, steps=STEPS, dtype="float32", out=folder / "store.zarr", progress=False)
    scores = wb.load_classifier(named["classifier_name"])(store.images[:]).set_index(np.arange(N))
    rng = np.random.default_rng(0)
    planted = rng.normal(size=(STEPS, *store.h_shape)).astype(np.float32)
    planted /= np.linalg.norm(planted.reshape(STEPS, -1), axis=1).reshape(-1, 1, 1, 1)
    h = store.group["h"][:]
    length = 10 * h.reshape(N, STEPS, -1).std(axis=0).max()
    ranks = scores[ATTRIBUTE].rank().to_numpy() / N
    store.group["h"][:] = h + length * ranks[:, None, None, None, None].astype(np.float32) * planted
    (folder / "home" / "data" / "directions").mkdir(parents=True)
    about = origin_of(store) | {"method": "planted", "parameters": {}, "seeds": []}
    known = Direction.from_delta(torch.from_numpy(planted), timesteps=store.timesteps, name="known", provenance=about)
    known.save(folder / "home" / "data" / "directions" / "known.safetensors")
    return wb.open_store(store.path), model, named["classifier_name"], folder / "home"


@pytest.fixture(scope="module")
def page(browser, planted_store):
    store, model, classifier, home = planted_store
    log = home.parent / "explorer.log"
    command = [sys.executable, "-m", "workbench.cli", "explore", str(store.path), "--classifier", classifier]
    command += ["--model", str(home.parent / "tiny"), "--device", "cpu"]
    with serving(command, {"WORKBENCH_HOME": str(home)}, log) as process:
        address, server = announced(log, process)
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        asked, wrong = [], []
        page.on("response", lambda response: asked.append(response.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_function("() => document.querySelector('.hspace-explorer')?.explorer?.painted")
        yield page
        context.close()
    assert not wrong
    assert not [url for url in asked if not url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))]


@pytest.fixture(scope="module")
def explorer(page):
    return page.locator(".hspace-explorer")


def facts(explorer) -> dict[str, str]:
    rows = explorer.locator(".hx-panel table tr")
    rows.filter(has_text="held-out separability").wait_for()
    return dict(line.split("\t") for line in rows.all_inner_texts())


def said(page, words: str) -> str:
    line = page.locator(".hx-said", has_text=words)
    line.wait_for()
    return line.inner_text()


def points_of(explorer, which: int = 0) -> np.ndarray:
    """Points of a map in its own coordinates."""
    return np.array(
        explorer.evaluate(
            """(el, which) => {
                const { maps, data, n } = el.explorer, { centre, half } = data.maps[which];
                const at = (i, k) => maps[which].positions[2 * i + k] * half + centre[k];
                return [...Array(n).keys()].map((i) => [at(i, 0), at(i, 1)]);
            }""",
            which,
        )
    )


def around(points: np.ndarray, low: float, high: float) -> list[tuple[float, float]]:
    """Corners around all points whose first coordinate is between these quantiles."""
    left, right = np.quantile(points[:, 0], [low, high]) + [-1e-3 * np.ptp(points), 1e-3 * np.ptp(points)]
    down, up = points[:, 1].min() - 0.02 * np.ptp(points), points[:, 1].max() + 0.02 * np.ptp(points)
    return [(left, down), (right, down), (right, up), (left, up)]


def test_a_sample_is_hovered_and_its_score_told(page, explorer, planted_store):
    hover_over(page, explorer, PATIENCE)
    page.mouse.move(*point_of(explorer, 7), steps=3)
    page.wait_for_function("() => document.querySelector('.hspace-explorer').explorer.hovered >= 0")
    i = explorer.evaluate("(el) => el.explorer.hovered")
    panel = explorer.locator(".hx-panel").first.inner_text()
    store, _, classifier, _ = planted_store
    score = wb.load_classifier(classifier)(store.images[i : i + 1])[ATTRIBUTE].iloc[0]
    shown = float(re.search(rf"{ATTRIBUTE}: (\S+)", panel)[1])
    assert f"seed {store.seeds[i]}" in panel and shown == pytest.approx(score, abs=0.01)


def test_a_lasso_finds_the_planted_direction_and_warns_of_its_attribute(page, explorer, planted_store):
    store, _, classifier, home = planted_store
    points = points_of(explorer)
    scores = wb.load_classifier(classifier)(store.images[:])
    rising = np.corrcoef(points[:, 0], scores[ATTRIBUTE].rank())[0, 1] > 0
    corners = around(points, 0.7, 1.0) if rising else around(points, 0.0, 0.3)
    lasso(page, explorer, corners)
    chosen = np.flatnonzero(Outline(corners).contains_points(points))
    found, t = facts(explorer), store.timesteps[round(0.3 * (STEPS - 1))]
    expected = wb.find_from_selection(store, chosen, t=t, progress=False)
    share = expected.boundary.balanced_accuracy
    assert share.value > 0.9  # it is planted
    assert found["samples"] == f"A {len(chosen)}, B {N - len(chosen)}"
    assert found["held-out separability"].startswith(f"{share.value:.0%} (95% interval {share.low:.0%} to")
    assert found["held-out separability"].endswith(f"t = {t}, n = {N}")
    known = wb.load_direction(home / "data" / "directions" / "known.safetensors")
    cosine = expected.direction.cosine(known)
    assert cosine > 0.8
    assert found["cosine to known directions"] == f"known {cosine:+.2f}"
    assert explorer.get_by_role("alert").inner_text().startswith(f"{ATTRIBUTE} alone tells A from B")
    pictures = explorer.locator(".hx-panel figure img")
    assert pictures.count() == 2 and pictures.nth(0).get_attribute("src") != pictures.nth(1).get_attribute("src")


def test_a_second_lasso_is_compared_instead_of_the_rest(page, explorer, planted_store):
    store, *_ = planted_store
    points = points_of(explorer)
    first = explorer.evaluate("(el) => [...el.explorer.selected.a]")
    low = points[first, 0].mean() < points[:, 0].mean()
    page.get_by_label("into").select_option("b")
    corners = around(points, 0.6, 1.0) if low else around(points, 0.0, 0.4)
    lasso(page, explorer, corners)
    second = explorer.evaluate("(el) => [...el.explorer.selected.b].sort((a, b) => a - b)")
    assert second == np.flatnonzero(Outline(corners).contains_points(points)).tolist()
    explorer.locator(f".hx-panel td:text-is('A {len(first)}, B {len(second)}')").wait_for()
    assert facts(explorer)["held-out separability"].endswith(f"n = {len(first) + len(second)}")


def test_it_is_rendered_on_samples_beside_the_random_control(page, explorer, planted_store):
    store, model, *_ = planted_store
    page.get_by_role("button", name="Render beside a random direction").click()
    explorer.locator(".hx-line", has_text="random control").wait_for()
    assert explorer.locator(".hx-line b").all_inner_texts() == ["selection", "random control"]
    (strip,) = explorer.evaluate("(el) => el.explorer.model.get('strips')")
    a, b = (explorer.evaluate(f"(el) => [...el.explorer.selected.{side}]") for side in "ab")
    found = wb.find_from_selection(store, a, b, t=store.timesteps[1], progress=False).direction
    run = wb.sample(model, [N, N + 1], steps=store.timesteps, eta=store.provenance["etas"][0], progress=False)
    grid = render(run, {"selection": found, "random": random_like(found, seed=0)}, SCALES, progress=False)
    expected = wb.plots.to_pixels(grid.images.flatten(0, 1)).reshape(4, len(SCALES), 8, 8, 3)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip["sheet"].partition(",")[2]))).convert("RGB"))
    shown = sheet.reshape(4, 8, len(SCALES), 8, 3).swapaxes(1, 2)
    np.testing.assert_allclose(shown.astype(int), expected.astype(int), atol=1)
    assert (expected[0, -1] != expected[0, 2]).any() and (expected[0, -1] != expected[2, -1]).any()
    cell = explorer.locator(".hx-cell").first
    before = cell.get_attribute("aria-label")
    explorer.get_by_role("slider", name="selection").press("End")
    assert before.endswith(", 0") and cell.get_attribute("aria-label").endswith(f"{SCALES[-1]:+g} sigma")


def test_it_is_saved_with_the_seeds_of_the_selection_and_under_the_given_name(page, explorer, planted_store):
    store, model, _, home = planted_store
    page.get_by_label("Name").fill("planted again")
    page.get_by_label("Name").press("Tab")
    page.get_by_role("button", name="Save").click()
    file = home / "data" / "directions" / f"{model.name}-planted-again.safetensors"
    assert str(file) in said(page, "saved ")
    saved = wb.load_direction(file, model=model)
    a, b = (explorer.evaluate(f"(el) => [...el.explorer.selected.{side}].sort((a, b) => a - b)") for side in "ab")
    chosen = saved.provenance["parameters"]["selection"]
    assert chosen == {"t": store.timesteps[1], "a": [store.seeds[i] for i in a], "b": [store.seeds[i] for i in b]}
    assert saved.name == "planted again"


def test_one_sample_is_a_sentence(page, explorer):
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("into").select_option("a")
    canvas = explorer.locator(".hx-frame canvas").first
    canvas.focus()
    page.keyboard.press("n")
    page.keyboard.press(" ")
    assert said(page, "needs at least 2").startswith("A has 1 sample")
