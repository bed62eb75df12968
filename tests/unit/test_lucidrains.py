"""Files of lucidrains' denoising-diffusion-pytorch: the network computes what the original did, and files are read."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from originals import Lucidrains, randomised

import workbench as wb
from workbench.diffusion.foreign import LucidrainsUNet
from workbench.formats import layouts, lucidrains

LAYOUTS = {
    "the default's attention": {
        "mult": (1, 2, 4),
        "heads": (4, 4, 4),
        "dims": (32, 32, 32),
        "full": (False, False, True),
    },
    "full attention elsewhere": {"mult": (1, 1), "heads": (4, 2), "dims": (8, 16), "full": (True, False)},
    "grey images": {"mult": (1, 2), "heads": (4, 4), "dims": (8, 8), "full": (False, True), "channels": 1, "out": 1},
    "learned variance": {"mult": (1, 2), "heads": (4, 4), "dims": (8, 8), "full": (False, True), "out": 6},
    "another first width": {"mult": (1, 2), "heads": (4, 4), "dims": (8, 8), "full": (False, True), "first": 24},
    "one level": {"mult": (2,), "heads": (2,), "dims": (8,), "full": (True,)},
}
SMALL = LAYOUTS["another first width"]
T = 50


def sigmoid_betas() -> torch.Tensor:
    """Jabri et al. 2022, from the formula: alpha_bar falls from 1 to 0 as 1 - sigmoid from -3 to 3."""
    s = [1 - 1 / (1 + math.exp(-(6 * t / T - 3))) for t in range(T + 1)]
    bars = [(each - s[-1]) / (s[0] - s[-1]) for each in s]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in zip(bars[:-1], bars[1:], strict=True)])


def loss_weight(objective: str, *, gamma: float = math.inf) -> torch.Tensor:
    bars = torch.cumprod(1 - sigmoid_betas().double(), 0)
    ratio = bars / (1 - bars)
    bounded = ratio.clamp(max=gamma)
    return {"pred_noise": bounded / ratio, "pred_x0": bounded, "pred_v": bounded / (ratio + 1)}[objective].float()


def training(network, *, objective: str = "pred_v", gamma: float = math.inf) -> dict:
    """Content of a `model-N.pt`, with weights of zeros beside the moving average."""
    buffers = {"betas": sigmoid_betas(), "loss_weight": loss_weight(objective, gamma=gamma)}
    average = {f"model.{name}": tensor for name, tensor in network.state_dict().items()} | buffers
    last = {name: tensor if name in buffers else torch.zeros_like(tensor) for name, tensor in average.items()}
    online = {f"online_model.{name}": tensor for name, tensor in last.items()}
    ema = {f"ema_model.{name}": tensor for name, tensor in average.items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 8e-5}]}
    return {"step": 7, "model": last, "opt": optimiser, "ema": online | ema | counters, "scaler": None, "version": "2"}


def images(network, size: int = 8) -> torch.Tensor:
    channels = network.init_conv.in_channels
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def converted(state: dict) -> LucidrainsUNet:
    config = lucidrains.infer(state, image_size=8)
    network = LucidrainsUNet.from_config(config)
    network.load_state_dict(lucidrains.convert(state, config))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return randomised(Lucidrains(dim=16, **SMALL))


@pytest.fixture
def file(network, tmp_path):
    torch.save(training(network), tmp_path / "model-7.pt")
    return tmp_path / "model-7.pt"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_original_network_computes_the_same_after_conversion(kind):
    original = randomised(Lucidrains(dim=16, **LAYOUTS[kind]))
    x_t, t = images(original), torch.tensor([3, 740])
    output, _ = original(x_t, t)
    assert output.std() > 0.3  # the tolerance is of values of the order of 1
    torch.testing.assert_close(converted(original.state_dict())(x_t, t), output, atol=1e-5, rtol=1e-5)


def test_swapped_kinds_of_attention_give_another_network(network):
    """The two have the same shapes of q, k and v: the test of the right ones could not fail otherwise."""
    state = network.state_dict()
    config = {**lucidrains.infer(state, image_size=8), "full": (True, True)}
    swapped = LucidrainsUNet.from_config(config)
    ours = lucidrains.convert(state, lucidrains.infer(state, image_size=8))
    swapped.load_state_dict(ours, strict=False)
    x_t, t = images(network), torch.tensor([3, 740])
    assert (swapped(x_t, t) - network(x_t, t)[0]).abs().max() > 1e-2


# What the file tells


@pytest.mark.parametrize("gamma", [math.inf, 5.0, 1.0])
@pytest.mark.parametrize(
    "objective, expected", [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v_prediction")]
)
def test_what_a_network_predicts_follows_from_the_weight_of_its_loss(objective, expected, gamma):
    assert lucidrains.predicted(sigmoid_betas(), loss_weight(objective, gamma=gamma)) == expected


@pytest.mark.parametrize("weight", [torch.full((T,), 2.0), torch.ones(T - 1), torch.rand(T)])
def test_weights_of_no_known_loss_tell_nothing(weight):
    assert lucidrains.predicted(sigmoid_betas(), weight) is None


@pytest.mark.parametrize("steps", [T, 1000])
def test_the_sigmoid_schedule_is_the_librarys(steps, monkeypatch):
    monkeypatch.setattr(f"{__name__}.T", steps)
    settings = layouts.noise_schedule("sigmoid", steps)
    assert settings["num_train_timesteps"] == steps
    torch.testing.assert_close(torch.tensor(settings["trained_betas"]), sigmoid_betas(), rtol=1e-5, atol=1e-9)


# Files that are refused


def renamed(state: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "downs.0.0.block1.norm.weight": torch.ones(24)}, "group normalisation"),
        (lambda s: {**s, "time_mlp.0.weights": torch.ones(8)}, "embedding of the timestep"),
        (lambda s: {**s, "classes_emb.weight": torch.ones(10, 16)}, r"conditioned on a class \(classes_emb.weight\)"),
        (lambda s: renamed(s, "mem_kv", "memory"), "downs.0.2.mem_kv is missing or"),
        (lambda s: {**s, "init_conv.weight": torch.ones(24, 6, 7, 7)}, "in_channels is 6 and out_channels is 3"),
        (lambda s: {**s, "init_conv.weight": torch.ones(24, 3, 7)}, "init_conv.weight is .* no weight of images"),
        (lambda s: {**s, "mid_block3.mlp.1.bias": torch.ones(2)}, "mid_block3.time.bias"),
        (lambda s: {n: w for n, w in s.items() if n != "ups.1.1.res_conv.bias"}, "up_blocks.1.block2.shortcut.bias"),
    ],
)
def test_a_network_of_another_layout_is_refused(change, words, network, tmp_path):
    torch.save(change(network.state_dict()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"model.pt .*{words}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wb.load_model(tmp_path / "model.pt", image_size=8, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "don't tell image_size"),
        ({"image_size": 7}, "sample_size is 7; .*multiples of 2"),
        ({"image_size": 8, "heads": 4}, "heads is not for this network"),
        ({"image_size": 8, "prediction": "noise"}, "'noise'.*one of epsilon, v_prediction, sample"),
        ({"preset": "ffhq"}, "layout 'lucidrains', those of the preset 'ffhq' in 'guided'"),
    ],
)
def test_settings_that_can_not_be_are_refused(options, words, file):
    with pytest.raises(ValueError, match=words):
        wb.load_model(file, device="cpu", **options)


# Models


def eps_of(v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha_bar = torch.cumprod(1 - sigmoid_betas().double(), 0)[t].float().view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t


@pytest.fixture
def model(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return wb.load_model(file, image_size=8, device="cpu")


def test_a_trainings_file_loads_with_its_average_its_schedule_and_what_it_predicts(network, model):
    x_t, t = images(network), torch.tensor([3, 40])
    v, h = network(x_t, t)
    torch.testing.assert_close(model(x_t, t), eps_of(v, x_t, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode(x_t, t).h, h, atol=1e-5, rtol=1e-5)
    assert (model.prediction, model.h_shape, model.schedule.T) == ("v_prediction", (32, 4, 4), T)
    bars = torch.cumprod(1 - sigmoid_betas().double(), 0).numpy()
    assert model.schedule.alpha_bars == pytest.approx(bars, rel=1e-3)


def test_decode_of_encode_is_the_networks_own_forward_bit_for_bit_at_every_tap(network, model):
    x_t, t = images(network).to(memory_format=torch.channels_last), torch.tensor([3, 40])
    plain = model.unet.unet(x_t, t)
    assert {"before", "after", "down.0", "skip.0", "skip.4", "up.1"} <= set(model.taps)
    for tap in model.taps:
        split = model.tapped(tap).unet
        state = split.encode(x_t, t)
        assert tuple(state.h.shape[1:]) == split.h_shape
        assert torch.equal(split.decode(state), plain), tap
        assert not torch.equal(split.decode(state, torch.ones(split.h_shape)), plain), tap


def test_a_folder_of_the_file_is_the_same_model(file, model, tmp_path):
    folder = wb.convert_checkpoint(file, tmp_path / "faces", image_size=8)
    loaded = wb.load_model(folder, device="cpu")
    assert loaded.provenance() == model.provenance() | {"name": "faces"}
    run = wb.sample(model, seeds=range(2), steps=5)
    assert torch.equal(wb.sample(loaded, seeds=range(2), steps=5).x0, run.x0)
    assert torch.isfinite(run.x0).all()
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["_class_name"] == "LucidrainsUNet"


def test_what_a_file_does_not_tell_is_assumed_and_said(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    options = {"image_size": 8, "device": "cpu"}
    with pytest.warns(UserWarning) as said:
        model = wb.load_model(tmp_path / "bare.pt", **options)
    assert (model.prediction, model.schedule.T) == ("v_prediction", 1000)
    assert any("v is assumed" in str(each.message) for each in said)
    assert any("1000 are assumed, of the sigmoid schedule" in str(each.message) for each in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = wb.load_model(tmp_path / "bare.pt", **options, timesteps=T, prediction="sample", schedule="cosine")
    assert (told.prediction, told.schedule.T) == ("sample", T)
