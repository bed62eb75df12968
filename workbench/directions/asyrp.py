"""Directions of Asyrp (Kwon et al. 2023, arXiv 2210.10960): small networks that give Delta h from h and t.

    Delta h_t = f_t(h_t, t)

Its checkpoints hold a network of two 1 x 1 convolutions, one kind for the original DDPM and one for guided-diffusion.
Each was trained for one model, and its file does not name the model: a function runs with every model of its widths,
but is meaningful only for its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from workbench.diffusion.models import Model, refuse_other_model
from workbench.directions.direction import Direction, origin_of
from workbench.formats.checkpoints import read_tensors
from workbench.hspace.store import HStore
from workbench.io import as_json, written
from workbench.paths import local, writable

GROUPS = 32
"""Groups of a block's normalisation; fewer where they do not divide the channels, as in no published block."""

TRAINED_STEPS = 40
"""Steps that the published blocks were trained with; with more steps each does less."""

_KINDS = {"ddpm": ("conv1", "temb_proj"), "guided": ("in_layers.2", "emb_layers.1")}
"""The first convolution, and the projection of the timestep, in each kind of file."""


_METADATA = "workbench-delta-block"


class DeltaBlock(nn.Module):
    """f_t of one attribute: Delta h of h, (n, C, h, w), and the network's embedding of the timestep, (n, E).

    Its layers have their names in the file; "ddpm" and "guided" are the networks that blocks were trained with.
    """

    def __init__(self, kind: str, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.kind = kind
        project, convolve = nn.Linear(emb_channels, channels), partial(nn.Conv2d, channels, channels, 1)
        groups = math.gcd(GROUPS, channels)
        if kind == "ddpm":
            self.conv1, self.temb_proj = convolve(), project
            self.norm2, self.conv2 = nn.GroupNorm(groups, channels, eps=1e-6), convolve()
        else:
            norm = partial(nn.GroupNorm, groups, channels)
            self.in_layers = nn.Sequential(norm(), nn.SiLU(), convolve())
            self.emb_layers = nn.Sequential(nn.SiLU(), project)
            self.out_layers = nn.Sequential(norm(), nn.SiLU(), nn.Identity(), convolve())

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.kind == "ddpm":
            y = self.conv1(h) + self.temb_proj(F.silu(emb))[:, :, None, None]
            return self.conv2(F.silu(self.norm2(y)))
        return self.out_layers(self.in_layers(h) + self.emb_layers(emb)[:, :, None, None])

    @classmethod
    def of_weights(cls, weights: Mapping[str, torch.Tensor]) -> DeltaBlock:
        """The block of a file's weights; ValueError if they are another network's."""
        kind = next((kind for kind, (first, _) in _KINDS.items() if f"{first}.weight" in weights), None)
        if kind is None:
            some = ", ".join(map(str, list(weights)[:3])) or "nothing"
            raise ValueError(f"it has neither conv1 nor in_layers.2, but {some}")
        first, project = (weights.get(f"{layer}.weight", torch.empty(0, 0)) for layer in _KINDS[kind])
        with torch.device("meta"):  # initial weights would be drawn from the global generator
            block = cls(kind, first.shape[0], project.shape[-1])
        try:
            block.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return block.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class DeltaFunction:
    """Delta h as a function of h and t: a weighted sum of DeltaBlocks; made by `load_asyrp`, used by `edit`.

    `2 * smiling + glasses` is a DeltaFunction too. Asyrp divides the sum over m attributes by sqrt(m).

    Attributes
    ----------
    model : Model
        Gives the embedding of the timestep.
    terms : tuple of (float, DeltaBlock)
    name : str
    sources : tuple of str
        SHA-256 of the files.
    training : dict or None
        Of one that `train_asyrp` made: its texts, settings and losses.
    """

    model: Model = field(repr=False)
    terms: tuple[tuple[float, DeltaBlock], ...] = field(repr=False)
    name: str
    sources: tuple[str, ...] = field(repr=False)
    training: dict | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """Number of steps that it was trained with; 40 if a file does not say, as the published ones."""
        return (self.training or {}).get("steps", TRAINED_STEPS)

    def __call__(self, h: torch.Tensor, t: int) -> torch.Tensor:
        """Delta h at timestep `t`.

        Parameters
        ----------
        h : Tensor of shape (n, C, h, w), on the model's device
        t : int

        Returns
        -------
        Tensor of shape (n, C, h, w), float32
        """
        emb = self.model.unet.embed(t, len(h)).float()
        return cast(torch.Tensor, sum(factor * block(h.float(), emb) for factor, block in self.terms))

    def __mul__(self, factor: float) -> DeltaFunction:
        """The function whose Delta h is `factor` times as long."""
        if not isinstance(factor, Real):
            return NotImplemented
        terms = tuple((float(factor) * own, block) for own, block in self.terms)
        return replace(self, terms=terms, name=f"{factor:g} {self.name}")

    __rmul__ = __mul__

    def __neg__(self) -> DeltaFunction:
        return replace(self * -1.0, name=f"-{self.name}")

    def __add__(self, other: DeltaFunction) -> DeltaFunction:
        """Sum of two functions, at the trained strength of each.

        The sum has the `training` of the first; the other's Delta h is rescaled by its own `steps` over the first's.
        """
        if not isinstance(other, DeltaFunction):
            return NotImplemented
        other.check_fits(self.model)
        return replace(
            self,
            terms=self.terms + tuple((factor * other.steps / self.steps, block) for factor, block in other.terms),
            name=f"{self.name} + {other.name}",
            sources=self.sources + other.sources,
        )

    def save(self, path: str | Path) -> Path:
        """Write the function, for `load_asyrp`.

        Parameters
        ----------
        path : path
            `.pth`: as Asyrp writes its blocks, without the model and the number of steps that they belong to.
            `.safetensors`: with both, so that another model is refused.

        Returns
        -------
        Path

        Raises
        ------
        ValueError
            If the function is a combination (a file holds a single block), or the suffix is neither .pth nor
            .safetensors.
        """
        path = writable(path, suffixes=(".pth", ".safetensors"))
        (factor, block), *others = self.terms
        if others or factor != 1.0:
            raise ValueError(f"{self.name} is a combination of {len(self.terms)} blocks; save each block by itself")
        state = {name: weight.detach().cpu().contiguous() for name, weight in block.state_dict().items()}
        with written(path) as partial:
            if path.suffix == ".pth":
                torch.save({"0": state}, partial)
            else:
                about = {"name": self.name, "model": self.model.provenance(), "training": self.training}
                save_file(state, partial, {_METADATA: as_json(about)})
        return path

    def mean(self, store: HStore, *, progress: bool = True) -> Direction:
        """Mean of Delta h_t over samples, as an ordinary direction, one unit of which is one sigma of the samples.

        Parameters
        ----------
        store : HStore
            Samples of the model, with the timesteps of the direction.
        progress : bool

        Returns
        -------
        Direction

        Raises
        ------
        ValueError
            If the store has another model or tap.
        """
        self.check_fits(self.model)
        refuse_other_model(str(store.path), store.provenance["model"], self.model.provenance())
        means, device = [], self.model.device
        with torch.inference_mode():
            for t in tqdm(store.timesteps, desc="averaging", disable=not progress, delay=2, leave=False):
                total = torch.zeros(self.model.h_shape, dtype=torch.float64)
                for batch in store.batches(t):
                    h = torch.from_numpy(batch).unflatten(1, self.model.h_shape).to(device)
                    total += self(h, t).cpu().double().sum(0)  # MPS has no float64
                means.append(total / len(store))
        parameters = {"files": list(self.sources), "factors": [factor for factor, _ in self.terms], "n": len(store)}
        direction = Direction.from_delta(
            torch.stack(means),
            timesteps=store.timesteps,
            name=self.name,
            provenance={**origin_of(store), "method": "asyrp mean", "parameters": parameters},
        )
        return direction.calibrated(store, progress=progress)

    def check_fits(self, model: Model) -> None:
        """Raise unless the model has the weights, widths and tap that the function was loaded for.

        Raises
        ------
        ValueError
            Names the difference.
        """
        own, remedy = self.model.provenance(), "load it for this model"
        refuse_other_model(self.name, own, model.provenance(), tap=False, condition=False, remedy=remedy)
        if model.tap != "after":
            raise ValueError(f'{self.name} edits h "after" the mid block; use model.tapped("after")')


def load_asyrp(path: str | Path, model: Model) -> DeltaFunction:
    """Read a DeltaBlock of a `.pth` file of Asyrp, or of a file of `DeltaFunction.save`, without executing anything.

    Parameters
    ----------
    path : path
    model : Model
        The model that it was trained with, which the file does not name. With another model of the same widths, its
        edits are meaningless.

    Returns
    -------
    DeltaFunction
        Named as in its file, or by the attribute at the start of a file name of Asyrp ("smiling_LC_CelebA_HQ_t999...").

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a file of Asyrp, or its widths are not the model's.
    """
    path = local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .pth file of Asyrp")
    content = read_tensors(path)
    own = _read_about(path)
    if own is not None:
        refuse_other_model(str(path), own["model"], model.provenance(), condition=False)
        content = {"0": content}
    weights = content.get("0") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        plain = isinstance(weights, torch.Tensor)
        raise ValueError(
            f"{path} has no DeltaBlock '0'"
            + ("; it holds a plain Delta h, which is no function of h" if plain else " as Asyrp saves them")
        )
    try:
        block = DeltaBlock.of_weights(weights)
    except ValueError as error:
        raise ValueError(f"{path} holds no DeltaBlock of Asyrp: {error}") from error
    taken = tuple(block.get_submodule(_KINDS[block.kind][1]).weight.shape)
    with torch.no_grad():
        given = model.h_shape[0], model.unet.embed(0, 1).shape[1]
    if taken != given:
        raise ValueError(
            f"{path} takes h of {taken[0]} channels and an embedding of {taken[1]}; {model.name} has {given[0]} and "
            f"{given[1]}"
        )
    name = own["name"] if own else re.split(r"_LC_|\.", path.name)[0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    function = DeltaFunction(model, ((1.0, block.to(model.device)),), name, (digest,), own and own["training"])
    function.check_fits(model)
    return function


def _read_about(path: Path) -> dict | None:
    """What `DeltaFunction.save` wrote beside the weights; None of a file of Asyrp."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get(_METADATA)
    if about is None:
        raise ValueError(f"{path} holds no DeltaBlock; give a .pth file of Asyrp, or one that DeltaFunction.save wrote")
    return json.loads(about)
