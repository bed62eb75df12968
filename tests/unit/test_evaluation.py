"""Evaluating a model: numbers that tell a good one from a bad one, and a card that holds them once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench import cli
from workbench.datasets.domain import AVATAAARS
from workbench.evaluate import BEGIN, END, new_card

OPTIONS = {"steps": 4, "n_inverted": 3, "inversion_steps": 4, "progress": False}


@pytest.fixture(scope="module")
def images():
    return wb.load_images("avataaars", size=32).select(slice(400))


@pytest.fixture(scope="module")
def judges():
    return [wb.load_classifier(name, device="cpu") for name in ("avataaars", "avataaars-judge")]


@pytest.fixture(scope="module")
def drawn(model, images, judges):
    """Real images in the place of samples, and half of them in that of training images."""
    samples = wb.load_images("avataaars", size=32)[400:600]
    training = samples[:100] + 0.001
    recipe = {"frequencies": AVATAAARS.frequencies, "pairs": AVATAAARS.pairs}
    return wb.evaluate_model(
        model, images, classifiers=judges, training=training, samples=samples, n=200, **recipe, **OPTIONS
    )


@pytest.fixture(scope="module")
def noisy(model, images, judges):
    """Real images with noise, all of them without a smile."""
    chosen = wb.load_images("avataaars", size=32).select(slice(600, 1200))
    samples = chosen[chosen.label("Smiling") == 0][:200]
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    return wb.evaluate_model(model, images, classifiers=judges, samples=samples + 0.15 * noise, n=200, **OPTIONS)


def test_real_images_are_as_near_as_real_images_and_bad_ones_are_not(drawn, noisy):
    assert list(drawn.distances.index) == [
        (space, measure) for space in ("avataaars", "avataaars-judge") for measure in ("frechet", "kernel")
    ]
    frechet = drawn.distances.xs("frechet", level="measure")
    assert frechet["ratio"].between(0.7, 1.4).all()
    assert (noisy.distances.xs("frechet", level="measure")["ratio"] > 2).all()
    good, bad = (each.distances.xs("kernel", level="measure")["generated"] for each in (drawn, noisy))
    assert (good.abs() < frechet["generated"] / 20).all(), "without bias, near 0 where the other can't be"
    assert (bad > 5 * good.abs()).all()
    assert (frechet["real_low"] <= frechet["real"]).all() and (frechet["real"] <= frechet["real_high"]).all()


def test_the_statement_says_what_the_numbers_say(drawn, noisy):
    good, bad = "\n".join(drawn.statement()), "\n".join(noisy.statement())
    assert "not known to be good or poor from 200 images" in good and "copies of training images" in good
    assert "Smiling" not in good and "Smiling (" in bad and "copies" not in bad
    assert all(f"- {sentence}" in noisy.to_markdown() for sentence in noisy.statement())
    distances = drawn.distances.assign(ratio=drawn.distances["ratio"] * 20)
    assert "are poor: " in replace(drawn, distances=distances).statement()[0]
    many = replace(drawn, about=drawn.about | {"m": 1000})
    assert "are good: " in many.statement()[0]


def test_fine_detail_that_is_missing_or_too_much_is_said(drawn, noisy, model, images, judges):
    blurred = torch.nn.functional.avg_pool2d(images[200:], 3, 1, 1, count_include_pad=False)
    options = {"classifiers": judges[:1], "n_inverted": 0, "n": 200, "progress": False}
    smooth = wb.evaluate_model(model, images, samples=blurred, **options)
    assert list(smooth.spectrum.index) == [1, 2, 4, 8]
    assert drawn.spectrum.between(0.8, 1.25).all() and smooth.spectrum[1] == pytest.approx(1, abs=0.15)
    assert smooth.spectrum[8] < 0.3 and noisy.spectrum[8] > 1.5
    few, usual, many = ("\n".join(each.statement()) for each in (smooth, drawn, noisy))
    assert "too little fine detail" in few and "too much fine detail" in many and "fine detail" not in usual
    assert smooth.numbers()["spectrum"]["8"] == smooth.spectrum[8]


def test_inversion_is_left_out_where_no_image_is_to_be_inverted(model, images, judges):
    options = {"classifiers": judges[:1], "samples": images[:8], "n": 8, "progress": False}
    without = wb.evaluate_model(model, images.select(slice(16)), n_inverted=0, **options)
    assert not len(without.inversion) and without.numbers()["inversion_dB"] == []
    assert "Inversion was not measured" in without.to_markdown()
    with pytest.raises(ValueError, match="n_inverted is -1"):
        wb.evaluate_model(model, images, n_inverted=-1, **options)


def test_recall_falls_where_smiles_are_missing_and_precision_does_not(drawn, noisy):
    for space in drawn.coverage.index:
        good, bad = drawn.coverage.loc[space], noisy.coverage.loc[space]
        assert good["precision"].value > 0.75 and good["precision"].n == 200
        assert abs(good["precision"].value - good["precision_real"].value) < 0.12
        assert bad["precision"].value > 0.75
        assert bad["recall"].value < good["recall"].value - 0.1


def test_frequencies_are_compared_with_the_recipe_or_with_the_labels(drawn, noisy, images):
    assert drawn.frequencies["expected"].to_dict() == AVATAAARS.frequencies
    assert (drawn.frequencies["distance"] < 0.12).all()
    assert list(drawn.pairs.index) == list(AVATAAARS.pairs)
    assert (drawn.pairs[("distance", "")] < 0.15).all()
    assert noisy.frequencies.loc["Smiling", "expected"] == images.label("Smiling").mean()
    assert noisy.frequencies.loc["Smiling", "found"] < 0.1
    assert len(noisy.pairs) == 0


def test_copies_of_training_images_are_found(drawn, noisy):
    """Every second sample is a training image: with a half of the others, nearer by chance, three quarters."""
    assert drawn.copies.value == pytest.approx(0.75, abs=0.1)
    assert drawn.copies_real.low < 0.5 < drawn.copies_real.high
    assert (drawn.nearest[0] - drawn.nearest[1]).abs().max() < 0.01
    assert noisy.copies is None and noisy.nearest is None
    assert "Memorisation was not measured" in noisy.to_markdown()


def test_the_inversion_is_that_of_the_models_own(drawn, model, images):
    expected = wb.invert(model, images[:3], steps=4, progress=False).round_trip_error()
    np.testing.assert_allclose(drawn.inversion, expected)


def test_samples_are_the_models(model, images, judges):
    found = wb.evaluate_model(
        model, images.at_size(None).select(slice(16)), classifiers=judges[1:], n=8, seed=3, **OPTIONS
    )
    torch.testing.assert_close(found.images, wb.sample(model, range(3, 11), steps=4).x0.clamp(-1, 1))


def test_the_card_holds_the_numbers_once(drawn, noisy, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# mine\n\nMy words.\n")
    drawn.write(tmp_path)
    assert drawn.to_markdown() in card.read_text()
    card.write_text(card.read_text() + "\nAnd after it.\n")
    noisy.write(tmp_path)
    text = card.read_text()
    assert text.startswith("# mine\n\nMy words.\n") and text.endswith("\nAnd after it.\n")
    assert text.count(BEGIN) == text.count(END) == 1
    assert noisy.to_markdown() in text and drawn.to_markdown() not in text
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["about"]["n"] == 200
    assert numbers["frequencies"][0] == noisy.frequencies.reset_index().iloc[0].to_dict()
    frechet = noisy.distances.xs("frechet", level="measure")["ratio"]
    assert [row["ratio"] for row in numbers["distances"]] == [frechet.iloc[0], None, frechet.iloc[1], None]
    card.write_text(text.replace(END, ""))
    drawn.write(tmp_path)
    assert card.read_text().endswith("\nAnd after it.\n") and drawn.to_markdown() in card.read_text()


def test_a_new_card_says_what_the_training_was(tmp_path):
    settings = wb.TrainingSettings(steps=123, start="avataaars32")
    about = {"settings": settings.__dict__, "network": {"sample_size": 32, "in_channels": 3}, "parameters": 4_055_715}
    about |= {"images": {"n": 24_000}, "step": 123, "hours": 1.5}
    (tmp_path / "training.json").write_text(json.dumps(about))
    text = new_card(tmp_path)
    for words in (
        "24,000 images, from the weights of `avataaars32`; 123 steps of 32 images",
        "4.06 M",
        "1.5 hours",
        "T = 1000, linear",
    ):
        assert words in " ".join(text.split())
    (tmp_path / "training.json").unlink()
    assert new_card(tmp_path) == f"# {tmp_path.name}\n"


def test_what_does_not_fit_is_refused(model, images, judges):
    with pytest.raises(ValueError, match="4 held-out images and 50 samples are too few"):
        wb.evaluate_model(model, images.select(slice(4)), classifiers=judges, n=50, **OPTIONS)
    with pytest.raises(ValueError, match="there are 9 samples and n is 50"):
        wb.evaluate_model(model, images, classifiers=judges, n=50, samples=torch.zeros(9, 3, 32, 32), **OPTIONS)


def test_the_command_prints_the_numbers_and_writes_card_and_contact_sheet(tiny_folder, tmp_path, capsys):
    arguments = ["evaluate-model", str(tiny_folder), "--n", "8", "--steps", "2", "--classifiers", "avataaars-judge"]
    few = tmp_path / "few"
    few.mkdir()
    for i, image in enumerate(wb.load_images("avataaars", size=8)[:20]):
        Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(few / f"{i:02d}.png")
    options = ["--images", str(few), "--training", str(few), "--recipe", "--inverted", "1", "--card", str(tmp_path)]
    assert cli.main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "## Measured quality" in printed and "| `Smiling` | 49.0 |" in printed
    assert printed[: printed.index("DDIM inversion")] in (tmp_path / "README.md").read_text()
    assert {"README.md", "evaluation.json", "samples.png", "nearest.png"} <= {path.name for path in tmp_path.iterdir()}
