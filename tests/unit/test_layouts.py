"""Checkpoints of other code bases: the converted network computes what the original did, and files are understood."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from originals import DDPM, Guided, randomised
from safetensors.torch import save_file

import workbench as wb
from workbench.diffusion import loading
from workbench.diffusion.loading import verify
from workbench.formats import golden, layouts
from workbench.formats.checkpoints import read_checkpoint

DDPMS = {
    "two levels": {"size": 8, "mult": (1, 2), "layers": 1, "attention": (4,)},
    "attention at two levels": {"size": 16, "mult": (1, 1, 2), "layers": 2, "attention": (8, 4)},
    "attention in the middle alone": {"size": 8, "mult": (1, 2), "layers": 1, "attention": ()},
}
PLAIN = {"out": 3, "scale_shift": False, "updown": False}
GUIDED = {
    "P2's kind": {"mult": (1, 1, 2), "layers": 1, "attention": (2,), "head_channels": 16},
    "new attention order": {"mult": (1, 2), "layers": 1, "attention": (1, 2), "head_channels": 16, "new_order": True},
    "ADM's kind": {"mult": (1, 1, 2), "layers": 2, "attention": (1, 2, 4), "head_channels": 16},
    "improved-diffusion's": {"mult": (1, 2, 2), "layers": 2, "attention": (2, 4), "head_channels": 32, "updown": False},
    "no scale and shift": {"mult": (1, 2), "layers": 1, "attention": (2,), "head_channels": 64, **PLAIN},
}
SIZES = {"image_size": 16, "head_channels": 16}
"""What the shapes of P2's kind don't tell."""

# Of files that don't tell their timesteps, which most here are; what is said of them has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not tell how many timesteps")


def save(content, path):
    torch.save(content, path)
    return path


def images(size: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_same(model, original, size: int) -> None:
    x_t, t = images(size), torch.tensor([3, 740])
    eps, h = original(x_t, t)
    # The promise is 1e-4; these values are of the order of 1.
    torch.testing.assert_close(model(x_t, t), eps[:, :3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.encode(x_t, t).h, h, atol=1e-4, rtol=1e-4)
    assert model.h_shape == tuple(h.shape[1:])
    if eps.shape[1] == 6:
        labels = model.condition and model.condition.values.expand(2)
        torch.testing.assert_close(model.unet.unet(x_t, t, labels).sample, eps, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def ddpm():
    return randomised(DDPM(ch=32, **DDPMS["two levels"]))


@pytest.fixture(scope="module")
def guided():
    return randomised(Guided(ch=32, **GUIDED["P2's kind"]))


@pytest.fixture
def ddpm_file(ddpm, tmp_path):
    return save(ddpm.state_dict(), tmp_path / "faces.ckpt")


def refused(words, source, kind=ValueError, **options):
    with pytest.raises(kind, match=words):
        wb.load_model(source, **options)


@pytest.fixture
def guided_file(guided, tmp_path):
    return save(guided.state_dict(), tmp_path / "dogs.pt")


DDPM_SHAPE = layouts.Architecture("ddpm", 8, (32, 64), 1, (1,))


@pytest.fixture
def small_presets(monkeypatch):
    """Presets of the small networks, in place of the published ones."""
    learned = {"out_channels": 6, "scale_shift": True, "residual_resampling": True}
    guided = layouts.Architecture("guided", 16, (32, 32, 64), 1, (1,), head_channels=16, **learned)
    presets = {
        "faces": layouts.Preset(DDPM_SHAPE, "faces", ("faces.ckpt",)),
        "dogs": layouts.Preset(guided, "dogs", ("dogs.pt",), layouts.COSINE),
        "other dogs": layouts.Preset(replace(guided, channels=(32, 64, 64)), "other dogs"),
    }
    monkeypatch.setattr(layouts, "PRESETS", presets)


# What the networks compute


@pytest.mark.parametrize("kind", [*DDPMS, *GUIDED])
def test_an_original_network_computes_the_same_after_conversion(kind, tmp_path):
    if kind in DDPMS:
        original, options = DDPM(ch=32, **DDPMS[kind]), {"image_size": DDPMS[kind]["size"]}
    else:
        original, options = Guided(ch=32, **GUIDED[kind]), {"head_channels": GUIDED[kind]["head_channels"]}
        options |= {"image_size": 16, "attention_order": "new" if GUIDED[kind].get("new_order") else "legacy"}
    path = save(randomised(original).state_dict(), tmp_path / "original.ckpt")
    check_same(wb.load_model(path, **options, device="cpu"), original, options["image_size"])


def test_a_class_conditional_network_computes_the_same_after_conversion(tmp_path):
    original = randomised(Guided(ch=32, classes=7, **GUIDED["P2's kind"]))
    path = save(original.state_dict(), tmp_path / "classes.pt")
    for label in (0, 6):
        # The oracle takes a label for each image.
        of_label = partial(original, y=torch.tensor([label, label]))
        model = wb.load_model(path, **SIZES, label=label, device="cpu")
        check_same(model, of_label, 16)
    assert (model.conditioned(label=0)(images(16), 500) - model(images(16), 500)).abs().max() > 1e-2
    refused("label 7 .*0 to 6", path, **SIZES, label=7, device="cpu")


HEADS = {"mult": (1, 2, 3), "layers": 1, "attention": (2, 4), "heads": 4, "updown": False}


@pytest.mark.parametrize("order", layouts.ORDERS)
def test_heads_by_their_number_compute_the_same_after_conversion(order, tmp_path):
    original = randomised(Guided(ch=32, new_order=order == "new", **HEADS))
    path = save(original.state_dict(), tmp_path / "original.pt")
    model = wb.load_model(path, image_size=16, heads=4, attention_order=order, device="cpu")
    check_same(model, original, 16)
    folder = wb.convert_checkpoint(path, tmp_path / "folder", image_size=16, heads=4, attention_order=order)
    loaded = wb.load_model(folder, device="cpu")
    assert torch.equal(loaded(images(16), 500), model(images(16), 500))
    # diffusers' own class would take it for another network.
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "MultiheadUNet2DModel"
    # The channels of a head do not say the same where the widths differ.
    other = wb.load_model(path, image_size=16, head_channels=16, attention_order=order, device="cpu")
    assert (other(images(16), 500) - model(images(16), 500)).abs().max() > 1e-2


def test_the_wrong_order_of_attention_or_size_of_heads_gives_another_network(guided, guided_file):
    """Neither shows in a shape, so they must be right; the test of the right ones could not fail otherwise."""
    x_t, t = images(16), torch.tensor([3, 740])
    eps = guided(x_t, t)[0][:, :3]
    for wrong in ({"head_channels": 16, "attention_order": "new"}, {"head_channels": 32}):
        model = wb.load_model(guided_file, image_size=16, device="cpu", **wrong)
        assert (model(x_t, t) - eps).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("preset", "h", "millions"),
    [
        ("celeba_hq", (512, 8, 8), 113.67),
        ("cifar10", (256, 4, 4), 35.75),
        ("celeba64", (512, 4, 4), 78.70),
        ("afhq_dog", (512, 8, 8), 93.56),
        ("adm_lsun", (1024, 8, 8), 552.81),
        ("improved_cifar10", (256, 4, 4), 52.55),
        ("improved_imagenet_64_classes", (768, 8, 8), 273.05),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in (
                ("improved_imagenet_64", (512, 8, 8), 121.06),
                ("improved_lsun", (512, 8, 8), 113.68),
                ("adm_imagenet_64", (768, 8, 8), 295.90),
                ("adm_imagenet_128", (1024, 8, 8), 421.53),
                ("adm_imagenet_256", (1024, 8, 8), 553.84),
            )
        ),
    ],
)
def test_the_published_architectures_have_their_published_sizes(preset, h, millions):
    architecture, split = layouts.PRESETS[preset].architecture, loading.load_shapes(preset).blank()
    model = wb.Model("meta", split, wb.NoiseSchedule.linear(), "")
    x_t = torch.empty(1, *model.image_shape, device="meta")
    assert architecture.h_shape == model.h_shape == tuple(model.encode(x_t, 0).h.shape[1:]) == h
    assert model.parameters / 1e6 == pytest.approx(millions, abs=0.01)


def test_conversion_is_the_same_network_from_file_and_from_folder(guided_file, tmp_path):
    direct = wb.load_model(guided_file, device="cpu", **SIZES, schedule="cosine")
    folder = wb.convert_checkpoint(guided_file, tmp_path / "dogs", **SIZES, schedule="cosine")
    loaded = wb.load_model(folder, device="cpu")
    assert loaded.hash == direct.hash
    assert loaded.schedule.provenance() == direct.schedule.provenance()
    assert torch.equal(loaded(images(16), 500), direct(images(16), 500))
    assert not list(folder.rglob("*.bin"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dogs", "dogs.pt"]
    assert DDPMPipeline.from_pretrained(folder).scheduler.config.variance_type == "learned_range"


# Schedules


def test_schedules_are_the_presets_or_the_one_that_is_asked_for(guided_file, small_presets):
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double().numpy()
    linear = wb.NoiseSchedule.linear().alpha_bars
    asked = {"schedule": "linear"}
    for options, expected in (({}, cosine), (asked, linear), ({**SIZES, **asked}, linear)):
        found = wb.load_model(guided_file, **options, device="cpu").schedule.alpha_bars
        assert found == pytest.approx(expected, rel=1e-4)
    refused("'quadratic'.*one of linear, cosine", guided_file, schedule="quadratic")
    refused(r"noise schedule, and dogs.*preset='dogs', or schedule=", guided_file, **SIZES, device="cpu")


def test_a_network_that_counts_4000_timesteps_keeps_the_noise_levels_of_every_fourth():
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=4000).betas.double()
    expected = torch.cumprod(1 - betas, 0)[::4]
    settings = layouts.noise_schedule("cosine", 4000, rescaled=True)
    kept = torch.cumprod(1 - torch.tensor(settings["trained_betas"], dtype=torch.float64), 0)
    # At the noisy end alpha_bar is 1e-7 and float32 betas leave a few digits of it.
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-7)
    assert DDPMScheduler(**layouts.PRESETS["improved_cifar10"].schedule).config.num_train_timesteps == 1000


def test_timesteps_that_a_network_was_trained_on_can_be_said_and_are_kept(guided_file, tmp_path):
    plain = wb.load_model(guided_file, **SIZES, timesteps=4000).schedule
    told = wb.load_model(guided_file, **SIZES, timesteps=4000, rescale_timesteps=True).schedule
    # guided-diffusion scales the linear betas by 1000 / T.
    betas = torch.linspace(1e-4 / 4, 0.02 / 4, 4000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, 0).numpy()
    assert (plain.T, told.T) == (4000, 1000)
    assert plain.alpha_bars == pytest.approx(expected, rel=1e-3)
    assert told.alpha_bars == pytest.approx(expected[::4], rel=1e-3)
    folder = wb.convert_checkpoint(guided_file, tmp_path / "dogs", **SIZES, timesteps=4000)
    assert wb.load_model(folder, device="cpu").schedule.provenance() == plain.provenance()


def test_a_file_that_does_not_tell_its_timesteps_is_assumed_to_have_1000_and_says_so(guided, guided_file, tmp_path):
    for schedule in (None, "cosine"):
        with pytest.warns(UserWarning, match="does not tell how many timesteps.*1000 are assumed.*timesteps="):
            assert wb.load_model(guided_file, **SIZES, schedule=schedule).schedule.T == 1000
    betas = torch.linspace(1e-3, 0.1, 200)
    inside = {f"model.{name}": tensor for name, tensor in guided.state_dict().items()}
    own = save({"state_dict": {**inside, "betas": betas}}, tmp_path / "own.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.load_model(guided_file, **SIZES, timesteps=1000)
        schedule = wb.load_model(own, **SIZES).schedule
    assert schedule.alpha_bars == pytest.approx(torch.cumprod(1 - betas.double(), 0).numpy(), rel=1e-4)


# How files are wrapped


def wrapped(state: dict, other: dict) -> dict:
    """Files that hold `state`; `other` is what must not be taken."""

    def named(prefix: str, weights: dict) -> dict:
        return {prefix + name: tensor for name, tensor in weights.items()}

    without_dots = {"model_ema." + name.replace(".", ""): tensor for name, tensor in state.items()}
    return {
        "DataParallel": named("module.", state),
        "model and ema": {"model": other, "ema": state, "step": 3, "optimizer": {"state": {}}},
        "ema-pytorch": {
            "model": other,
            "ema": {**named("online_model.", other), **named("ema_model.", state), "step": torch.tensor(3)},
            "step": 3,
        },
        "ema beside the model, by prefix": {**named("model.", other), **named("ema.module.", state)},
        "DDIM's list": [named("module.", other), {"state": {}}, 7, 100, state],
        "Lightning's average": {
            "state_dict": {
                **named("model.", other),
                **without_dots,
                "model_ema.decay": torch.tensor(0.999),
                "model_ema.num_updates": torch.tensor(5),
                "betas": torch.zeros(4),
            },
            "pytorch-lightning_version": "1.4",
        },
    }


KINDS = [*wrapped({}, {})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_prefixes_and_wrappers_are_taken_off_and_the_average_is_preferred(kind, ddpm, tmp_path):
    other = {name: torch.zeros_like(tensor) for name, tensor in ddpm.state_dict().items()}
    path = save(wrapped(ddpm.state_dict(), other)[kind], tmp_path / "wrapped.ckpt")
    found = read_checkpoint(path)
    assert found.layout == "ddpm"
    assert found.state.keys() == ddpm.state_dict().keys()
    assert all(torch.equal(tensor, found.state[name]) for name, tensor in ddpm.state_dict().items())


def test_a_training_without_an_average_loads_and_says_so(ddpm, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in ddpm.state_dict().items()}
    lightning = {"state_dict": state, "pytorch-lightning_version": "1.4", "epoch": 3, "optimizer_states": []}
    path = save(lightning, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt has no moving average \(EMA\)"):
        check_same(wb.load_model(path, image_size=8, device="cpu"), ddpm, 8)


def test_a_safetensors_file_of_the_originals_layout_loads(ddpm, tmp_path):
    save_file(ddpm.state_dict(), tmp_path / "faces.safetensors")
    check_same(wb.load_model(tmp_path / "faces.safetensors", image_size=8, device="cpu"), ddpm, 8)
    renamed = save(ddpm.state_dict(), tmp_path / "renamed.safetensors")
    check_same(wb.load_model(renamed, image_size=8, device="cpu"), ddpm, 8)


# Presets


def test_a_preset_says_all_and_a_published_file_name_is_one(ddpm, ddpm_file, guided, guided_file, small_presets):
    check_same(wb.load_model(ddpm_file, device="cpu"), ddpm, 8)
    check_same(wb.load_model(guided_file, device="cpu"), guided, 16)
    renamed = ddpm_file.rename(ddpm_file.with_name("mine.ckpt"))
    check_same(wb.load_model(renamed, preset="faces", device="cpu"), ddpm, 8)


def test_a_wrong_preset_is_named_with_weights_that_do_not_fit(guided_file, ddpm_file, small_presets):
    refused("dogs.pt .*'other dogs': .*conv_shortcut", guided_file, preset="other dogs")
    refused("layout 'ddpm', those of the preset 'dogs' in 'guided'", ddpm_file, preset="dogs")
    refused("a preset sets image_size", ddpm_file, preset="faces", image_size=8)


# What the shapes don't tell
def test_what_the_shapes_do_not_tell_is_asked_for_with_presets_that_fit(guided_file, ddpm_file, small_presets):
    dogs, faces = (path.rename(path.with_name(f"my-{path.name}")) for path in (guided_file, ddpm_file))
    refused(r"tell image_size and head_channels; .*head_channels=64 or heads=4.*preset='dogs'", dogs)
    refused(r"tell image_size; give them \(such as image_size=256\), or .*'faces'", faces)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 18}, "sample_size is 18; .*multiples of 4"),
        ({"head_channels": 24}, "head_channels is 24; .*32 and 64 channels"),
        ({"head_channels": None, "heads": 5}, "heads is 5; .*32 and 64 channels"),
        ({"heads": 4}, "heads is 4 and head_channels is 16; give one"),
        ({"attention_order": "old"}, "'old'"),
        ({"timesteps": 1}, "timesteps is 1"),
        ({"timesteps": 20}, "timesteps is 20; give 21"),
        ({"timesteps": 1500, "rescale_timesteps": True}, "timesteps is 1500; give a multiple of 1000"),
        ({"rescale_timesteps": True}, "rescale_timesteps"),
    ],
)
def test_settings_that_can_not_be_are_refused(wrong, message, guided_file):
    refused(message, guided_file, **{**SIZES, **wrong})


def test_settings_of_a_file_are_refused_for_a_folder(tiny_folder):
    for name, value in {**SIZES, "attention_order": "new", "preset": "ffhq", "timesteps": 4000}.items():
        refused(f"{name} is for single files", tiny_folder, **{name: value})


# Files that don't load


def changed(change):
    """The change, of a state dict's pairs of names and weights."""
    return lambda state: {name: weight for name, weight in state.items() if not change(name)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("down.1.block.0.conv2.weight".__eq__), "changed.ckpt .*down_blocks.1.resnets.0.conv2.weight"),
        (changed("mid.attn_1.q.weight".__eq__), "mid_block.attentions.0.to_q.weight"),
        (changed(lambda name: "sample.conv" in name), "resamples without convolutions"),
        (lambda s: {**s, "mid.block_3.conv1.weight": torch.zeros(2, 2)}, "Unexpected key.*mid.block_3.conv1.weight"),
        (lambda s: {**s, "conv_out.bias": torch.full((3,), float("nan"))}, "3 of 3 values of conv_out.bias"),
    ],
)
def test_a_file_that_is_not_the_network_of_its_shapes_is_refused(change, words, ddpm, tmp_path):
    refused(words, save(change(ddpm.state_dict()), tmp_path / "changed.ckpt"), image_size=8)


TIME = "model.diffusion_model.time_embed.0.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (dict.fromkeys((TIME, "first_stage_model.encoder.conv_in.weight")), "is a whole latent"),
        ({"time_embedding.linear_1.weight": None}, "is a single file; give a diffusers model folder"),
        ({"weight": None}, "holds no network .*temb.dense.0"),
        (torch.zeros(2), "holds no network"),
    ],
)
def test_a_file_of_something_else_says_what_is_supported(content, words, tmp_path):
    if isinstance(content, dict):
        content = {name: torch.zeros(2, 2) if value is None else value for name, value in content.items()}
    refused(f"other.ckpt {words}", save(content, tmp_path / "other.ckpt"))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html>\n<html><head>", r"begins with b'<!DOCTYPE html>\\n<html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "begins with b'version https://git-lfs"),
        (b'{"error": "Repository not found"}', "Repository not found"),
        (b"Missing credentials", "Missing credentials"),  # which begins as a pickle might
        (b"", "begins with b''"),
        (pickle.dumps({"a": 1 + 2j}), "can't be read as weights"),
        (bytes(range(256)), "can't be read as weights"),
    ],
)
def test_what_came_in_place_of_weights_is_shown_and_nothing_unsafe_is_advised(content, words, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        wb.load_model(path, image_size=8)
    assert path.name in str(refused.value) and "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)


def test_convert_writes_nothing_where_it_fails_and_overwrites_nothing(ddpm_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="image_size"):
        wb.convert_checkpoint(ddpm_file, out)
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        wb.convert_checkpoint(tmp_path / "none.ckpt", out)
    assert [p.name for p in tmp_path.iterdir()] == ["faces.ckpt"]
    out.mkdir()
    with pytest.raises(FileExistsError, match="out exists already"):
        wb.convert_checkpoint(ddpm_file, out, image_size=8)


# Reference values


def test_the_noise_of_the_reference_values_is_made_again():
    """At t = 10 a network takes nearly all of the noise for noise: its eps must follow the image that it was given."""
    for name, values in golden.EPS.items():
        size = layouts.HUB[name].image_size
        noise = golden.noise((3, size, size))[0, 0, 0, : golden.COUNT]
        assert len(values) == golden.COUNT
        assert torch.corrcoef(torch.stack([noise, torch.tensor(values)]))[0, 1] > 0.85, name


def test_verify_compares_eps_at_the_reference_timestep(ddpm_file, ddpm, monkeypatch):
    model = wb.load_model(ddpm_file, image_size=8, device="cpu")
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = ddpm(noise, torch.tensor([10]))[0][0, 0, 0, :8].tolist()
    monkeypatch.setattr(golden, "COUNT", 8)
    monkeypatch.setattr(golden, "EPS", {"a/ddpm": values, "another/ddpm": [v + 0.1 for v in values]})
    monkeypatch.setattr(layouts, "HUB", dict.fromkeys(golden.EPS, DDPM_SHAPE))
    assert verify(model, "a/ddpm") < 1e-4
    assert verify(model, "another/ddpm") == pytest.approx(0.1, abs=1e-4)
    with pytest.raises(ValueError, match="no reference values for 'mine'; there are for a/ddpm, another/ddpm"):
        verify(model, "mine")


# Large models


def test_a_model_that_will_not_fit_is_announced_before_it_is_read(ddpm_file, tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    for source, options in ((ddpm_file, {"image_size": 8}), (tiny_folder, {})):
        with pytest.warns(UserWarning, match=r"is estimated to need .* GiB .* 0.0 GiB are free on cpu"):
            wb.load_model(source, device="cpu", **options)
    (tiny_folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="is estimated"), pytest.raises(ValueError, match="can't be read"):
        wb.load_model(tiny_folder, device="cpu")


@pytest.mark.slow
def test_the_full_size_network_of_256_pixels_computes_the_same(tmp_path):
    """113.7 M random weights, one pass of the original and one of the converted network."""
    original = randomised(DDPM(size=256, ch=128, mult=(1, 1, 2, 2, 4, 4), layers=2, attention=(16,)))
    path = save(original.state_dict(), tmp_path / "celeba_hq.ckpt")
    x_t, t = images(256, 1), torch.tensor([10])
    eps, h = original(x_t, t)
    del original
    model = wb.load_model(wb.convert_checkpoint(path, tmp_path / "celeba_hq"), device="cpu")
    bottleneck = model.encode(x_t, t)
    assert tuple(h.shape[1:]) == model.h_shape == (512, 8, 8)
    torch.testing.assert_close(bottleneck.h, h, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(bottleneck), eps, atol=1e-4, rtol=1e-4)


class Settings:
    """Stands for what trainings pickle beside their weights."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_objects_beside_the_weights_are_named_and_not_made(ddpm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save({"state_dict": ddpm.state_dict(), "hyper_parameters": Settings()}, tmp_path / "last.ckpt")
    refused(r"without running code: it holds a \S*open beside them", path, image_size=8)
    assert not (tmp_path / "executed").exists()
