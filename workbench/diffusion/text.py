"""The text encoder of a text-to-image model: tokens of a prompt, as its network was trained on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from workbench.formats.checkpoints import hash_weights
from workbench.formats.hub import find_folder
from workbench.io import check_text

T5_LENGTH = 77
"""Tokens that DeepFloyd IF gives its network; T5 itself has no limit."""


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and text encoder of a pipeline's folder, read when a prompt is first encoded.

    Attributes
    ----------
    folder : Path
        Has `tokenizer/` and `text_encoder/` of transformers: of CLIP (Stable Diffusion) or T5 (DeepFloyd IF).
    """

    folder: Path

    @cached_property
    def _parts(self) -> tuple:
        import transformers  # slow, and needed for prompts alone

        config = transformers.AutoConfig.from_pretrained(self.folder / "text_encoder", local_files_only=True)
        kinds = {
            "clip_text_model": transformers.CLIPTextModel,
            "clip": transformers.CLIPTextModel,
            "t5": transformers.T5EncoderModel,
        }
        if config.model_type not in kinds:
            raise ValueError(
                f"{self.folder} has a text encoder of the kind {config.model_type!r}; the workbench takes those "
                "of CLIP and T5"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        place = self.folder / "text_encoder"
        encoder = kinds[config.model_type].from_pretrained(place, variant=_variant_of(place), local_files_only=True)
        return tokenizer, encoder.eval().float()

    @cached_property
    def hash(self) -> str:
        """Content hash of the encoder's weights."""
        return hash_weights(self._parts[1])

    @property
    def width(self) -> int:
        """D of the tokens."""
        config = self._parts[1].config
        return config.d_model if config.model_type == "t5" else config.hidden_size

    def tokenise(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokens (n, L) of texts, padded to the length that the network was trained on, or cut off there."""
        tokenizer, encoder = self._parts
        length = T5_LENGTH if encoder.config.model_type == "t5" else tokenizer.model_max_length
        return tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states (n, L, D), float32, of tokens (n, L)."""
        tokenizer, encoder = self._parts
        masked = encoder.config.model_type == "t5" or getattr(encoder.config, "use_attention_mask", False)
        return encoder(ids, attention_mask=(ids != tokenizer.pad_token_id).long() if masked else None)[0]

    def tokens(self, text: str, *, empty: bool = False) -> torch.Tensor:
        """Last hidden state of the text encoder, padded to the length that the network was trained on.

        Parameters
        ----------
        text : str
        empty : bool
            Allow an empty text, as a negative prompt is by default.

        Returns
        -------
        Tensor of shape (1, L, D), float32

        Raises
        ------
        ValueError
            If the text is empty, or no words are known to the tokenizer.

        Warns
        -----
        UserWarning
            If the text is too long and its end is cut off, or the tokenizer knows some of its words only.
        """
        if not (empty and text == ""):
            check_text(text)
        tokenizer, encoder = self._parts
        if encoder.config.model_type == "t5":
            text = text.lower().strip()  # as IF's own pipeline does
        ids = self.tokenise([text])
        if text.strip():
            check_words(tokenizer, text, self.folder.name)
        if len(tokenizer(text).input_ids) > ids.shape[1]:
            warnings.warn(f"the prompt has more than {ids.shape[1]} tokens; its end is cut off", stacklevel=3)
        return self.encode(ids)


def _variant_of(folder: Path) -> str | None:
    """Variant of a folder's weights, such as fp16; None where there are some without one."""
    name = r"(?:pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    variants = {found[1] for path in folder.iterdir() if (found := re.fullmatch(name, path.name))}
    return None if None in variants else min(variants, default=None)


def check_words(tokenizer: Any, text: str, name: str) -> None:
    """Raise a ValueError if a tokenizer knows no word of a text, and warn if it knows some only."""
    ids = tokenizer(text).input_ids
    if not set(ids).difference(tokenizer.all_special_ids):
        raise ValueError(f"the tokenizer of {name} knows no word of {text!r}")
    if tokenizer.unk_token_id in ids and tokenizer.unk_token_id not in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        unknown = [w for w in re.findall(r"[^\W\d_]+", text) if tokenizer.unk_token_id in tokenizer(w).input_ids]
        warnings.warn(f"the tokenizer of {name} does not know {', '.join(map(repr, unknown))}", stacklevel=4)


def copy_text_encoder(source: str | Path, out: Path) -> TextEncoder:
    """Write the tokenizer and the text encoder of a CLIP (a folder or hub id) as parts of a pipeline's folder."""
    import transformers

    folder = find_folder(source)
    transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out / "tokenizer")
    transformers.CLIPTextModel.from_pretrained(folder, local_files_only=True).save_pretrained(out / "text_encoder")
    return TextEncoder(out)
