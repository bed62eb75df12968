"""Files of lucidrains' denoising-diffusion-pytorch, written as the workbench's own `LucidrainsUNet`.

Its `Trainer` writes `model-N.pt`, with the U-Net inside of the diffusion (`model.`), the moving average of both, and
the diffusion's buffers: betas, and the weight of the loss at every timestep, which tells what the network predicts. All
of the U-Net but the size of its images follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from workbench.formats.layouts import ask_for, numbers, rename, shape


def infer(state: Mapping[str, torch.Tensor], *, image_size: int | None = None, **unused: object) -> dict:
    """Config of `LucidrainsUNet`, from the names and shapes of the weights.

    A ValueError says what a network has that the class has not, or asks for the image size.
    """
    if unused:
        raise ValueError(f"{next(iter(unused))} is not for this network, whose shapes tell it")
    if image_size is None:
        ask_for(["image_size"])
    for name, reason in (
        ("classes_emb.weight", "is conditioned on a class"),
        ("time_mlp.0.weights", "has a learned or random embedding of the timestep"),
        ("downs.0.0.block1.norm.weight", "has group normalisation, as older versions of its library"),
    ):
        if name in state:
            raise ValueError(f"the network {reason} ({name}); the workbench takes the library's default U-Net of today")
    levels = 1 + max(numbers(state, r"downs\.(\d+)\."))
    first, time = shape(state, "init_conv.weight", 4), shape(state, "time_mlp.1.weight")
    full = tuple(f"downs.{i}.2.to_out.weight" in state for i in range(levels))
    # (2, heads, head channels, number); the last two are the other way round in softmax attention.
    memories = [shape(state, f"downs.{i}.2.mem_kv", 4) for i in range(levels)]
    memories = [(*m[:2], m[3], m[2]) if softmax else m for m, softmax in zip(memories, full, strict=True)]
    return {
        "_class_name": "LucidrainsUNet",
        "sample_size": image_size,
        "in_channels": first[1],
        "out_channels": shape(state, "final_conv.weight", 4)[0],
        "time_channels": time[1],
        "widths": (first[0], *(shape(state, f"ups.{i}.0.block1.proj.weight", 4)[0] for i in reversed(range(levels)))),
        "heads": tuple(m[1] for m in memories),
        "head_channels": tuple(m[2] for m in memories),
        "full": full,
        "memory": memories[0][3],
    }


def convert(state: Mapping[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Weights by their names in `LucidrainsUNet`, of those by their names in the file, without prefixes."""
    converted = {}
    for name, tensor in state.items():
        softmax = name == "mid_attn.mem_kv" or name.removesuffix("mem_kv") + "to_out.weight" in state
        converted[rename(name, "lucidrains", last=len(config["full"]) - 1)] = (
            tensor.mT.contiguous() if name.endswith("mem_kv") and softmax else tensor
        )
    return converted


def predicted(betas: torch.Tensor, loss_weight: torch.Tensor) -> str | None:
    """Kind of prediction, in diffusers' words, by the weight of the loss at every timestep; None if unclear.

    The weights are 1 for the noise, the signal-to-noise ratio r for x_0 and r / (r + 1) for v; a bound on r (min-SNR)
    may change those above it.
    """
    ratio = torch.cumprod(1 - betas.double(), dim=0)
    ratio = ratio / (1 - ratio)
    noisy = (ratio > 0.01) & (ratio < 0.9)
    expected = {"epsilon": torch.ones_like(ratio), "sample": ratio, "v_prediction": ratio / (ratio + 1)}
    for name, weight in expected.items():
        if noisy.any() and loss_weight.shape == ratio.shape:
            if torch.allclose(loss_weight[noisy].double(), weight[noisy], rtol=1e-2):
                return name
    return None
