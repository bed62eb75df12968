"""The edit studio in a real browser: in JupyterLab and as a page on its own, by keyboard, in both themes.

One server and one page for all checks of JupyterLab, in the order of a person's work; each test goes on where the one
before stopped. Screenshots are written to reports/ for people to look at.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from report_checks import CHROMIUM, contrast, point_of
from servers import announced, answers, serving

import workbench as wb
from workbench import paths
from workbench.report import plots
from workbench.studio.recipe import load_editable, read_recipe
from workbench.studio.server import _free_port

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")]

NAME = "browser-test"
AFTER = '.hspace-studio img[alt^="after"]'
PATIENCE = 120_000
N, STEPS = 24, 6
"""Samples that directions are found on, and timesteps."""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab with 70_edit_studio open and run to its end."""
    folder = tmp_path_factory.mktemp("lab")
    settings = folder / "settings" / "@jupyterlab"
    for name, values in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("docmanager-extension/plugin", {"autosave": False}),
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    work = folder / "work"
    work.mkdir()
    text = (paths.notebooks() / "70_edit_studio.ipynb").read_text(encoding="utf-8")
    for name, default, value in (("n", 96, N), ("steps", 20, STEPS), ("k", 24, N // 4)):
        assert f"{name}: int = {default}  #" in text
        text = text.replace(f"{name}: int = {default}  #", f"{name}: int = {value}  #")
    (work / "70_edit_studio.ipynb").write_text(text, encoding="utf-8")
    port, token = _free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ip=127.0.0.1", f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True"]
    environment = {
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    saved = [paths.edits() / f"{NAME}{ending}" for ending in (".json", ".png", ".pdf", ".svg", ".safetensors")]
    with serving(command, environment, folder / "lab.log"):
        base = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while answers(f"{base}/api?token={token}") != 200:
            assert time.monotonic() < deadline, (folder / "lab.log").read_text()
            time.sleep(0.2)
        page = browser.new_context(viewport={"width": 1440, "height": 1500}).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{base}/lab/tree/70_edit_studio.ipynb?token={token}")
        page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)")
        errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
        assert errors.count() == 0, errors.first.inner_text()
        page.locator(AFTER).wait_for()
        page.locator(".hspace-studio").first.scroll_into_view_if_needed()  # it stays, where its pictures are replaced
        yield page
    for file in saved:
        file.unlink(missing_ok=True)
    shutil.rmtree(paths.edits() / f"{NAME}.parts", ignore_errors=True)


def pixels(page) -> np.ndarray:
    source = page.locator(AFTER).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def wait_for_after(page, words: str) -> np.ndarray:
    """Wait for the whole image of an edit that these words describe."""
    page.wait_for_selector(f'.hspace-studio img[alt^="after: {words}"][alt$="({STEPS} steps)"]')
    return pixels(page)


def slider(page, name: str):
    row = page.locator(".hspace-studio .widget-slider", has=page.locator(f'.widget-label:text-is("{name}")'))
    return row.locator(".noUi-handle").first


def rendered(session) -> np.ndarray:
    return plots.to_pixels(session.render().after[None])[0]


def say(page) -> str:
    return page.locator(".hspace-studio .hspace-status").inner_text()


def screenshot(page, name: str) -> None:
    paths.reports().mkdir(exist_ok=True)
    page.screenshot(path=paths.reports() / f"studio-{name}.png")


def open_view(page, title: str) -> None:
    page.locator(".hspace-studio .lm-TabBar-tab", has_text=title).click()


# In JupyterLab


def test_a_slider_pulled_by_keyboard_changes_the_image(lab):
    before = wait_for_after(lab, "Smiling +2 sigma")
    handle = slider(lab, "Smiling")
    handle.focus()
    for _ in range(3):
        lab.keyboard.press("ArrowRight")
    after = wait_for_after(lab, "Smiling +2.3 sigma")
    assert (after != before).any()
    assert handle.get_attribute("aria-valuenow") == "2.3"
    screenshot(lab, "light")


def test_a_saved_recipe_renders_the_browsers_image_in_another_process_and_reloads(lab):
    shown = pixels(lab)
    open_view(lab, "Files")
    lab.get_by_label("Name").fill(NAME)
    lab.get_by_label("Name").press("Tab")
    for words, said in (("Save recipe", "saved " + NAME + ".json"), ("Save figure", NAME + ".pdf")):
        lab.get_by_role("button", name=words).click()
        lab.locator(".hspace-status", has_text=said).wait_for()
    path = paths.edits() / f"{NAME}.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(read_recipe(path)["result"]["threads"])
    try:
        session = wb.open_recipe(path)
        assert session.state.scales == {"Smiling": 2.3}
        np.testing.assert_array_equal(rendered(session), shown)
    finally:
        torch.set_num_threads(threads)

    lab.get_by_role("button", name="Reset").focus()
    lab.keyboard.press("Enter")
    assert (wait_for_after(lab, "no edit") != shown).any()
    lab.get_by_role("button", name="Load recipe").click()
    np.testing.assert_array_equal(wait_for_after(lab, "Smiling +2.3 sigma"), shown)


def test_another_sample_is_picked(lab):
    shown = pixels(lab)
    lab.get_by_role("button", name=f"seed {N + 1}").click()
    lab.wait_for_selector(f'.hspace-studio img[alt="before: seed {N + 1}"]')
    assert (wait_for_after(lab, "Smiling +2.3 sigma") != shown).any()
    session = wb.open_recipe(paths.edits() / f"{NAME}.json")
    session.pick(session.add_seeds([N + 1])[0])
    expected, end = rendered(session), time.monotonic() + 20
    while (pixels(lab) != expected).any() and time.monotonic() < end:  # the sample that was shown before is drawn again
        time.sleep(0.2)
    np.testing.assert_array_equal(pixels(lab), expected)


def test_an_image_is_dropped_in_and_one_that_is_none_is_refused_in_a_sentence(lab, tmp_path):
    (tmp_path / "words.png").write_text("not an image")
    lab.locator(".hspace-drop input").set_input_files(tmp_path / "words.png")
    lab.locator(".hspace-status [role=alert]", has_text="cannot be decoded as an image").wait_for()
    picture = io.BytesIO()
    image = (wb.load_images("avataaars", size=32)[5] + 1) * 127.5
    Image.fromarray(image.permute(1, 2, 0).round().byte().numpy()).save(picture, format="PNG")
    # Dropped as by the mouse: an event that carries a file.
    transfer = lab.evaluate_handle(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "face.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(picture.getvalue()).decode(),
    )
    lab.dispatch_event(".hspace-drop", "drop", {"dataTransfer": transfer})
    lab.wait_for_selector('.hspace-studio img[alt^="before: image 6"]')
    lab.get_by_role("button", name="✓ image 6").wait_for()
    wait_for_after(lab, "Smiling +2.3 sigma")


def test_the_views_show_pictures_and_the_map_is_drawn(lab):
    for title, count in (("Strip", 7), ("Grid", 25), ("Timesteps", 12)):
        open_view(lab, title)
        panel = lab.locator(
            ".hspace-studio .widget-tab-contents .lm-mod-current, .hspace-studio .widget-tab-contents "
            "> :not(.lm-mod-hidden)"
        ).first
        lab.wait_for_function(
            "([panel, count]) => panel.querySelectorAll('img').length >= count", arg=[panel.element_handle(), count]
        )
    open_view(lab, "Map")
    explorer = lab.locator(".hspace-studio .hspace-explorer")
    explorer.wait_for()
    lab.wait_for_function("() => document.querySelector('.hspace-studio .hspace-explorer').explorer?.painted")
    explorer.locator("canvas").first.scroll_into_view_if_needed()
    lab.mouse.move(*point_of(explorer, 7), steps=4)
    lab.locator(".hspace-studio .hx-tip canvas").wait_for()
    screenshot(lab, "map")


def test_a_lasso_on_the_map_becomes_a_direction_with_a_slider(lab):
    explorer = lab.locator(".hspace-studio .hspace-explorer")
    lab.mouse.move(5, 5)
    box = explorer.locator(".hx-frame canvas").first.bounding_box()
    left, top, middle = box["x"] + 4, box["y"] + 4, box["x"] + box["width"] / 2
    lab.mouse.move(left, top)
    lab.mouse.down()
    for corner in ((middle, top), (middle, top + box["height"] - 8), (left, top + box["height"] - 8)):
        lab.mouse.move(*corner, steps=5)
    lab.mouse.up()
    found = explorer.locator(".hx-panel", has_text="held-out separability")
    found.wait_for()
    assert found.locator("img").count() == 2 and "cosine to known directions" in found.inner_text()
    screenshot(lab, "map-selection")
    explorer.get_by_role("button", name="To the studio").click()
    lab.locator(".widget-slider", has=lab.locator('.widget-label:text-is("selection")')).wait_for()
    slider(lab, "selection").focus()
    for _ in range(10):
        lab.keyboard.press("ArrowRight")
    lab.wait_for_selector('.hspace-studio img[alt^="after: Smiling +2.3 sigma, selection +1 sigma"][alt$="steps)"]')


def test_everything_is_readable_in_the_dark_theme(lab):
    open_view(lab, "Read-out")
    lab.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    lab.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    for selector in (".widget-label", ".widget-readout", "h4", "figcaption", ".hspace-bars th", ".hspace-drop span"):
        assert contrast(lab, f".hspace-studio {selector}") > 4.5, selector
    screenshot(lab, "dark")


# As a page on its own


@pytest.mark.slow  # tests/unit/test_server.py holds who may open it
def test_the_studio_is_a_page_of_its_own_for_this_machine_and_token_alone(lab, browser, tmp_path):
    parts = paths.edits() / f"{NAME}.parts"
    command = [sys.executable, "-m", "workbench.cli", "studio", "--directions", str(parts)]
    log = tmp_path / "studio.log"
    command += ["--seeds", f"{N}-{N + 1}", "--steps", str(STEPS), "--theme", "dark"]
    with serving(command, {}, log) as process:
        address, server = announced(log, process)
        context = browser.new_context(viewport={"width": 1300, "height": 900})
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        asked = []
        page.on("response", lambda response: asked.append(response.url))
        page.goto(f"{server}/?token=wrong")
        assert page.locator(".hspace-studio").count() == 0 and "hspace" not in page.content()
        page.goto(address)
        before = wait_for_after(page, "no edit")
        slider(page, "Smiling").focus()
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        shown = wait_for_after(page, "Smiling +1 sigma")
        screenshot(page, "page")
        context.close()
    model = wb.load_model("avataaars32")
    runs = wb.sample(model, [N, N + 1], steps=STEPS, progress=False)
    session = wb.EditSession(model, runs, [load_editable(p, model=model) for p in sorted(parts.iterdir())])
    np.testing.assert_array_equal(rendered(session), before)
    session.set_scale("Smiling", 1.0)
    np.testing.assert_array_equal(rendered(session), shown)
    assert not [url for url in asked if not url.startswith((server, "data:", "blob:"))]
