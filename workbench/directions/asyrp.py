"""Directions of Asyrp (Kwon et al. 2023, arXiv 2210.10960): small networks that give Delta h from h and t.

    Delta h_t = f_t(h_t, t)

Its checkpoints hold a network of two 1 x 1 convolutions, one kind for the original DDPM and one for guided-diffusion.
They were trained on one set of weights each, which the file does not name: a function fits every model of its widths,
and means something for its own model alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.directions.direction import Direction, origin_of
from workbench.formats.checkpoints import read_tensors
from workbench.hspace.store import HStore
from workbench.paths import local

# Names of the layers: norm and convolution in, projection of the timestep, norm and convolution out.
_LAYOUTS = {
    "ddpm": (None, "conv1", "temb_proj", "norm2", "conv2"),
    "guided": ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"),
}
_EPS = {"ddpm": 1e-6, "guided": 1e-5}
_GROUPS = 32


@dataclass(frozen=True, eq=False)
class DeltaBlock:
    """f_t of one attribute.

    Attributes
    ----------
    layout : {"ddpm", "guided"}
        The kind of network that it was trained with.
    weights : dict of str -> Tensor, float32
        By their names in the file.
    """

    layout: str
    weights: dict[str, torch.Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        # The first layer's own width is what all the others must have.
        channels = self.weights[f"{_LAYOUTS[self.layout][1]}.weight"].shape[0]
        emb = self.weights[f"{_LAYOUTS[self.layout][2]}.weight"].shape[-1]
        for name, shape in self._shapes(channels, emb).items():
            if name not in self.weights:
                raise ValueError(f"{name} is missing; a DeltaBlock has it as {shape}")
            if tuple(self.weights[name].shape) != shape:
                raise ValueError(f"{name} is {tuple(self.weights[name].shape)}; this DeltaBlock has it as {shape}")
        extra = sorted(set(self.weights) - set(self._shapes(channels, emb)))
        if extra:
            raise ValueError(f"{extra[0]} has no place in a DeltaBlock")

    @property
    def channels(self) -> int:
        """Of the h that it takes."""
        return self.weights[f"{_LAYOUTS[self.layout][1]}.weight"].shape[0]

    @property
    def emb_channels(self) -> int:
        """Of the embedding of the timestep that it takes."""
        return self.weights[f"{_LAYOUTS[self.layout][2]}.weight"].shape[1]

    def __call__(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Delta h.

        Parameters
        ----------
        h : Tensor of shape (n, C, h, w)
        emb : Tensor of shape (n, E)
            The network's own embedding of the timestep.

        Returns
        -------
        Tensor of shape (n, C, h, w)
        """
        norm_in, conv_in, project, norm_out, conv_out = _LAYOUTS[self.layout]
        y = h if norm_in is None else F.silu(self._norm(norm_in, h))
        y = self._conv(conv_in, y)
        y = y + F.linear(F.silu(emb), *self._pair(project))[:, :, None, None]
        return self._conv(conv_out, F.silu(self._norm(norm_out, y)))

    def to(self, device: torch.device) -> DeltaBlock:
        """The same block on another device."""
        return replace(self, weights={name: weight.to(device) for name, weight in self.weights.items()})

    def _shapes(self, channels: int, emb: int) -> dict[str, tuple[int, ...]]:
        norm_in, conv_in, project, norm_out, conv_out = _LAYOUTS[self.layout]
        conv, norm = (channels, channels, 1, 1), (channels,)
        of = {norm_in: norm, conv_in: conv, project: (channels, emb), norm_out: norm, conv_out: conv}
        return {
            f"{layer}.{part}": shape if part == "weight" else (channels,)
            for layer, shape in of.items()
            if layer is not None
            for part in ("weight", "bias")
        }

    def _pair(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]

    def _conv(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, *self._pair(layer))

    def _norm(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, _GROUPS, *self._pair(layer), eps=_EPS[self.layout])


@dataclass(frozen=True, eq=False)
class DeltaFunction:
    """Delta h as a function of h and t: a weighted sum of DeltaBlocks; made by `load_asyrp`, used by `edit`.

    `2 * smiling + glasses` is one too. Asyrp divides the sum over m attributes by sqrt(m).

    Attributes
    ----------
    model : Model
        Gives the embedding of the timestep.
    terms : tuple of (float, DeltaBlock)
    name : str
    sources : tuple of str
        SHA-256 of the files.
    """

    model: Model = field(repr=False)
    terms: tuple[tuple[float, DeltaBlock], ...] = field(repr=False)
    name: str
    sources: tuple[str, ...] = field(repr=False)

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
        return sum(factor * block(h.float(), emb) for factor, block in self.terms)

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
        """The function that adds what both add."""
        if not isinstance(other, DeltaFunction):
            return NotImplemented
        other.check_fits(self.model)
        return replace(
            self,
            terms=self.terms + other.terms,
            name=f"{self.name} + {other.name}",
            sources=self.sources + other.sources,
        )

    def mean(self, store: HStore, *, calibrate: bool = True, progress: bool = True) -> Direction:
        """The mean of Delta h_t over samples, as an ordinary direction.

        Parameters
        ----------
        store : HStore
            Samples of the model, with the timesteps of the direction.
        calibrate : bool, default True
            Make one unit of scale one standard deviation of the samples, as for every other method. Otherwise one unit
            adds the mean of Delta h itself, the strength that it was trained at.
        progress : bool

        Returns
        -------
        Direction

        Raises
        ------
        ValueError
            If the store is of another model or tap.
        """
        self.check_fits(self.model)
        own, other = self.model.provenance(), store.provenance["model"]
        if own | {"name": None} != other | {"name": None}:
            raise ValueError(
                f"{store.path} is not of {self.model.name!r} tapped {self.model.tap!r} the mid block; extract from the "
                "model that the function was loaded for"
            )
        means, device = [], self.model.device
        with torch.inference_mode():
            for t in tqdm(store.timesteps, desc="averaging", disable=not progress, delay=2, leave=False):
                total = torch.zeros(self.model.h_shape, dtype=torch.float64)
                for batch in store.batches(t):
                    h = torch.from_numpy(batch).unflatten(1, self.model.h_shape).to(device)
                    total += self(h, t).double().sum(0).cpu()
                means.append(total / len(store))
        parameters = {"files": list(self.sources), "factors": [factor for factor, _ in self.terms], "n": len(store)}
        direction = Direction.from_delta(
            torch.stack(means),
            timesteps=store.timesteps,
            name=self.name,
            provenance={**origin_of(store), "method": "asyrp mean", "parameters": parameters},
        )
        return direction.calibrated(store, progress=progress) if calibrate else direction

    def check_fits(self, model: Model) -> None:
        """Refuse a model of other weights, widths or tap than the function was loaded for.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        if model.hash != self.model.hash:
            raise ValueError(
                f"{self.name} was loaded for {self.model.name!r} (weights {self.model.hash}), not for {model.name!r} "
                f"(weights {model.hash}); load it for this model"
            )
        if model.tap != "after":
            raise ValueError(f'{self.name} edits h "after" the mid block; use model.tapped("after")')


def load_asyrp(path: str | Path, model: Model, *, index: int = 0, name: str | None = None) -> DeltaFunction:
    """Read a DeltaBlock of a `.pth` file of Asyrp, without executing anything.

    Parameters
    ----------
    path : path
    model : Model
        The model that it was trained with. The file does not name it; of a model of the same widths that it was not
        trained with, the edits mean nothing.
    index : int, default 0
        Which block, of a file with several.
    name : str, optional
        By default the attribute that the file's name begins with ("smiling_LC_CelebA_HQ_t999...").

    Returns
    -------
    DeltaFunction

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is none of Asyrp's, or its widths are not the model's.
    """
    path = local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .pth file of Asyrp")
    content = read_tensors(path)
    weights = content.get(str(index)) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        plain = isinstance(weights, torch.Tensor)
        raise ValueError(
            f"{path} has no DeltaBlock {str(index)!r}"
            + ("; it holds a plain Delta h, which is no function of h" if plain else " as Asyrp saves them")
        )
    layout = next((kind for kind, layers in _LAYOUTS.items() if f"{layers[1]}.weight" in weights), None)
    if layout is None:
        raise ValueError(f"{path} holds no DeltaBlock; it has neither conv1 nor in_layers.2, but {_some(weights)}")
    try:
        block = DeltaBlock(layout, {key: weight.float() for key, weight in weights.items()})
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no DeltaBlock of Asyrp: {error}") from error
    emb = model.unet.unet.time_embedding.linear_2.out_features
    if (block.channels, block.emb_channels) != (model.h_shape[0], emb):
        raise ValueError(
            f"{path} takes h of {block.channels} channels and an embedding of {block.emb_channels}; {model.name} has "
            f"{model.h_shape[0]} and {emb}"
        )
    name = re.split(r"_LC_|\.", path.name)[0] if name is None else name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    function = DeltaFunction(model, ((1.0, block.to(model.device)),), name, (digest,))
    function.check_fits(model)
    return function


def _some(weights: Mapping) -> str:
    return ", ".join(map(str, list(weights)[:3])) or "nothing"
