"""What the tests share: the bundled model, a tiny network, and a cache of their own."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

import workbench as wb

# torch and diffusers are imported where they are used: the process that only deals tests out to others needs neither.


def random_unet(*, seed: int = 0, **config):
    """An untrained U-Net of 8 x 8 pixels with a few thousand weights, the same for the same seed."""
    import torch
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_unet():
    """`random_unet`, for tests that need another configuration."""
    return random_unet


@pytest.fixture(scope="session")
def tiny():
    """A wrapped untrained network: everything but good images, in milliseconds."""
    from diffusers import DDPMScheduler

    return wb.wrap(random_unet(), DDPMScheduler(), name="tiny", device="cpu")


@pytest.fixture(scope="session")
def model():
    """The bundled model."""
    return wb.load_model("avataaars32", device="cpu")


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Images of coloured squares with captions, and the folder of a CLIP that was trained on them."""
    from small_models import paint_squares

    folder = tmp_path_factory.mktemp("squares")
    images = paint_squares(folder, 80)
    wb.train_clip(images, out=folder / "clip", steps=60, batch_size=8, progress=False)
    return images, folder / "clip"


@pytest.fixture
def tiny_folder(tmp_path):
    """The tiny network as a model folder with unet/ and scheduler/."""
    from diffusers import DDPMScheduler

    folder = tmp_path / "tiny"
    random_unet().save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder in place of data/cache."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("workbench.paths.cache", lambda: folder)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home of the workbench, with a space and braces in its path, which papermill takes for a format."""
    home = tmp_path / "a {home}"
    for folder in ("data", "notebooks", "profiles", "reports"):
        (home / folder).mkdir(parents=True)
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    return home


@pytest.fixture
def added():
    """Take methods that a test registers out again."""
    from workbench.benchmark.methods import METHODS

    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture(scope="module")
def kernels():
    """A server of kernels that compute with one thread."""
    from workbench.report.kernels import KernelServer, environment

    with KernelServer(environment(1)) as server:
        yield server
