"""Train a small CLIP on images with captions (Radford et al. 2021), in the files of transformers.

The text encoder knows the words of the captions alone: its tokenizer gives every other word one token, and the
workbench refuses sentences of such words only.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets.attribute_net import degrade
from workbench.datasets.labelled import LabelledImages
from workbench.datasets.tables import not_binary
from workbench.diffusion.images import to_bytes
from workbench.diffusion.models import find_device
from workbench.diffusion.networks import seeded
from workbench.formats.checkpoints import hash_weights
from workbench.io import write_text, written
from workbench.shapes import with_channels

ABOUT, STATE = "training.json", "checkpoint.pt"
"""What a CLIP was trained on, with its retrieval of held-out pairs; and where an unfinished training stands."""

PATCH = 4  # pixels of the side of an image's patches
WIDTH, HEADS, MLP = 128, 4, 256
IMAGE_LAYERS, TEXT_LAYERS = 4, 2
LENGTH = 48  # tokens of a text
PAD, UNKNOWN, START, END = range(4)

LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1e-3, 0.1, 200
LOOKING = 0.25
"""Share of the steps in which the image encoder alone is trained, by a layer that guesses facts from the patches."""

FACTS_WEIGHT = 3.0
"""Weight of the guessed facts beside CLIP's loss: which words an image's captions have, and its labels of 0 and 1."""

RARE, COMMON = 0.02, 0.7  # shares of the images that words must have to be such a fact

LARGEST_SCALE = 100.0  # of the logits (Radford et al. 2021, section 2.5)
HELD_OUT = 512  # images, or a tenth of all, whose captions are to be found among each other's


@dataclass(frozen=True)
class Retrieval:
    """Share of held-out pairs whose own caption is the likeliest of an image, and whose image is of a caption."""

    n: int
    caption: float
    image: float


@torch.enable_grad()
def train_clip(
    images: LabelledImages,
    *,
    out: str | Path,
    steps: int = 3000,
    batch_size: int = 256,
    seed: int = 0,
    resume: bool = False,
    minutes: float = 10.0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Retrieval:
    """Train a CLIP of 0.9 M weights on images with captions.

    A ViT of four layers sees patches of 4 x 4 pixels, at the size of the images; a text transformer of two layers reads
    the captions' own words. The loss is CLIP's: every image is to have its own caption among those of the batch, and
    the reverse. An auxiliary layer, discarded after training, predicts from the patches which words the captions
    contain, and labels of 0 and 1 where there are some; the first quarter of the steps trains the image encoder by
    these predictions alone, since by CLIP's loss a small ViT learns only colours for many hundred steps. Images are
    shifted, blurred and made noisy as for `train_classifier`. The folder is written at every checkpoint and at the end;
    `load_clip`, `load_classifier` and `transformers.CLIPModel` read it.

    Parameters
    ----------
    images : LabelledImages
        With `captions`, at the size of the models that the CLIP is for, a square of a multiple of 4 pixels. Images
        without captions are left out.
    out : str or Path
        Folder of the model.
    steps, batch_size : int
        Number of batches, and pairs in each; no image comes twice in a batch.
    seed : int
        Seed of the initial weights, the order of the images, the captions and the augmentation.
    resume : bool, default False
        Continue the training in `out` from its last checkpoint, with the same images, captions and settings.
    minutes : float, default 10
        Time between checkpoints, the most that a kill costs.
    device : str or torch.device, optional
        By default the best available.
    progress : bool
        Show a bar.

    Returns
    -------
    Retrieval
        On held-out pairs, a tenth of the images, 512 at most.

    Raises
    ------
    ValueError
        If fewer images than one and a half batches have captions, the size of the images does not fit, or a training to
        resume had other images, captions or settings.
    FileNotFoundError
        If there is no checkpoint to resume from.
    """
    out, device = paths.writable(out, folder=True), find_device(device)
    known = images.select([bool(texts) for texts in images.captions])
    texts = known.captions
    if len(known) < 1.5 * batch_size or batch_size < 2:
        raise ValueError(f"{len(known)} of {len(images)} images have captions; a batch of {batch_size} needs 1.5 times")
    _, height, width = known.image_shape
    if height != width or height % PATCH:
        raise ValueError(f"images of {height} x {width} pixels; give squares of a multiple of {PATCH}")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pixels = to_bytes(known, progress=progress)
    tokenizer = _train_tokenizer(text for each in texts for text in each)
    form = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    tokens = [tokenizer(each, **form).input_ids.astype(np.int16) for each in texts]
    order = rng.permutation(len(known))
    held, rest = np.split(order, [max(1, min(HELD_OUT, len(known) // 10))])
    facts = [torch.from_numpy(each).float() for each in (_said(texts), _binary_labels(known)) if each.size]
    with seeded([seed]):
        network = _new_network(len(tokenizer), side=height).to(device)
        head = torch.nn.Linear(WIDTH, sum(each.shape[1] for each in facts)).to(device)
    trained = [*network.parameters(), *head.parameters()]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    about = {"images": len(known), "fingerprint": known.fingerprint, "captions": sum(map(len, texts)), "seed": seed}
    settings, parts = {**about, "steps": steps, "batch_size": batch_size}, (network, head, optimiser)
    first, seconds = _restore(out / STATE, settings, parts, rng, generator) if resume else (0, 0.0)
    saved, started = time.monotonic(), time.monotonic() - seconds
    bar = tqdm(range(first, steps), "training", total=steps, initial=first, unit="step", disable=not progress)
    for step in bar:
        rows = rng.choice(rest, batch_size, replace=False)
        chosen = np.stack([tokens[row][rng.integers(len(tokens[row]))] for row in rows])
        batch = with_channels(degrade(pixels[torch.from_numpy(rows)].float() / 127.5 - 1, generator), 3)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seen = network.get_image_features(pixel_values=batch.to(device))
            guessed = head(seen.last_hidden_state[:, 1:].mean(dim=1)).float()
        loss, contrastive = FACTS_WEIGHT * _facts_loss(guessed, [each[rows].to(device) for each in facts]), math.nan
        if step >= LOOKING * steps:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                read = network.get_text_features(input_ids=_trimmed(chosen).to(device))
            logits = _logits(network, seen.pooler_output, read.pooler_output)
            target = torch.arange(batch_size, device=device)
            own = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            loss, contrastive = loss + own, float(own.detach())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            network.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        if step % 50 == 49:
            bar.set_postfix(loss=f"{contrastive:.3f}", all=f"{float(loss.detach()):.3f}")
        due = time.monotonic() - saved >= 60 * minutes
        if due or step == steps - 1:
            retrieval = _retrieve(network, pixels[torch.from_numpy(held)], np.stack([tokens[row][0] for row in held]))
            about |= {"steps": step + 1, "batch_size": batch_size, "last_loss": round(contrastive, 4)}
            about |= {"minutes": round((time.monotonic() - started) / 60, 1), "held_out": vars(retrieval)}
            _write(network, tokenizer, out, about=about)
            saved = time.monotonic()
            if step < steps - 1:
                states = [part.state_dict() for part in parts], rng.bit_generator.state, generator.get_state()
                with written(out / STATE) as partial:
                    torch.save((settings, step + 1, saved - started, *states), partial)
    (out / STATE).unlink(missing_ok=True)
    return retrieval


def _restore(path: Path, settings: dict, parts: tuple, rng: np.random.Generator, generator: torch.Generator):
    """Go back to a checkpoint; returns the steps that are done and the seconds that they took."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, so there is no training to resume; start one")
    then, step, seconds, states, rng.bit_generator.state, drawn = torch.load(path, "cpu", weights_only=True)
    if differing := [name for name, value in settings.items() if then[name] != value]:
        raise ValueError(f"the training in {path.parent} differs in: {', '.join(differing)}; give what it began with")
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    generator.set_state(drawn)
    return step, seconds


def _train_tokenizer(texts):
    """A tokenizer of whole words, lower case; every word that comes twice or more."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unknown>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<unknown>", "<start>", "<end>"]
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=special, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unknown>", "bos_token": "<start>", "eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LENGTH, model_input_names=["input_ids", "attention_mask"], **names
    )


def _new_network(words: int, *, side: int) -> torch.nn.Module:
    import transformers

    size = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": HEADS, "projection_dim": WIDTH}
    text = {**size, "num_hidden_layers": TEXT_LAYERS, "vocab_size": words, "max_position_embeddings": LENGTH}
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    config = transformers.CLIPConfig(
        text_config={**text, **ids},
        vision_config={**size, "num_hidden_layers": IMAGE_LAYERS, "image_size": side, "patch_size": PATCH},
        projection_dim=WIDTH,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    network = transformers.CLIPModel(config).train()
    vision = network.vision_model.embeddings
    with torch.no_grad():
        # Drawn as small as CLIP's own, they leave the network a bag of patches for thousands of steps.
        vision.position_embedding.weight[1:] = _waves(side // PATCH)
        vision.patch_embedding.weight.normal_(0.0, vision.patch_embedding.weight[0].numel() ** -0.5)
    return network


def _waves(side: int) -> torch.Tensor:
    """Sines and cosines of the rows and columns of patches, (side * side, WIDTH) (Vaswani et al. 2017, section 3.5)."""
    frequency = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)], dim=1)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then a cosine to 0."""
    warmup = min(WARMUP, steps // 10 + 1)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _trimmed(tokens: np.ndarray) -> torch.Tensor:
    """Tokens (n, L) without the columns that are padding in all rows; the text encoder is causal, so none sees it."""
    return torch.from_numpy(tokens[:, : int((tokens != PAD).sum(axis=1).max())].astype(np.int64))


def _logits(network: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Scaled cosines (n, n) of embeddings."""
    return network.logit_scale.exp() * F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T


def _facts_loss(guessed: torch.Tensor, facts: list[torch.Tensor]) -> torch.Tensor:
    """Cross entropy of guessed logits (n, m), words and labels in equal shares."""
    parts = guessed.split([each.shape[1] for each in facts], dim=1)
    losses = [F.binary_cross_entropy_with_logits(*pair) for pair in zip(parts, facts, strict=True)]
    return cast(torch.Tensor, sum(losses))


def _said(texts: list[list[str]]) -> np.ndarray:
    """Which words and pairs of words an image's captions have, bool (n, words); without rare and ever-present ones."""
    vectors = CountVectorizer(binary=True, ngram_range=(1, 2), token_pattern=r"\w+", min_df=RARE, max_df=COMMON)
    return vectors.fit_transform("\n".join(each) for each in texts).toarray().astype(bool)


def _binary_labels(images: LabelledImages) -> np.ndarray:
    """Labels of 0 and 1, (n, attributes); columns of other numbers, or with missing values, are left out."""
    labels = images.labels.drop(columns=list(not_binary(images.labels))).dropna(axis=1)
    return labels.to_numpy().astype(bool)


@torch.inference_mode()
def _retrieve(network: torch.nn.Module, pixels: torch.Tensor, tokens: np.ndarray) -> Retrieval:
    """Retrieval of images (n, C, H, W), 8 bits, and of a caption of each."""
    network.eval()
    device = next(network.parameters()).device
    images = with_channels(pixels.float() / 127.5 - 1, 3).to(device)
    texts = network.get_text_features(input_ids=_trimmed(tokens).to(device)).pooler_output
    logits = _logits(network, network.get_image_features(pixel_values=images).pooler_output, texts).cpu()
    network.train()
    own = torch.arange(len(logits))
    caption, image = (float((each.argmax(dim=1) == own).float().mean()) for each in (logits, logits.T))
    return Retrieval(len(logits), round(caption, 4), round(image, 4))


def _write(network: torch.nn.Module, tokenizer, out: Path, *, about: dict) -> None:
    """Write the folder; a file that is replaced is whole at any time."""
    import transformers

    side = network.config.vision_config.image_size
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        transformers.CLIPImageProcessorPil(**square, **half).save_pretrained(partial)
        for file in filter(Path.is_file, Path(partial).iterdir()):
            os.replace(file, out / file.name)
    write_text(out / ABOUT, json.dumps({**about, "hash": hash_weights(network)}, indent=2) + "\n")
