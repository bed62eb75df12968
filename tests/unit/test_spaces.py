"""The table and the drawing of taps say what the network's activations are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import workbench as wb


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, range(4), steps=3, record_x=True, progress=False)


def test_every_tap_has_its_shape_norm_and_variation(tiny, run):
    table = wb.tap_table(run, progress=False)
    assert set(table["tap"]) == set(tiny.taps)
    assert list(table["t"].unique()) == list(run.timesteps)
    for row in table.itertuples():
        h = tiny.tapped(row.tap).encode(run.x_at(row.t), row.t).h.numpy()
        assert h.shape[1:] == (row.channels, row.height, row.width)
        assert row.rms == pytest.approx(np.sqrt((h**2).mean()), rel=1e-5)
        assert row.varies == pytest.approx(min(1.0, h.var(axis=0, ddof=1).mean() / (h**2).mean()), rel=1e-4)


def test_a_run_at_another_tap_is_the_same_run_and_edits_there(tiny, run):
    tapped = run.tapped("skip.1")
    store = np.random.default_rng(0).standard_normal(tapped.model.h_shape)
    assert (wb.replay(tapped, progress=False).x0 == run.x0).all()
    assert tapped.model.h_shape == store.shape != tiny.h_shape


def test_one_sample_or_a_timestep_that_was_not_visited_is_refused(run):
    with pytest.raises(ValueError, match="1 sample"):
        wb.tap_table(run[0])
    with pytest.raises(ValueError, match="5 was not visited"):
        wb.tap_table(run, timesteps=[5])


def test_the_drawing_has_a_box_a_block_and_a_label_a_skip(tiny, run):
    figure = wb.plots.network(wb.tap_table(run, progress=False))
    texts = [text.get_text() for text in figure.axes[0].texts]
    for tap in tiny.taps:
        wanted = tap not in ("before", "middle")
        assert any(text.startswith((f"{tap}\n", f"{tap}:", f"{tap} (h)")) for text in texts) == wanted, tap
    with pytest.raises(ValueError, match="no taps"):
        wb.plots.network(pd.DataFrame())
