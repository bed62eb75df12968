"""What an extraction is said to need, against what it needs."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from small_models import stable_diffusion

import workbench as wb
from workbench import cli
from workbench.diffusion.loading import load_image_shape, load_schedule, load_shapes
from workbench.diffusion.memory import estimate_memory
from workbench.diffusion.unet import SplitUNet
from workbench.hspace import planning


@pytest.fixture(scope="module")
def network():
    return load_shapes("avataaars32")


def plan(network, **options):
    return planning.plan_extraction(network, **{"n": 10, "steps": 5, "flop_rate": 1e12, **options})


def test_flops_are_those_of_the_layers_added_up(network):
    unet = wb.load_model("avataaars32", device="cpu").unet.unet
    layers = 0

    def add(module, inputs, output):
        nonlocal layers
        if isinstance(module, torch.nn.Conv2d):
            layers += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            layers += 2 * output.numel() * module.in_features

    for module in unet.modules():
        module.register_forward_hook(add)
    with torch.inference_mode():
        unet(torch.zeros(1, 3, 32, 32), 0)
    flops = planning.count_flops(network)
    assert layers < flops < 1.05 * layers  # the products of attention are no layer's


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"record_x": True}])
def test_the_disk_is_that_of_the_arrays(tmp_path, tiny_folder, options):
    model = wb.load_model(tiny_folder, device="cpu")
    store = wb.extract(model, 10, steps=5, out=tmp_path / "a.zarr", progress=False, **options)
    arrays = sum(array.nbytes for name, array in store.group.arrays() if name != "done")
    assert plan(load_shapes(tiny_folder), **options).disk == arrays


def test_images_of_a_latent_model_are_planned_decoded(tmp_path):
    stable_diffusion(tmp_path)
    folder = tmp_path / "model"
    model = wb.load_model(folder, device="cpu", prompt="a cafe")
    store = wb.extract(model, 2, steps=2, out=tmp_path / "a.zarr", progress=False)
    arrays = sum(array.nbytes for name, array in store.group.arrays() if name != "done")
    shape = load_image_shape(folder)
    assert shape == model.image_shape
    assert plan(load_shapes(folder), n=2, steps=2, image_shape=shape).disk == arrays


def test_guidance_takes_two_passes_a_step_and_is_planned_for_networks_of_texts(network, tmp_path, capsys):
    one, two = plan(network), plan(network, guided=True)
    assert (two.passes, two.disk) == (2 * one.passes, one.disk)
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert two.gpu_memory > one.gpu_memory
    stable_diffusion(tmp_path)
    for words, passes in (([], "40, two a step, of"), (["--unguided"], "20 of")):
        command = ["plan", "--model", str(tmp_path / "model"), "--n", "5", "--steps", "4", "--rate", "1", *words]
        assert cli.main(command) == 0
        assert passes in capsys.readouterr().out


def test_the_schedule_is_the_models_and_needs_no_weights(tiny, tiny_folder):
    (weights,) = (tiny_folder / "unet").glob("*.safetensors")
    weights.write_bytes(b"")
    assert load_schedule(tiny_folder).provenance() == tiny.schedule.provenance()


def test_time_is_passes_by_rate_and_processes_share_it(network):
    one, four = plan(network), plan(network, processes=4)
    assert one.passes == 50
    assert one.seconds == pytest.approx(50 * one.flops / 1e12)
    assert four.seconds == pytest.approx(one.seconds / 4)


def test_memory_is_bounded_by_parameters_and_batch_not_by_n(network):
    many = [plan(network, n=n, steps=20) for n in (1_000, 1_000_000)]
    assert many[0].ram == many[1].ram and many[0].gpu_memory == many[1].gpu_memory
    assert plan(network, batch_size=128).gpu_memory > plan(network, batch_size=64).gpu_memory


def test_the_estimate_of_memory_counts_what_is_alive():
    """A network of one level: at its peak, in the last block, the skip and the input are alive and joined."""
    settings = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    with torch.device("meta"):
        unet = UNet2DModel(sample_size=64, block_out_channels=(32,), layers_per_block=1, **settings)
    need = estimate_memory(SplitUNet(unet))
    one = 4 * 32 * 64 * 64
    assert need.weights == 4 * sum(p.numel() for p in unet.parameters())
    assert 4 * one <= need.activations <= 12 * one
    with torch.device("meta"):
        twice = UNet2DModel(sample_size=128, block_out_channels=(32,), layers_per_block=1, **settings)
    # Four times the pixels; the timestep's embedding stays.
    assert estimate_memory(SplitUNet(twice)).activations == pytest.approx(4 * need.activations, rel=0.05)


def test_a_public_model_is_planned_without_its_weights(capsys):
    words = ["plan", "--model", "google/ddpm-ema-celebahq-256", "--n", "50000", "--steps", "50", "--gpu", "h100"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2,500,000" in said and "hours" in said and "assumed: 25% of the peak of a H100" in said


@pytest.mark.parametrize(
    ("card", "options", "tflops"),
    [
        ("a100", {}, 39),  # a quarter of 156
        ("A100", {"dtype": "bfloat16"}, 78),
        ("a100", {"utilisation": 0.5}, 78),
    ],
)
def test_a_cards_rate_is_a_share_of_its_peak(card, options, tflops):
    assert planning.card_rate(card, **options) == pytest.approx(tflops * 1e12)


def test_processes_on_a_cpu_share_its_cores_and_batches_are_those_of_extract(capsys, monkeypatch):
    monkeypatch.setenv("WORKBENCH_THREADS", "1")
    network = load_shapes("avataaars32")
    one, many = (plan(network, processes=n, on_gpu=False) for n in (1, 8))
    assert many.rate == one.rate
    said = []
    for processes in ("1", "8"):
        assert cli.main(["plan", "--rate", "20", "--steps", "50", "--n", "57600", "--processes", processes]) == 0
        said.append(capsys.readouterr().out)
    assert "40.0 hours" in said[0] and "5.0 hours" in said[1]
    words = ["plan", "--model", "google/ddpm-ema-celebahq-256", "--n", "10", "--rate", "1"]
    if not torch.cuda.is_available():
        assert cli.main(words) == cli.main([*words, "--batch-size", "1"]) == 0
        said = capsys.readouterr().out
        assert said[: len(said) // 2] == said[len(said) // 2 :]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--gpu", "abacus"], "GPU 'abacus' is not known"),
        (["--gpu", "h100", "--utilisation", "2"], "utilisation is 2.0"),
        (["--gpu", "h100", "--n", "0"], "'--n'"),
        (["--model", "nowhere"], "nowhere"),
        (["--rate", "0"], "--rate is 0; give passes a second"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", __file__], "is a file, and its network is unknown"),
    ],
)
def test_bad_plans_are_sentences(words, sentence, capsys):
    assert cli.main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err
