"""Captions: what they say is true of the picture, and stands beside it."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workbench.datasets import captions
from workbench.datasets.avataaars import EYEGLASSES, HATS, LONG_HAIR, SMILES, SUNGLASSES, attributes
from workbench.datasets.captions import HAT_FREQUENCY, described_factors
from workbench.datasets.labelled import load_images

SAYS = {
    "smile": (
        r"(?<!no )(?<!without a )(?<!not )\bsmil(?!e$|e,)|(?<!un)happy|grinning|cheerful",
        lambda f: f.mouth in SMILES,
    ),
    "no smile": (
        r"no smile|without a smile|not smil|not smiling|unsmiling|serious|sad\b",
        lambda f: f.mouth not in SMILES,
    ),
    "glasses": (r"(?<!no )(?<!dark )(?<!without )(?<!wearing )\bglasses|spectacles", lambda f: f.glasses in EYEGLASSES),
    "sunglasses": (r"sunglasses|dark glasses|shades", lambda f: f.glasses in SUNGLASSES),
    "no glasses": (r"(no|without|not wearing) (eye)?glasses", lambda f: f.glasses == "NONE"),
    "beard": (
        r"bearded|(a|full) beard\b(?<!without a beard)|(?<!no )(?<!without )facial hair",
        lambda f: f.beard != "NONE",
    ),
    "no beard": (r"beardless|clean shaven|no beard|without a beard|(no|without) facial", lambda f: f.beard == "NONE"),
    "long hair": (r"(?<!not )(?<!without )\blong\b", lambda f: f.hair in LONG_HAIR),
    "bald": (r"\bbald|hairless|\bno hair|without hair", lambda f: f.hair == "NONE"),
    "hat": (r"(?<!no )(?<!without a )\bhat\b", lambda f: f.hair in HATS),
    "closed eyes": (
        r"(?<!without )closed eyes|eyes (are )?(closed|shut)|closing the eyes",
        lambda f: f.eyes in ("CLOSED", "HAPPY"),
    ),
    "angry": (r"(?<!not )(?<!without )angry|frowning|who frowns", lambda f: f.eyebrows == "ANGRY"),
    "woman": (r"\bwoman\b", lambda f: f.beard == "NONE"),
}
"""Words, and what has to be so in a picture whose caption has them."""


@pytest.fixture(scope="module")
def told():
    """Factors of 400 pictures, each with 8 captions."""
    drawn = [described_factors(3, i) for i in range(400)]
    return [(f, text) for i, f in enumerate(drawn) for text in captions.captions(f, 8, seed=i)]


@pytest.mark.parametrize("what", SAYS)
def test_a_caption_is_true_of_its_picture(told, what):
    words, is_so = SAYS[what]
    said = [(f, text) for f, text in told if re.search(words, text)]
    assert len(said) > 20
    assert [text for f, text in said if not is_so(f)] == []


def test_captions_are_partial_and_come_in_many_wordings(told):
    texts = [text for _, text in told]
    assert len(set(texts)) > 0.9 * len(texts)
    assert min(len(text.split()) for text in texts) <= 2 and max(len(text.split()) for text in texts) > 20
    assert captions.captions(told[0][0], 8, seed=5) == captions.captions(told[0][0], 8, seed=5)


def test_pictures_with_captions_have_no_planted_correlations_and_some_hats():
    drawn = [described_factors(3, i) for i in range(4000)]
    table = pd.DataFrame([attributes(f) for f in drawn])
    hats = np.mean([f.hair in HATS for f in drawn])
    assert abs(hats - HAT_FREQUENCY) < 0.02
    assert table[["Beard", "Long_Hair"]].corr().iloc[0, 1] == pytest.approx(0, abs=0.05)
    covered = table[[f.hair in HATS for f in drawn]]
    assert not covered[["Long_Hair", "Bald", "Gray_Hair", "Black_Hair"]].any(axis=None)


def test_a_folder_with_captions_is_read_with_them(tmp_path):
    pytest.importorskip("python_avatars")
    images = load_images(captions.build(6, part=3, out=tmp_path / "faces", each=3, progress=False))
    own = captions.captions(described_factors(3, 4), 3, seed=(3, 4, 1))
    assert images.captions[4] == own and images.select([4]).captions == [own]
    assert images.label("Hat").tolist() == [int(described_factors(3, i).hair in HATS) for i in range(6)]


def test_the_hubs_table_of_texts_is_read(tmp_path):
    for i in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,black square\n1.png,\n")
    with pytest.warns(UserWarning, match="text"):
        images = load_images(tmp_path)
    assert images.captions == [["black square"], []]
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,black square\n0.png,night\n1.png,dark\n")
    with pytest.warns(UserWarning, match="text"):
        assert load_images(tmp_path).captions == [["black square", "night"], ["dark"]]


def test_captions_are_read_as_spreadsheets_write_them(tmp_path):
    decomposed, composed = (unicodedata.normalize(form, "é.png") for form in ("NFD", "NFC"))
    Image.new("RGB", (4, 4)).save(tmp_path / decomposed)
    for text, encoding in (
        (f"file;caption\n{composed};ein Mädchen\n", "latin-1"),
        (f"file,caption\n./{composed},ein Mädchen", "utf-16"),
    ):
        (tmp_path / "captions.csv").write_bytes(text.encode(encoding))
        assert load_images(tmp_path).captions == [["ein Mädchen"]]


@pytest.mark.parametrize(
    ("table", "words"), [(None, "captions.csv"), ("file,words\n0.png,a\n", "caption"), ("file,caption\n", "none of")]
)
def test_missing_captions_are_refused(tmp_path, table, words):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    if table is not None:
        (tmp_path / "captions.csv").write_text(table)
    images = load_images(tmp_path)
    with pytest.raises(ValueError, match=words):
        images.captions  # noqa: B018
