"""Twenty sentences that no caption has: directions found from them edit nearly as well as those from labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.datasets.captions import captions, described_factors

SENTENCES = pd.read_csv(Path(__file__).with_name("sentences.csv"))
SCALES = [2.0, 4.0, 6.0]


def test_no_caption_has_their_words_in_this_order():
    told = {text for i in range(1500) for text in captions(described_factors(0, i), 8, seed=(0, i, 1))}
    assert len(SENTENCES) == 20 and not told & {*SENTENCES.text}


def test_clip_tells_faces_apart_by_them():
    clip, images = wb.load_clip("avataaars-clip", device="cpu"), wb.load_images("avataaars", size=32).select(slice(300))
    embedded, right = clip.images(images[:]), []
    for sentence in SENTENCES.itertuples():
        first, second = clip.texts([sentence.text, sentence.against])
        has, fits = images.label(sentence.attribute).to_numpy() == 1, embedded @ (first - second) > 0
        right.append((fits[has].mean() + (~fits)[~has].mean()) / 2)
    assert np.mean(np.array(right) > 0.9) >= 0.6 and np.mean(right) > 0.88


@pytest.mark.slow
def test_they_edit_nearly_as_well_as_labels(model):
    """Success, as the judge sees it, at the PSNR that the direction from labels has at 4 sigma.

    Measured: 17 of the 20 reach 80% of it, two of them exactly; one for dark glasses, gray hair and baldness do not.
    """
    clip, judge = wb.load_clip("avataaars-clip", device="cpu"), wb.load_classifier("avataaars-judge")
    store = wb.extract(model, 512, steps=10, progress=False)
    labels = wb.load_classifier("avataaars")(store.images[:])
    run = wb.sample(model, range(10_000, 10_032), steps=10, progress=False)

    def curve(direction, attribute):
        found = wb.measure(run, {"edit": direction}, SCALES, classifier=judge, progress=False)
        return found.summary(attribute).set_index("scale")

    good, known = 0, {}
    for sentence in SENTENCES.itertuples():
        attribute = sentence.attribute
        if attribute not in known:
            k = int(np.clip((labels[attribute] > 0.5).sum(), 8, 128))
            direction = wb.find_from_scores(store, labels[attribute].to_numpy(), k=k, name=attribute, progress=False)
            known[attribute] = curve(direction, attribute)
        text = wb.find_from_text(store, sentence.text, against=sentence.against, clip=clip, progress=False)
        found, expected = curve(text, attribute), known[attribute]
        at = -expected.psnr[4.0]
        success, usual = (float(np.interp(at, -each.psnr, each.gained)) for each in (found, expected))
        good += success > 0.8 * usual - 1e-9
    assert good >= 16
