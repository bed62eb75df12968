"""The text encoder of a text-to-image model: tokens of a prompt, as its network was trained on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

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
        try:
            import transformers
        except ImportError as error:
            raise ValueError("prompts need transformers; install hspace-workbench[hf]") from error
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
        encoder = kinds[config.model_type].from_pretrained(self.folder / "text_encoder", local_files_only=True)
        return tokenizer, encoder.eval().float()

    @torch.no_grad()
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
            If the text is too long and its end is cut off.
        """
        if not isinstance(text, str) or not (text.strip() or empty):
            raise ValueError(f"the prompt is {text!r}; give a text of at least one word")
        tokenizer, encoder = self._parts
        t5 = encoder.config.model_type == "t5"
        length = T5_LENGTH if t5 else tokenizer.model_max_length
        text = text.lower().strip() if t5 else text  # as IF's own pipeline does
        given = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if len(tokenizer(text).input_ids) > length:
            warnings.warn(f"the prompt has more than {length} tokens; its end is cut off", stacklevel=3)
        known = set(given.input_ids[0].tolist()) - set(tokenizer.all_special_ids)
        if not known and text.strip():
            raise ValueError(f"the tokenizer of {self.folder.name} knows no word of {text!r}")
        masked = t5 or getattr(encoder.config, "use_attention_mask", False)
        return encoder(given.input_ids, attention_mask=given.attention_mask if masked else None)[0]
