"""The network of the attribute classifiers that this project trains, its training and its files."""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from workbench.datasets.labelled import LabelledImages
from workbench.datasets.tables import not_binary
from workbench.formats.checkpoints import hash_weights, load_strictly, read_state_dict
from workbench.io import write_text, written
from workbench.shapes import with_channels

FORMAT, VERSION = "workbench-classifier", 1
WEIGHTS = "model.safetensors"

DESIGNS = {
    "labeller": {"size": 64, "widths": (24, 48, 96, 128), "kernel": 3, "residual": True, "activation": "relu"},
    "judge": {"size": 48, "widths": (24, 48, 96, 128), "kernel": 5, "residual": False, "activation": "gelu"},
}
"""Networks that `train_classifier` can train."""

BATCH, WARMUP = 128, 100
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.02
DECAY = 0.25  # last share of the steps, in which the learning rate falls to 0
HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share and number of the images that decide when to stop
CHECK_EVERY, PATIENCE, LEAST_GAIN = 100, 8, 0.005
"""Steps between looks at the held-out loss, and looks without a gain of that share after which the rate decays."""

SMALLEST_MODEL = 32  # pixels of the smallest images that a network is trained to work on, unless it is smaller itself

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class AttributeNet(nn.Module):
    """A small convolutional network that takes images of any size and resizes them to its own square.

    Each stage, as wide as `widths` says, halves the resolution; `residual` adds a residual convolution to each.
    """

    def __init__(
        self,
        attributes: int,
        *,
        size: int,
        widths: Sequence[int],
        kernel: int,
        residual: bool,
        activation: str,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        stages = []
        for inputs, outputs in zip((channels, *widths), widths, strict=False):
            stages.append(_Convolution(inputs, outputs, kernel, stride=2, activation=activation))
            if residual:
                stages.append(_Residual(outputs, kernel, activation=activation))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], attributes)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images on the CPU as the network takes them, on its device."""
        # Resized on the CPU, so that every device sees the same pixels.
        images = _resize(with_channels(images, self.channels), self.size).clamp(-1, 1)
        return images.to(self.head.weight.device).contiguous(memory_format=torch.channels_last)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Inputs of the last layer, (n, widths[-1]), for prepared images."""
        return self.stages(images).mean(dim=(2, 3))

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Output of every stage, for prepared images."""
        outputs = []
        for stage in self.stages:
            images = stage(images)
            outputs.append(images)
        return outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, attributes) of prepared images."""
        return self.head(self.features(images))

    def initialise(self, generator: torch.Generator) -> AttributeNet:
        """Draw the first weights."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        return self


class _Convolution(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, activation: str) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            _ACTIVATIONS[activation](),
        )


class _Residual(nn.Module):
    def __init__(self, channels: int, kernel: int, *, activation: str) -> None:
        super().__init__()
        self.inner = _Convolution(channels, channels, kernel, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def new_network(attributes: int, config: Mapping) -> AttributeNet:
    """A network on the CPU whose weights hold anything."""
    # Without memory no weights are drawn, so that the global generator stays as it is.
    with torch.device("meta"):
        network = AttributeNet(attributes, **config)
    return network.to_empty(device="cpu")


def read_network(folder: Path, config: Mapping) -> AttributeNet:
    """The network of a classifier's folder, with its weights, ready to evaluate."""
    path, weights = folder / "config.json", folder / WEIGHTS
    try:
        network = new_network(len(config["attributes"]), config["network"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: it does not describe a network ({error})") from error
    if not weights.is_file():
        raise FileNotFoundError(f"there is no {weights}; copy the classifier's folder again or train it again")
    load_strictly(network, read_state_dict(weights), path=weights)
    if hash_weights(network) != config.get("hash"):
        raise ValueError(f"{weights} does not belong to {path}; copy both again or train again")
    return network.eval().requires_grad_(False)


def write_network(network: AttributeNet, out: Path, *, config: dict, attributes: list[str], training: dict) -> None:
    """Write the folder of a classifier."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "attributes": attributes,
        "network": config,
        "hash": hash_weights(network),
        "training": training,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with written(out / WEIGHTS) as partial:
        save_file(state, partial)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def binary_labels(images: LabelledImages) -> pd.DataFrame:
    """Columns of labels that hold 0 and 1; warns of the others."""
    others = not_binary(images.labels)
    labels = images.labels.drop(columns=list(others))
    if labels.empty:
        why = f" ({'; '.join(others.values())})" if others else ""
        raise ValueError(f"{images} has no attribute of 0 and 1{why}; give images with such labels, or labels=")
    constant = [name for name in labels if labels[name].nunique() < 2]
    if constant:
        raise ValueError(f"{', '.join(constant)} does not vary in {len(images)} images; give more or drop the column")
    if others:
        warnings.warn(f"labels other than 0 and 1 are left out: {'; '.join(others.values())}", stacklevel=4)
    return labels


def fit_network(
    network: AttributeNet,
    pixels: torch.Tensor,
    labels: pd.DataFrame,
    *,
    steps: int,
    generator: torch.Generator,
    flips: bool,
    turns: bool,
    progress: bool,
) -> dict[str, float | None]:
    """Train the network in place on 8-bit images.

    The learning rate is constant, and falls linearly in the last quarter of the steps. That quarter begins early, and
    the training ends early, once eight looks in a row at held-out images, 100 steps apart, found no loss that is lower
    by half a percent. With fewer than two batches of images none is held out, and all steps are taken.

    Returns the steps taken, the mean loss of the last tenth of them, and the held-out images with their loss.
    """
    labels = torch.tensor(labels.to_numpy(np.float32))
    n = len(pixels)
    k = min(int(HELD_OUT * n), MOST_HELD_OUT) if n >= 2 * BATCH else 0
    order = torch.randperm(n, generator=generator) if k else torch.arange(n)
    held, rest = order[:k], order[k:]
    network.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warmup, end, losses, best, since = min(WARMUP, steps // 10 + 1), steps, [], math.inf, 0
    decaying = steps - round(DECAY * steps)  # the first step of the decay
    rows_of, started = _shuffled(len(rest), generator), time.monotonic()
    bar = tqdm(total=steps, desc="training", unit="step", delay=2, leave=False, disable=not progress)
    for i in itertools.count():
        if i == 3 and progress and (seconds := (time.monotonic() - started) / 3 * end) > 20:
            tqdm.write(
                f"at most {end:,} steps, about {seconds / 60:.1g} minutes; fewer if the held-out loss stops falling"
            )
        if i < decaying and k and i % CHECK_EVERY == 0 and i:
            loss = _held_out_loss(network, pixels[held], labels[held])
            best, since = (loss, 0) if loss < best * (1 - LEAST_GAIN) else (best, since + 1)
            if since == PATIENCE:
                decaying, end = i, min(steps, i + round(DECAY / (1 - DECAY) * i))
                bar.total = end
        if i == end:
            break
        rate = min((i + 1) / warmup, 1.0, (end - i) / (end - decaying + 1e-9) if i >= decaying else 1.0)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        rows = rest[next(rows_of)]
        batch = _turn(pixels[rows].float() / 127.5 - 1, generator, flips=flips, turns=turns)
        batch = network.prepare(degrade(batch, generator))
        # In bfloat16 the gradient of a stage of one pixel is not what it should be on a CPU (oneDNN, torch 2.13).
        low = batch.device.type != "mps" and network.size > 8
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=low):
            scores = network(batch)
        loss = _loss(scores, labels[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        bar.update()
    bar.close()
    network.eval()
    last = float(torch.stack(losses[-max(1, end // 10) :]).mean())
    held_out_loss = _held_out_loss(network, pixels[held], labels[held]) if k else None
    return {
        "steps": end,
        "last_loss": round(last, 5),
        "held_out": k,
        "held_out_loss": held_out_loss and round(held_out_loss, 5),
    }


def _loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy; missing labels count nothing."""
    truth = truth.to(scores.device)
    known = truth.isfinite().float()
    return F.binary_cross_entropy_with_logits(scores.float(), truth.nan_to_num(), weight=known)


@torch.no_grad()
def _held_out_loss(network: AttributeNet, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Loss of images as they are, as the network scores them when it is used."""
    training = network.training
    network.eval()
    parts = [network(network.prepare(part.float() / 127.5 - 1)) for part in pixels.split(BATCH)]
    network.train(training)
    return float(_loss(torch.cat(parts), labels))


def _shuffled(n: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of positions, every image once before any comes again."""
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, max(1, n - BATCH + 1), BATCH):
            yield order[start : start + BATCH]


def _turn(images: torch.Tensor, generator: torch.Generator, *, flips: bool, turns: bool) -> torch.Tensor:
    """Mirror every second image, and turn three of four by one to three right angles; turned images must be square."""
    if flips:
        images = torch.where(_uniform((len(images), 1, 1, 1), 0, 1, generator) < 0.5, images.flip(-1), images)
    if turns:
        quarters = torch.randint(4, (len(images),), generator=generator)
        images = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, quarters, strict=True)])
    return images


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Imitate a small diffusion model's defects: shifts, colours, sizes, blur, noise."""
    n, channels, side = len(images), images.shape[1], min(images.shape[2:])
    shift = torch.eye(2, 3).repeat(n, 1, 1)
    shift[:, :, 2] = _uniform((n, 2), -0.08, 0.08, generator)
    grid = F.affine_grid(shift, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, offset = (_uniform((n, channels, 1, 1), *ends, generator) for ends in ((0.95, 1.05), (-0.05, 0.05)))
    images = gain * images + offset
    least = max(side // 2, min(side, SMALLEST_MODEL))
    images = _resize(images, int(torch.randint(least, side + 1, (), generator=generator)))
    images = _blur(images, float(_uniform((), 0.0, 0.8, generator)))
    deviation = _uniform((n, 1, 1, 1), 0.0, 0.1, generator)
    return images + deviation * torch.randn(images.shape, generator=generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    if images.shape[2] == images.shape[3] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur by 5 pixels a side."""
    channels = images.shape[1]
    weights = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / max(sigma, 1e-3)) ** 2)
    weights = (weights / weights.sum()).repeat(channels, 1, 1, 1)
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(images, weights, groups=channels), weights.transpose(2, 3), groups=channels)
