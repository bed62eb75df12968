"""What conditional networks are conditioned on: a class, or the tokens of a text; and classifier-free guidance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from workbench.diffusion.stages import TOKENS, Stages


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition of all samples of a model, and of the second pass if it is guided.

    Attributes
    ----------
    values : Tensor of shape (1, L, D), float32, or of shape (1,), int64
        Tokens of a text, or a label.
    negative : Tensor of that shape, optional
        Of the second pass.
    guidance_scale : float
        1 takes the conditional pass alone (Ho and Salimans 2022: 1 + w).
    about : dict
        Prompt and negative prompt, or labels, for provenance.
    encoder : str, optional
        Hash of the weights of the text encoder that read the prompts.
    """

    values: torch.Tensor = field(repr=False)
    negative: torch.Tensor | None = field(default=None, repr=False)
    guidance_scale: float = 1.0
    about: dict = field(default_factory=dict)
    encoder: str | None = None

    @property
    def guided(self) -> bool:
        """Whether there are two passes a sample."""
        return self.guidance_scale != 1.0

    def rows(self, n: int, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Labels and tokens of n samples, one of the two None; with guidance two rows a sample, conditional first."""
        both = torch.cat([self.values, self.negative]) if self.guided else self.values
        rows = both.to(device).repeat(n, *(1,) * (both.ndim - 1))
        return (rows, None) if self.values.ndim == 1 else (None, rows)

    def check(self, network: Stages) -> None:
        """Raise a ValueError unless the network takes this condition."""
        kind, given = network.conditioned_on, "label" if self.values.ndim == 1 else "text"
        if kind is None:
            raise ValueError(f"this network is unconditional and takes no {given}; leave it out")
        if kind != given:
            raise ValueError(f"this network is conditioned on a {kind}, not on a {given}")
        if self.guided and self.negative is None:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; give what it guides away from as negative=")
        for values in (self.values, self.negative):
            if values is not None and given == "text" and values.shape[-1] != network.token_width:
                raise ValueError(
                    f"the tokens are {values.shape[-1]} wide; this network takes (1, L, {network.token_width})"
                )
            if values is not None and given == "label" and network.classes is not None:
                if not 0 <= int(values) < network.classes:
                    raise ValueError(
                        f"label {int(values)} is out of range; this network has 0 to {network.classes - 1}"
                    )

    @property
    def hash(self) -> str:
        """Content hash of the values, or of prompts and their encoder, and the scale of the guidance."""
        digest = hashlib.sha256(str(self.guidance_scale).encode())
        if self.encoder is not None:  # the tokens of a prompt differ in the last digits from processor to processor
            digest.update(json.dumps([self.encoder, self.about], sort_keys=True).encode())
            return digest.hexdigest()[:16]
        for values in (self.values, self.negative):
            if values is not None:
                digest.update(values.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def provenance(self) -> dict:
        """Identity of this condition in files."""
        return {**self.about, "guidance_scale": self.guidance_scale, "hash": self.hash}

    def __str__(self) -> str:
        parts = [f"{name} {value!r}" for name, value in self.about.items() if value not in ("", None)]
        return ", ".join([*parts, f"guidance {self.guidance_scale:g}"] if self.guided else parts)


def blank_condition(network: Stages) -> Condition:
    """A condition without a meaning, of a shape that the network takes: label 0, or tokens of zeros."""
    if network.conditioned_on == "label":
        return Condition(torch.tensor([0]))
    return Condition(torch.zeros(1, TOKENS, network.token_width))


def check_options(network: Stages, *, prompt: str | None = None, negative_prompt: str = "", **options: Any) -> None:
    """Raise a ValueError unless a network takes these options of `Model.conditioned`; prompts are not read."""
    if prompt is not None:
        blank = torch.zeros(1, TOKENS, network.token_width or 1)
        options |= {"tokens": blank, "negative": blank}
    as_condition(**options).check(network)


def as_condition(
    *,
    label: int | None = None,
    tokens: torch.Tensor | None = None,
    negative: int | torch.Tensor | None = None,
    guidance_scale: float | None = None,
    about: dict | None = None,
    encoder: str | None = None,
) -> Condition:
    """A condition from a label, or from tokens (1, L, D) or (L, D); negative is of the same kind."""
    if (label is None) == (tokens is None):
        raise ValueError("give a prompt, a label or a tensor as the condition, and one of them only")
    scale = 1.0 if guidance_scale is None else float(guidance_scale)
    if not 0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale is {guidance_scale}; give a number of 0 or more, 1 for none")

    def values(given) -> torch.Tensor | None:
        if given is None:
            return None
        if label is not None:
            if isinstance(given, bool) or not isinstance(given, Integral):
                raise ValueError(f"a label is a whole number, not {given!r}")
            return torch.tensor([int(given)])
        given = torch.as_tensor(given, dtype=torch.float32)
        given = given[None] if given.ndim == 2 else given
        if given.ndim != 3 or len(given) != 1 or not torch.isfinite(given).all():
            raise ValueError(f"the condition has shape {tuple(given.shape)}; give finite tokens of shape (1, L, D)")
        return given.detach().cpu()

    own, other = values(label if tokens is None else tokens), values(negative)
    if other is not None and other.shape[1:] != own.shape[1:]:
        raise ValueError(f"the negative has shape {tuple(other.shape)}, the condition {tuple(own.shape)}")
    about = about or ({"label": label} | ({} if negative is None else {"negative": negative}) if tokens is None else {})
    return Condition(own, other, scale, about, encoder)
