"""CLIP: training on pairs whose answer is known, its files, and its embeddings with derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_models import COLOURS, paint_squares

import workbench as wb
from workbench.datasets import clip_training
from workbench.datasets.clip_training import train_clip


def test_it_learns_what_captions_say(squares):
    images, folder = squares
    clip = wb.load_clip(folder, device="cpu")
    scores = clip.scores(images[:40], [f"a {name} square" for name in COLOURS])
    assert (scores.argmax(axis=1) == np.arange(40) % 4).mean() > 0.9
    classifier = wb.load_classifier(folder, prompts={"red": ("a red square", "a blue square")}, device="cpu")
    probabilities = classifier(images[:40])["red"].to_numpy()
    assert (probabilities[::4] > 0.5).all() and (probabilities[2::4] < 0.5).all()


def test_transformers_reads_the_folder(squares):
    images, folder = squares
    network = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pictures = [Image.fromarray(p) for p in ((images[:3] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = network(**tokenizer(["a red square"], return_tensors="pt"), pixel_values=pixels).logits_per_image
    scale = float(network.logit_scale.exp())
    own = wb.load_clip(folder, device="cpu").scores(images[:3], ["a red square"])
    np.testing.assert_allclose(scale * own, logits, atol=1e-3)


def test_a_training_repeats_itself(squares, tmp_path):
    images, _ = squares
    found = []
    for name in ("one", "two"):
        train_clip(images, out=tmp_path / name, steps=3, batch_size=8, seed=7, progress=False)
        found.append(wb.load_clip(tmp_path / name, device="cpu").hash)
    assert found[0] == found[1]


def test_a_killed_training_resumes_exactly(squares, tmp_path, monkeypatch):
    images, _ = squares
    settings = {"steps": 5, "batch_size": 8, "seed": 7, "progress": False}
    train_clip(images, out=tmp_path / "whole", **settings)

    def write(*given, **named):
        if named["about"]["steps"] == 4:
            raise KeyboardInterrupt
        clip_training_write(*given, **named)

    clip_training_write = clip_training._write
    with monkeypatch.context() as patch:
        patch.setattr(clip_training, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            train_clip(images, out=tmp_path / "parts", minutes=0, **settings)
    with pytest.raises(ValueError, match="differs in: seed"):
        train_clip(images, out=tmp_path / "parts", resume=True, **{**settings, "seed": 8})
    train_clip(images, out=tmp_path / "parts", resume=True, **settings)
    whole, parts = (wb.load_clip(tmp_path / name, device="cpu").hash for name in ("whole", "parts"))
    assert parts == whole
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        train_clip(images, out=tmp_path / "parts", resume=True, **settings)


def test_embeddings_with_derivatives_are_those_of_the_processor(squares):
    images, folder = squares
    clip = wb.load_clip(folder, device="cpu")
    given = images[:4].clone().requires_grad_(True)
    found = clip.differentiable(given)
    np.testing.assert_allclose(found.detach(), clip.images(images[:4]), atol=2e-2)
    found[:, 0].sum().backward()
    step = torch.zeros(4, 3, 8, 8)
    step[:, 1, 3, 5] = 1e-2
    with torch.no_grad():
        change = (clip.differentiable(images[:4] + step) - clip.differentiable(images[:4] - step))[:, 0] / 2e-2
    np.testing.assert_allclose(given.grad[:, 1, 3, 5], change, rtol=0.05, atol=1e-4)
    larger = torch.nn.functional.interpolate(images[:4], size=(16, 16), mode="bicubic", antialias=True)
    assert torch.nn.functional.cosine_similarity(clip.differentiable(larger), found.detach()).min() > 0.98


@pytest.mark.parametrize(("text", "words"), [("", "''"), ("  ", "word"), (7, "7"), ("zebra quagga", "zebra quagga")])
def test_texts_without_a_known_word_are_refused(squares, text, words):
    with pytest.raises(ValueError, match=words):
        wb.load_clip(squares[1], device="cpu").texts([text])


def test_unknown_words_among_known_ones_are_named(squares):
    with pytest.warns(UserWarning, match="'zebra'"):
        wb.load_clip(squares[1], device="cpu").texts(["a red zebra"])


def test_long_captions_are_cut_and_one_image_is_held_out_of_a_few(tmp_path):
    images = paint_squares(tmp_path, 8)
    table = tmp_path / "captions.csv"
    table.write_text(table.read_text() + "\n000.png," + " ".join(["a red square"] * 20))
    train_clip(images, out=tmp_path / "clip", steps=4, batch_size=4, progress=False)
    assert wb.load_clip(tmp_path / "clip", device="cpu").texts(["a red square"]).shape[0] == 1


def test_too_few_captions_or_odd_sizes_are_refused(squares, tmp_path):
    images, _ = squares
    with pytest.raises(ValueError, match="80 of 80"):
        train_clip(images, out=tmp_path, batch_size=64)
    with pytest.raises(ValueError, match="6 x 6"):
        train_clip(images.at_size(6), out=tmp_path, batch_size=8)
