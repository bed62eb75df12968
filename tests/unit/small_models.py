"""Small untrained models of every kind, written to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from originals import Lucidrains, randomised
from PIL import Image

from workbench.datasets.labelled import LabelledImages, load_images
from workbench.diffusion.loading import convert_checkpoint

WIDTH = 8
"""Width of the tokens of a text."""

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}


def text_unet(**config) -> UNet2DConditionModel:
    """A network like Stable Diffusion's, of 8 x 8 latents of 4 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UNet2DConditionModel(**BLOCKS | CROSS | config).eval().requires_grad_(False)


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """A pipeline of images of 16 x 16 pixels, in `folder / "model"`; its tokenizer knows the letters from a to p."""
    import transformers

    words = ["<|startoftext|>", "<|endoftext|>", *(c + "</w>" for c in "abcdefghijklmnop"), *"abcdefghijklmnop"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=7,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        encoder = transformers.CLIPTextModel(config).eval()
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ).eval()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = (vae, encoder, tokenizer, text_unet(), scheduler, None, None)
    pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    return pipeline


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (230, 230, 230)}


def paint_squares(folder: Path, n: int) -> LabelledImages:
    """Images of 8 x 8 pixels in four colours, each a little different, with two captions each."""
    rng = np.random.default_rng(0)
    lines = ["file,caption"]
    for i in range(n):
        name = list(COLOURS)[i % 4]
        pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 20, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        lines += [f"{i:03d}.png,{text}" for text in (f"a {name} square", f"the square is {name}")]
    (folder / "captions.csv").write_text("\n".join(lines))
    return load_images(folder, size=8)


def save(folder: Path, unet: torch.nn.Module, **schedule) -> Path:
    """A folder with `unet/` and `scheduler/`."""
    unet.save_pretrained(folder / "model" / "unet")
    DDPMScheduler(**schedule).save_pretrained(folder / "model" / "scheduler")
    return folder / "model"


def class_conditional(folder: Path, make_unet: Callable) -> dict:
    return {"model_name": str(save(folder, make_unet(num_class_embeds=4))), "condition": {"label": 3}}


def text_conditional(folder: Path, make_unet: Callable) -> dict:
    stable_diffusion(folder)
    prompt = {"prompt": "a cafe", "negative_prompt": "bad", "guidance_scale": 3.0}
    return {"model_name": str(folder / "model"), "condition": prompt}


def predicting_v(folder: Path, make_unet: Callable) -> dict:
    return {"model_name": str(save(folder, make_unet(), prediction_type="v_prediction"))}


def grey_and_wide(folder: Path, make_unet: Callable) -> dict:
    unet = make_unet(in_channels=1, out_channels=1, sample_size=(8, 16))
    return {"model_name": str(save(folder, unet, num_train_timesteps=50)), "timestep": 25}


def of_lucidrains(folder: Path, make_unet: Callable) -> dict:
    layout = {"mult": (1, 2), "heads": (4, 4), "dims": (8, 8), "full": (False, True)}
    state = {f"model.{name}": tensor for name, tensor in randomised(Lucidrains(dim=8, **layout)).state_dict().items()}
    torch.save({"model": state}, folder / "model-1.pt")
    options = {"image_size": 8, "timesteps": 200, "schedule": "sigmoid", "prediction": "v_prediction"}
    model = convert_checkpoint(folder / "model-1.pt", folder / "model", **options)
    return {"model_name": str(model), "timestep": 100}


KINDS = {
    "class-conditional": class_conditional,
    "text-conditional, of latents": text_conditional,
    "v-prediction": predicting_v,
    "one channel, not square, T of 50": grey_and_wide,
    "lucidrains": of_lucidrains,
}
"""Functions of a folder and `make_unet` that write a model there, and give the notebooks' parameters that name it."""
