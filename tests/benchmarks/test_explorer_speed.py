"""The explorer: frames a second of 50,000 points, the first paint, and from a lasso to a picture."""

from __future__ import annotations

import shutil
import statistics
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import workbench as wb
from workbench.analysis.maps import Map
from workbench.hspace.store import create_store, open_store, write_chunk
from workbench.studio.desk import Desk
from workbench.studio.explorer import Explorer
from workbench.studio.state import Progress

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
N = 50_000
PAN = """async () => {
    const explorer = document.querySelector('.hspace-explorer').explorer, { canvas } = explorer.maps[0];
    const box = canvas.getBoundingClientRect();
    const send = (type, x, y) => canvas.dispatchEvent(
        new PointerEvent(type, { clientX: box.left + x, clientY: box.top + y, pointerId: 1, bubbles: true }));
    canvas.setPointerCapture = () => {};
    explorer.tool = 'pan';
    send('pointerdown', 100, 100);
    const start = performance.now();
    let frames = 0;
    while (performance.now() - start < 3000) {
        await new Promise(requestAnimationFrame);
        send('pointermove', 100 + 60 * Math.sin(frames / 10), 100 + 60 * Math.cos(frames / 10));
        frames += 1;
    }
    const seconds = (performance.now() - start) / 1000;
    send('pointerup', 100, 100);
    return frames / seconds;
}"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")
def test_fifty_thousand_points_while_they_are_moved(tmp_path, record):
    """Two linked maps with thumbnails, neighbours and two colours, in a page without a kernel."""
    from playwright.sync_api import sync_playwright

    rng = np.random.default_rng(0)
    group = rng.integers(12, size=N)
    points = rng.normal(size=(12, 2))[group] * 3 + rng.normal(size=(N, 2))
    pictures = rng.uniform(-1, 1, (12, 3, 8, 8)).astype(np.float32).repeat(4, axis=2).repeat(4, axis=3)
    made = Explorer(
        [Map("one", points, ("x", "y")), Map("two", points[:, ::-1], ("y", "x"))],
        names=range(N),
        colours={"x": points[:, 0], "group": group % 6},
        images=lambda rows: pictures[group[rows]],
        neighbours=(rng.integers(N, size=(N, 8)), "drawn by chance"),
    )
    page_file = made.save_html(tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
        page.goto(page_file.as_uri())
        painted = "document.querySelector('.hspace-explorer')?.explorer?.painted"
        page.wait_for_function(f"() => {painted}")
        first, frames = page.evaluate(f"() => {painted}") / 1000, page.evaluate(PAN)
        browser.close()
    record("explorer: the page of 50,000 points", page_file.stat().st_size / 1e6, "MB", goal="at most 20")
    record("explorer: first paint of 50,000 points on two maps", first, "s", goal="below 3")
    record("explorer: two maps of 50,000 points while they are moved", frames, "frames a second", goal="at least 30")


def test_from_a_lasso_among_fifty_thousand_samples_to_a_picture(make_unet, tmp_path, record):
    """Of h of 4,096 dimensions at 4 timesteps, which is random: nothing but the time is looked at."""
    model = wb.wrap(make_unet(sample_size=16, block_out_channels=(8, 64)), DDPMScheduler(), name="wide", device="cpu")
    few = wb.extract(model, 4, steps=4, out=tmp_path / "few.zarr", progress=False)
    about = few.provenance | {"n": N, "seeds": {"first": 0, "n": N}, "chunk": 64}
    arrays = {"h": ((N, 4, *model.h_shape), "float16"), "seeds": ((N,), "uint64")}
    store, rng = create_store(tmp_path / "many.zarr", about, arrays), np.random.default_rng(0)
    h = rng.standard_normal((128, 4, *model.h_shape), dtype=np.float32)
    for i, start in enumerate(range(0, N, 64)):
        k, seeds = rng.integers(64), np.arange(start, min(start + 64, N), dtype=np.uint64)
        write_chunk(store, i, {"h": h[k : k + len(seeds)], "seeds": seeds})
    desk, times = Desk(open_store(store.path), model), []
    desk.prepare(Progress())
    for count in (200, 5_000, 25_000):
        a = np.sort(rng.choice(N, count, replace=False)).tolist()
        start = time.perf_counter()
        desk.glimpse(a, None, Progress())
        times.append(time.perf_counter() - start)
    shutil.rmtree(store.path)  # 1.6 GB
    record(
        "explorer: from a selection of 50,000 samples to the first edited picture", max(times), "s", goal="at most 2"
    )


def test_from_a_lasso_to_a_picture(model, record):
    """From the selection's arrival in the kernel to the edited picture's departure, with the sample computed before."""
    store = wb.extract(model, 256, steps=20, progress=False)
    explorer = wb.explore(store, model=model, neighbours=0)
    assert explorer.wait(300)
    arrived, times, passes = {}, [], []
    explorer.observe(lambda change: arrived.setdefault("picture", time.perf_counter()), "found")
    for k in range(5):
        arrived.clear()
        start = time.perf_counter()
        explorer.select(range(20 * k, 20 * k + 40))
        assert explorer.wait(300)
        times.append(arrived["picture"] - start)
        start = time.perf_counter()
        with torch.inference_mode():
            model(torch.zeros(1, *model.x_shape), 500)
        passes.append(time.perf_counter() - start)
    first, one = statistics.median(times), statistics.median(passes)
    record("explorer: from a selection of 256 samples to the first edited picture", first, "s", goal="at most 2")
    record("explorer: from a selection of 256 samples to the first edited picture", first / one, "U-Net passes")
