"""Images of any number of channels and any aspect ratio: read, trained on, edited, judged and drawn."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

import workbench as wb
from workbench import cli
from workbench.datasets import avataaars
from workbench.diffusion import training
from workbench.diffusion.images import array_to_tensor, check_images, picture_to_tensor
from workbench.diffusion.training import make_batch, read_log, read_settings
from workbench.evaluate import new_card
from workbench.shapes import shape_of, with_channels

NETWORK = {"size": (1, 16, 24), "timesteps": 50, "widths": (16, 16), "attention": (8,), "head_channels": 16}
GREY = {**NETWORK, "batch_size": 8, "learning_rate": 2e-3, "ema": 0.9, "precision": "float32"}
QUIET = {"previews": 0, "progress": False}


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_arrays(folder: Path, n: int = 6, channels: int = 4, kind=np.uint8) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        np.save(folder / f"{i}.npy", noise(i, channels, 20, 30).astype(kind))
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Grey pictures of 40 x 20 pixels in colour files, bright at the left where labelled `Left`, else at the right."""
    folder, rows = tmp_path_factory.mktemp("scans"), []
    for i in range(24):
        values = noise(i, 20, 40) // 4
        values[:, :20] += np.uint8(150 * (i % 2))
        values[:, 20:] += np.uint8(150 * (1 - i % 2))
        Image.fromarray(values).convert("RGB").save(folder / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{i % 2}")
    (folder / "attributes.csv").write_text("\n".join(["file,Left", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """Folder of a model of 50 timesteps for grey images of 16 x 24 pixels."""
    out = tmp_path_factory.mktemp("trained") / "grey"
    settings = wb.TrainingSettings(**GREY, steps=80)
    wb.train_model(wb.load_images(scans), settings, out=out, log_every=10, progress=False, previews=3)
    return out


@pytest.fixture(scope="module")
def grey(trained):
    return wb.load_model(trained, device="cpu")


# The form of an image


@pytest.mark.parametrize(
    "size, shape",
    [
        (8, (3, 8, 8)),
        ([8], (3, 8, 8)),
        ((16, 24), (3, 16, 24)),
        (torch.Size([1, 16, 24]), (1, 16, 24)),
        (np.int64(5), (3, 5, 5)),
    ],
)
def test_a_size_is_a_side_or_two_or_all_three_numbers(size, shape):
    assert shape_of(size) == shape
    assert all(type(each) is int for each in shape_of(size))


@pytest.mark.parametrize("size", [0, (8, -1), (0, 8, 8), (1, 2, 3, 4), (), 2.5, "64", (8, None)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size is ") as failure:
        shape_of(size)
    assert str(size) in str(failure.value)


def test_channels_are_the_first_three_or_grey_or_the_luminance():
    images = torch.rand(2, 5, 3, 4)
    assert with_channels(images, 5) is images
    assert torch.equal(with_channels(images, 3), images[:, :3])
    for few in (images[:, :1], images[:, :2]):
        assert torch.equal(with_channels(few, 3), images[:, :1].expand(-1, 3, -1, -1))
    colour = noise(0, 3, 6, 7)
    luminance = np.asarray(Image.fromarray(np.moveaxis(colour, 0, 2)).convert("L"))
    np.testing.assert_allclose(with_channels(colour.astype(float), 1)[0], luminance, atol=1)
    with pytest.raises(ValueError, match="have 5 channels, and 1 are wanted"):
        with_channels(images, 1)


# Pictures and arrays


def test_a_picture_becomes_grey_by_its_luminance_and_a_grey_one_stays_as_it_is(tmp_path):
    colour = Image.fromarray(noise(0, 16, 24, 3))
    clear = Image.fromarray(noise(1, 16, 24, 4), "RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    for image, shown in ((colour, colour), (clear, on_white)):
        expected = torch.from_numpy(np.asarray(shown.convert("L"), np.float32)) / 127.5 - 1
        assert torch.equal(picture_to_tensor(image, (1, 16, 24))[0], expected)
    values = noise(2, 16, 24)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "b.png")  # 16 bits
    images = wb.load_images(tmp_path, size=(1, 16, 24))
    expected = torch.from_numpy(values).float() / 127.5 - 1
    assert torch.equal(images[:], expected.expand(2, 1, 16, 24))
    assert repr(images).startswith("LabelledImages(2 images, 1x16x24")
    assert torch.equal(images.at_size((16, 24))[0], expected.expand(3, 16, 24))


def test_an_array_is_read_as_the_picture_of_the_same_values(tmp_path):
    values = noise(0, 30, 20, 3)
    for size in ((12, 18), (1, 10, 10), None):
        picture = picture_to_tensor(Image.fromarray(values), size)
        # Grey from an array is rounded after the resize, not before.
        torch.testing.assert_close(array_to_tensor(values, size), picture, atol=0.013, rtol=0)
    grey = picture_to_tensor(Image.fromarray(values[..., 0]), (1, 12, 18))
    for given in (values[..., 0], values[..., :1], np.moveaxis(values[..., :1], 2, 0)):
        assert torch.equal(array_to_tensor(given, (1, 12, 18)), grey)
        assert torch.equal(array_to_tensor(given, (12, 18)), grey.expand(3, -1, -1))


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_arrays_gives_their_channels_at_any_size(packed, tmp_path):
    folder = save_arrays(tmp_path / "bands")
    if packed:
        with zipfile.ZipFile(tmp_path / "bands.zip", "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
        folder = tmp_path / "bands.zip"
    images = wb.load_images(folder)
    assert images.image_shape == (4, 20, 30) and list(images.labels.index) == [f"{i}.npy" for i in range(6)]
    assert torch.equal(images[2], torch.from_numpy(noise(2, 4, 20, 30)).float() / 127.5 - 1)
    small = images.at_size((4, 10, 15))[1]
    for band, values in zip(small, noise(1, 4, 20, 30), strict=True):
        assert torch.equal(band, picture_to_tensor(Image.fromarray(values), (1, 10, 15))[0])
    assert images.fingerprint != images.at_size((4, 10, 15)).fingerprint


def test_channels_last_and_other_types_give_the_same_image(tmp_path):
    values = noise(0, 4, 20, 30)
    expected = array_to_tensor(values)
    floats = values / 127.5 - 1
    same = (np.moveaxis(values, 0, 2), floats, floats.astype(np.float32), values.astype(np.uint16) * 257)
    for given in same:
        torch.testing.assert_close(array_to_tensor(given), expected, atol=1e-6, rtol=0)
    np.save(tmp_path / "a.npy", values)
    for given in (tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()):
        assert torch.equal(wb.load_image(given, (4, 10, 15)), array_to_tensor(values, (4, 10, 15)))
    smaller = array_to_tensor(floats, (4, 10, 15))
    torch.testing.assert_close(smaller, array_to_tensor(values, (4, 10, 15)), atol=1 / 127.5, rtol=0)
    assert smaller.abs().max() <= 1


def test_arrays_beside_pictures_are_no_images(tmp_path):
    save_arrays(tmp_path / "both", n=1)
    Image.fromarray(noise(0, 20, 30, 3)).save(tmp_path / "both" / "0.png")
    assert list(wb.load_images(tmp_path / "both").labels.index) == ["0.png"]
    with pytest.raises(ValueError, match=r"0\.npy is a single image"):
        wb.load_images(tmp_path / "both" / "0.npy")


def test_what_does_not_fit_the_channels_is_refused_in_one_sentence(tmp_path):
    class Touched:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    content = io.BytesIO()
    np.save(content, np.array([Touched()], dtype=object), allow_pickle=True)
    four = noise(0, 4, 20, 30)
    for array, words in (
        (four.astype(np.int64), "int64 of shape"),
        (four[None], r"\(1, 4, 20, 30\)"),
        (four.astype(np.float32), "floats are not all in"),
        (np.full((4, 8, 8), np.nan), "floats are not all in"),
    ):
        np.save(tmp_path / "array.npy", array)
        with pytest.raises(ValueError, match=rf"array\.npy: .*{words}"):
            wb.load_image(tmp_path / "array.npy")
    np.save(tmp_path / "array.npy", four)
    with pytest.raises(ValueError, match=r"has 4 channels, not 3; give size=\(4, 16, 16\)"):
        wb.load_image(tmp_path / "array.npy", 16)
    with pytest.raises(ValueError, match="celeba64.*leave it out for arrays"):
        wb.load_images(tmp_path, crop="celeba64")[0]
    Image.fromarray(noise(0, 20, 30, 2), "LA").save(tmp_path / "pale.png")
    for channels in (2, 4):
        with pytest.raises(ValueError, match=rf"pale\.png: a picture has .* not {channels}; save .* \.npy"):
            wb.load_images(tmp_path, size=(channels, 20, 30))[:]
    with pytest.raises(ValueError, match="cannot be decoded"):
        wb.load_image(content.getvalue())
    assert not (tmp_path / "executed").exists()


# Models of them


def test_a_grey_model_that_is_not_square_samples_inverts_and_edits(grey, scans, cache):
    assert grey.image_shape == (1, 16, 24) and grey.schedule.T == 50
    images = wb.load_images(scans)
    run = wb.sample(grey, range(3), steps=5, record_h=True, progress=False)
    assert run.x0.shape == (3, 1, 16, 24)
    inverted = wb.invert(grey, images.select(slice(2)), steps=10, method="fixed-point", progress=False)
    back, two = wb.replay(inverted, progress=False).x0, check_images(images.select(slice(2)), grey)
    assert (back - two).square().mean() < 0.1 * (back - two.flip(0)).square().mean()
    store = wb.extract(grey, 6, steps=5, progress=False)
    grid = wb.edit_grid(grey, run, wb.find_pca(store, k=1)[0], scales=[-2, 0, 2], progress=False)
    assert torch.equal(grid.images[:, 1], run.x0) and not torch.equal(grid.images[:, 2], run.x0)
    of_images = wb.extract(grey, images=images, steps=5, record_x=True, progress=False)
    np.testing.assert_allclose(of_images.images[:], images.at_size((1, 16, 24))[:], atol=1e-6)
    boundary = wb.fit_boundary(of_images, images.labels["Left"], t=20, space="x")
    assert boundary.accuracy.value > 0.9  # left or right: what the pixels of x_t tell


def test_a_training_writes_its_shape_and_schedule_as_diffusers_reads_them(grey, trained):
    pipeline = DDPMPipeline.from_pretrained(trained)
    scheduler = pipeline.scheduler
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size) == (1, [16, 24])
    assert scheduler.config.num_train_timesteps == 50 and scheduler.config.beta_end == pytest.approx(0.4)
    np.testing.assert_allclose(grey.schedule.alpha_bars, scheduler.alphas_cumprod, rtol=1e-5)
    assert grey.schedule.alpha_bars[-1] < 1e-3, "the last timestep is noise, as with 1000"
    assert read_settings(trained) == wb.TrainingSettings(**GREY, steps=80)
    levels = [name for name in read_log(trained) if name.startswith("t ")]
    assert levels == ["t 0-1", "t 2-4", "t 5-9", "t 10-19", "t 20-29", "t 30-49"]
    with Image.open(trained / "samples" / "0000080.png") as sheet:
        assert sheet.size == (2 * 24, 2 * 16)
        assert "(1, 16, 24)" in new_card(trained) and "T = 50, linear beta 0.002..0.4" in new_card(trained)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_eps_whatever_is_predicted(prediction, tmp_path):
    """The network's own output, which diffusers' scheduler makes an x_0 of, and that is an eps; mirrored images too."""
    one = {"steps": 1, "learning_rate": 1e-12, "flips": True}
    settings = wb.TrainingSettings(**{**GREY, **one}, prediction=prediction)
    images = torch.from_numpy(noise(0, 8, 1, 16, 24)) / 127.5 - 1
    model = wb.train_model(images, settings, out=tmp_path / "model", **QUIET)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.scheduler.config.prediction_type == prediction
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    batch = make_batch(settings, 0, n=8, shape=(1, 16, 24))
    assert batch.flipped.any() and not batch.flipped.all()
    clean = [images[row].flip(-1) if flip else images[row] for row, flip in zip(batch.rows, batch.flipped, strict=True)]
    errors, weights = [], []
    for image, t, eps in zip(clean, batch.t.tolist(), torch.from_numpy(batch.noise), strict=True):
        x_t = scheduler.add_noise(image[None], eps[None], torch.tensor([t]))
        a = scheduler.alphas_cumprod[t]
        with torch.no_grad():
            output = pipeline.unet(x_t, t).sample
            x0 = scheduler.step(output, t, x_t).pred_original_sample
            found = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
            torch.testing.assert_close(model(x_t, t), found, atol=1e-3, rtol=1e-3)
        errors.append((found - eps).square().mean().item())
        weights.append(min(1.0, 5 * (1 - a) / a))
    row = read_log(tmp_path / "model").iloc[0]
    assert row["loss"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert row["weighted"] == pytest.approx(np.mean(np.multiply(errors, weights)), rel=1e-3)
    for name in filter(lambda name: name.startswith("t "), row.index):
        low, high = map(int, name.removeprefix("t ").split("-"))
        inside = [error for error, t in zip(errors, batch.t, strict=True) if low <= t <= high]
        assert row[name] == pytest.approx(np.mean(inside) if inside else np.nan, rel=1e-3, nan_ok=True)


def test_a_training_takes_over_shape_and_schedule_of_its_start(tmp_path, make_unet):
    settings = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200, "timestep_spacing": "trailing"}
    settings["prediction_type"] = "v_prediction"
    unet = make_unet(sample_size=(4, 8), in_channels=2, out_channels=2)
    DDPMPipeline(unet, DDPMScheduler(**settings)).save_pretrained(tmp_path / "start")
    start = wb.load_model(tmp_path / "start", device="cpu")
    for grow, shape in ((False, (2, 4, 8)), (True, (2, 8, 16))):
        images = torch.from_numpy(noise(0, 4, *shape)) / 127.5 - 1
        out = tmp_path / str(grow)
        begun = wb.TrainingSettings(start=str(tmp_path / "start"), grow=grow, steps=2, batch_size=2)
        model = wb.train_model(images, begun, out=out, log_every=1, **QUIET)
        assert model.image_shape == shape and model.prediction == "v_prediction"
        assert (read_settings(out).timesteps, read_settings(out).prediction) == (200, "v_prediction")
        assert model.schedule.timesteps(7) == start.schedule.timesteps(7)
        np.testing.assert_allclose(model.schedule.alpha_bars, start.schedule.alpha_bars, atol=1e-6)
        assert wb.train_model(images, out=out, resume=True, **QUIET).hash == model.hash
    with pytest.raises(ValueError, match=r"shape \(3, 4, 8\) and the model takes \(2, 4, 8\)"):
        begun = wb.TrainingSettings(start=str(tmp_path / "start"), steps=1)
        wb.train_model(torch.zeros(2, 3, 4, 8), begun, out=tmp_path / "other", **QUIET)
    DDPMPipeline(make_unet(num_class_embeds=2), DDPMScheduler()).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="classes is conditional"):
        begun = wb.TrainingSettings(start=str(tmp_path / "classes"), steps=1)
        wb.train_model(torch.zeros(2, 3, 8, 8), begun, out=tmp_path / "other", **QUIET)


def test_a_training_keeps_the_clean_end_of_its_start_and_few_timesteps(tmp_path, make_unet):
    begins = {"clean": DDIMScheduler(set_alpha_to_one=False), "few": DDPMScheduler(num_train_timesteps=20)}
    for name, scheduler in begins.items():
        make_unet().save_pretrained(tmp_path / name / "unet")
        scheduler.save_pretrained(tmp_path / name / "scheduler")
        start = wb.load_model(tmp_path / name, device="cpu")
        settings = wb.TrainingSettings(start=str(tmp_path / name), steps=1, batch_size=2)
        model = wb.train_model(np.zeros((4, 3, 8, 8)), settings, out=tmp_path / f"{name}-trained", **QUIET)
        assert (model.schedule.T, model.schedule.clean) == (start.schedule.T, start.schedule.clean)
        assert name != "clean" or model.schedule.clean < 1


def test_a_schedule_that_ends_without_signal_is_trained_on_too(tmp_path, make_unet):
    """Zero terminal SNR (Lin et al. 2024): the last timestep has no weight, and no NaN."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path / "start")
    settings = wb.TrainingSettings(start=str(tmp_path / "start"), steps=3, batch_size=4, seed=3)
    model = wb.train_model(torch.rand(4, 3, 8, 8) * 2 - 1, settings, out=tmp_path / "model", **QUIET)
    assert model.schedule.alpha_bars[-1] < 1e-6 and np.isfinite(read_log(tmp_path / "model")["loss"]).all()
    assert training.min_snr_weights(torch.tensor([0.0, 0.5]), np.inf).tolist() == [1, 1]


def test_images_of_other_channels_than_the_model_are_refused(grey, tmp_path):
    arrays = wb.load_images(save_arrays(tmp_path / "bands"))
    for call in (
        lambda: wb.invert(grey, arrays, steps=3, progress=False),
        lambda: wb.extract(grey, images=arrays, steps=3, out=tmp_path / "store", progress=False),
        lambda: wb.train_model(arrays, wb.TrainingSettings(**GREY), out=tmp_path / "model", **QUIET),
    ):
        with pytest.raises(ValueError, match=r"0\.npy: it has 4 channels, not 1; give size=\(4, 16, 24\)"):
            call()
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 24\); grey takes \(n, 1, 16, 24\)"):
        wb.invert(grey, torch.zeros(2, 3, 16, 24), steps=3, progress=False)


def test_four_channels_are_trained_on_and_shown(tmp_path):
    arrays = wb.load_images(save_arrays(tmp_path / "bands"))
    settings = wb.TrainingSettings(**{**GREY, "size": (4, 16, 24)}, steps=2)
    model = wb.train_model(arrays, settings, out=tmp_path / "model", progress=False, previews=2)
    run = wb.sample(model, range(2), steps=3, progress=False)
    assert run.x0.shape == (2, 4, 16, 24)
    assert np.array_equal(wb.plots.to_pixels(run.x0), wb.plots.to_pixels(run.x0[:, :3]))
    assert wb.invert(model, arrays.select([0]), steps=3, progress=False).x_T.shape == (1, 4, 16, 24)


# Classifiers


@pytest.mark.parametrize("size, channels, stretched", [(None, 3, False), ((1, 16, 24), 1, True), ((16, 32), 3, True)])
def test_a_classifier_is_trained_on_the_shape_that_was_asked_for(size, channels, stretched, scans, tmp_path):
    """`Left` is seen in every shape; the centre square of a picture twice as wide as high has it too."""
    images = wb.load_images(scans, size=size)
    classifier = wb.train_classifier(images, out=tmp_path / "mine", steps=40, progress=False)
    network = json.loads((tmp_path / "mine" / "config.json").read_text())["network"]
    assert network["channels"] == channels
    truth = images.labels["Left"].to_numpy()
    shown = wb.load_images(scans, size=(1, 16, 24) if stretched else (1, 16, 16))[:]
    assert ((classifier(shown)["Left"].to_numpy() > 0.5) == truth).mean() > 0.9
    # Colours and grey of the same pictures are the same to it.
    both = [classifier(with_channels(shown, 3)), classifier(with_channels(with_channels(shown, 3), 1))]
    np.testing.assert_allclose(*both, atol=1e-4)


def test_classifiers_see_the_first_three_of_more_channels_and_a_function_sees_all():
    judge = wb.load_classifier("avataaars-judge", device="cpu")
    bands = torch.rand(3, 5, 16, 24) * 2 - 1
    pd.testing.assert_frame_equal(judge(bands), judge(bands[:, :3]))
    pd.testing.assert_frame_equal(judge(bands[:, :1]), judge(bands[:, :1].expand(-1, 3, -1, -1)))
    last = wb.load_classifier(lambda images: (images[:, 4].mean(dim=(1, 2)) > 0).float()[:, None], attributes=["last"])
    assert (last(bands)["last"] > 0.5).tolist() == (bands[:, 4].mean(dim=(1, 2)) > 0).tolist()


# Pictures of them


@pytest.mark.parametrize("height, width", [(4, 4), (4, 12), (12, 4)])
def test_pictures_keep_their_aspect_ratio(height, width):
    images = np.zeros((6, 1, height, width), np.float32)
    axes = wb.plots.image_grid(images, columns=3).axes[0]
    ratios = [image.get_window_extent() for image in axes.get_images()]
    assert all(box.width / box.height == pytest.approx(width / height, rel=0.02) for box in ratios)
    points = np.random.default_rng(0).normal(size=(6, 2)) * [1.0, 5.0]
    figure = wb.plots.scatter(points, images=images, xlabel="x", ylabel="y")
    figure.draw_without_rendering()
    boxes = [image.get_window_extent() for image in figure.axes[0].get_images()]
    assert boxes and all(box.width / box.height == pytest.approx(width / height, rel=0.05) for box in boxes)


def test_regions_of_the_bundled_domain_are_cropped_as_its_images_are():
    whole = avataaars.region_mask("mouth", size=64)
    assert np.array_equal(avataaars.region_mask("mouth", size=(1, 32, 64)), whole[16:48])
    assert (avataaars.region_mask("mouth", size=(64, 48)) != whole[:, 8:56]).mean() < 0.01  # half a pixel is cut
    masks = wb.domain_of("avataaars").masks(["Smiling"], (1, 16, 24))
    assert masks["Smiling"].shape == (16, 24)


# The commands


def test_the_commands_train_and_use_a_grey_model(scans, tmp_path, capsys, cache):
    out, judge = tmp_path / "model", tmp_path / "judge"
    network = "--size 1 16 24 --timesteps 50 --widths 16 16 --attention 8 --head-channels 16 --steps 2"

    def run(words: str) -> int:
        return cli.main(words.split())

    assert run(f"train {scans} --out {out} {network}") == 0
    assert read_settings(out) == wb.TrainingSettings(**NETWORK, steps=2)
    assert run(f"sample {out} --seeds 0-1 --steps 3 --out {tmp_path}/s.png") == 0
    assert run(f"train-classifier {scans} --out {judge} --steps 3 --size 1 16 24") == 0
    images = f"--images {scans} --training {scans} --classifiers {judge}"
    assert run(f"evaluate-model {out} {images} --n 8 --steps 3 --inverted 2") == 0
    assert "Measured quality" in capsys.readouterr().out
    assert run(f"train {scans} --out {tmp_path}/none --steps 1 --attention 8 --size 2 16 24") == 2
    assert "not 2; save" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
