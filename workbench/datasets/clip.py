"""CLIP (Radford et al. 2021): embeddings of images and of texts, and classifiers from pairs of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from workbench.datasets.classifier import Classifier
from workbench.datasets.huggingface import batched, load_network, load_processor, prepare, unreadable
from workbench.diffusion.models import find_device
from workbench.diffusion.text import check_words
from workbench.formats.checkpoints import hash_weights, read_json
from workbench.formats.hub import find_folder
from workbench.io import check_text
from workbench.shapes import with_channels


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP's two encoders; made by `load_clip`. All embeddings have length 1.

    Attributes
    ----------
    name : str
    network : transformers.CLIPModel
    hash : str
        Content hash of the weights.
    """

    name: str
    network: torch.nn.Module = field(repr=False)
    hash: str
    _tokenizer: object = field(repr=False)
    _processor: object = field(repr=False)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.network.device)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts.

        Parameters
        ----------
        texts : sequence of str

        Returns
        -------
        ndarray of shape (n, d), float32

        Raises
        ------
        ValueError
            If a text is empty, or the tokenizer knows none of its words.

        Warns
        -----
        UserWarning
            If the tokenizer knows some of its words only.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            check_text(text)
            check_words(self._tokenizer, text, self.name)
        limit = self.network.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            given = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            return F.normalize(self.network.get_text_features(**given).pooler_output, dim=1).cpu().numpy()

    def images(self, images: torch.Tensor | np.ndarray) -> np.ndarray:
        """Embeddings of images, prepared by the model's own image processor.

        Parameters
        ----------
        images : Tensor or array of shape (n, C, H, W), values in [-1, 1]

        Returns
        -------
        ndarray of shape (n, d), float32
        """
        return batched(self._of_pictures)(torch.as_tensor(np.asarray(images)))

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d) of images (n, C, H, W) in [-1, 1], with derivatives.

        The images are resized by torch and not rounded to 8 bits, so that they differ a little from those of `images`.
        """
        side = self.network.config.vision_config.image_size
        x = with_channels(images, 3).to(self.device)
        if x.shape[2:] != (side, side):
            scale = side / min(x.shape[2:])
            size = [round(scale * length) for length in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
            top, left = ((length - side) // 2 for length in x.shape[2:])
            x = x[:, :, top : top + side, left : left + side]
        moments = self._processor.image_mean, self._processor.image_std
        mean, std = (torch.tensor(list(values), device=x.device).view(3, 1, 1) for values in moments)
        x = (x.clamp(-1, 1) / 2 + 0.5 - mean) / std
        return F.normalize(self.network.get_image_features(pixel_values=x).pooler_output, dim=1)

    def scores(self, images: torch.Tensor | np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """CLIP score: cosine of every image with every text, (n, m), float32."""
        return self.images(images) @ self.texts(texts).T

    def classifier(self, prompts: Mapping[str, tuple[str, str]]) -> Classifier:
        """A zero-shot classifier: the probability of an attribute is the softmax over its pair of prompts.

        Parameters
        ----------
        prompts : mapping of str to (str, str)
            Each attribute's prompts with and without it.
        """
        for attribute, pair in prompts.items():
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(
                    f"prompts[{attribute!r}] is {pair!r}; give two texts, with the attribute and without it"
                )
        embedded = torch.from_numpy(self.texts([text for pair in prompts.values() for text in pair])).to(self.device)
        # The softmax over a pair is the sigmoid of the difference of its logits.
        difference = self.network.logit_scale.exp() * (embedded[0::2] - embedded[1::2]).T
        digest = hashlib.sha256(json.dumps([self.hash, list(prompts.items())]).encode()).hexdigest()[:16]
        images = self._of_pictures
        return Classifier(self.name, tuple(prompts), digest, self.device, lambda x: images(x) @ difference, images)

    def _of_pictures(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = prepare(self._processor, batch).to(self.device)
        return F.normalize(self.network.get_image_features(pixel_values=pixels).pooler_output, dim=1)


def load_clip(source: str | Path = "clip", *, device: str | torch.device | None = None) -> Clip:
    """Load a CLIP of transformers: for scores of texts, zero-shot classifiers, S_dir and training by texts.

    Parameters
    ----------
    source : str or path
        "avataaars-clip" (bundled, for the bundled domain), "clip" (openai/clip-vit-base-patch32), a hub id, or a folder
        such as `train_clip` writes.
    device : str or torch.device, optional
        By default the best available.

    Returns
    -------
    Clip

    Raises
    ------
    FileNotFoundError
        If it is neither here nor downloadable.
    ValueError
        If it is a model of another kind, or damaged.
    """
    import transformers  # takes a second or two

    folder = find_folder(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a CLIP")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{source} is a model of type {kind!r}, not a CLIP")
    network = load_network(transformers.CLIPModel, folder, str(source), find_device(device))
    processor = load_processor(folder)
    with unreadable(f"{folder} has no tokenizer that can be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Clip(str(source), network, hash_weights(network), tokenizer, processor)
