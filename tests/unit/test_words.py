"""Directions and boundaries from sentences, with generators and scores whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small_models import stable_diffusion

import workbench as wb
from workbench.diffusion.loading import load_pipeline
from workbench.directions.words import boundary_from_text, find_from_text, generator_of, mixing_timestep

QUIET = {"progress": False}
TEXTS = [f"a {name} square" for name in ("red", "green", "blue", "white")]


def bright(prompt: str, n: int, seed: int) -> torch.Tensor:
    """Images of noise, 16 x 16 pixels: bright ones of "day", dark ones of other words."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.5 if "day" in prompt else -0.5
    return (level + 0.2 * torch.randn(n, 3, 16, 16, generator=generator)).clamp(-1, 1)


def test_a_boundary_separates_what_the_generator_makes_of_two_prompts(tiny):
    found = boundary_from_text("the day", source="the night", model=tiny, generator=bright, n=12, steps=4, **QUIET)
    assert set(found) == {"x", "h"} and found["x"].t == mixing_timestep(tiny)
    images = torch.nn.functional.interpolate(bright("day", 8, 99), size=(8, 8), mode="bicubic", antialias=True)
    run = wb.invert(tiny, torch.cat([images, -images]), steps=[found["x"].t, 300, 0], record_x=True, **QUIET)
    distances = found["x"].distance(run.x_at(found["x"].t))
    assert (np.asarray(distances[:8]) > 0).all() and (np.asarray(distances[8:]) < 0).all()
    assert found["x"].accuracy.value > 0.9
    about = found["h"].provenance["parameters"]
    assert (about["text"], about["source"], about["generator"]) == ("the day", "the night", "bright")
    edited = wb.render(run, wb.Cross(h=found["h"], x=found["x"], seed=0), [-2.0, 2.0]).images
    assert edited[:, 1].mean() > edited[:, 0].mean()


def test_the_inversion_takes_a_number_of_steps_or_the_timesteps(tiny):
    options = {"source": "night", "model": tiny, "generator": bright, "n": 4, "t": 400, **QUIET}
    given, counted = (boundary_from_text("day", steps=steps, **options)["x"] for steps in ([400, 200, 0], 3))
    assert torch.equal(given.normal, counted.normal) and given.intercept == counted.intercept
    uneven = boundary_from_text("day", steps=(400, 390, 100), **options)["x"]
    assert uneven.provenance["timesteps"] == [400, 390, 100]
    assert not torch.equal(uneven.normal, given.normal)
    for steps, words in (([300, 0], "300; begin at t = 400"), (402, "402"), (0, "steps is 0")):
        with pytest.raises(ValueError, match=words):
            boundary_from_text("day", steps=steps, **options)


def test_the_two_prompts_have_seeds_of_their_own(tiny):
    asked = []

    def make(prompt, n, seed):
        asked.append((prompt, seed))
        return bright(prompt, n, seed)

    boundary_from_text("day", source="night", model=tiny, generator=make, n=4, seed=3, steps=3, **QUIET)
    assert asked == [("day", 6), ("night", 7)]


def test_a_text_to_image_model_is_a_generator(tmp_path):
    stable_diffusion(tmp_path)
    images = generator_of(tmp_path / "model", steps=2, guidance_scale=2.0, progress=False)("a cafe", 2, 6)
    model = wb.load_model(tmp_path / "model", device="cpu", prompt="a cafe", guidance_scale=2.0)
    assert torch.equal(images, wb.sample(model, [6, 8], steps=2, progress=False).images)


def test_any_other_pipeline_of_diffusers_is_a_generator(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    images = load_pipeline(tmp_path / "model", steps=2, guidance_scale=2.0, device="cpu")("a cafe", 2, 5)
    noise = torch.Generator().manual_seed(7)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt", "generator": noise}
    torch.testing.assert_close(images[1:], 2 * pipeline("a cafe", **options).images - 1)
    with pytest.raises(ValueError, match="nowhere"):
        load_pipeline(tmp_path / "nowhere", steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return wb.extract(tiny, 24, steps=3, out=tmp_path_factory.mktemp("words") / "store.zarr", **QUIET)


def test_a_direction_of_words_is_that_of_clips_scores(squares, store):
    clip = wb.load_clip(squares[1], device="cpu")
    found = find_from_text(store, "a red square", against="a blue square", clip=clip, k=5, **QUIET)
    images = store.images[:]
    texts = clip.texts(["a red square", "a blue square"])
    scores = (clip.images(images) @ (texts[0] - texts[1])).astype(float)
    expected = wb.find_from_scores(store, scores, k=5, name="red", **QUIET)
    torch.testing.assert_close(found.unit, expected.unit)
    about = found.provenance["parameters"]
    assert found.provenance["method"] == "text" and about["clip"] == clip.hash
    assert about["fitting"] == int((scores > 0).sum())
    with pytest.warns(UserWarning, match="a red square was found from"):
        found.calibrated(store, **QUIET)


@pytest.mark.parametrize(
    ("text", "against", "words"),
    [
        ("", "a", "''"),
        ("a red square", " A red square ", "itself"),
        ("zebra", "a square", "zebra"),
        (None, "a", "None"),
    ],
)
def test_texts_that_say_nothing_are_refused(squares, store, text, against, words):
    with pytest.raises(ValueError, match=words):
        find_from_text(store, text, against=against, clip=squares[1], **QUIET)


def test_a_text_that_no_sample_fits_is_refused(squares, store):
    clip = wb.load_clip(squares[1], device="cpu")
    scores = clip.scores(store.images[:], TEXTS)
    counts = [(int((scores[:, i] > scores[:, j]).sum()), i, j) for i, j in itertools.permutations(range(4), 2)]
    fewest, i, j = min(counts)
    text, against = TEXTS[i], TEXTS[j]
    assert fewest < 2
    with pytest.raises(ValueError, match=f"{fewest} of 24 samples fit '{text}'"):
        find_from_text(store, text, against=against, clip=clip, **QUIET)


def test_a_model_without_a_text_encoder_is_no_generator(tiny):
    with pytest.raises(ValueError, match="tiny"):
        boundary_from_text("day", source="night", model=tiny, generator=tiny, **QUIET)
    with pytest.raises(ValueError, match="n is 2"):
        boundary_from_text("day", source="night", model=tiny, generator=bright, n=2, **QUIET)
