"""A classifier: a function from images to a table of probabilities of named attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import zarr
from tqdm.auto import tqdm

from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.images import warn_of_unit_range
from workbench.diffusion.parallel import in_threads, split
from workbench.shapes import eight_bit

Images = torch.Tensor | np.ndarray | zarr.Array | LabelledImages
"""Images of shape (n, C, H, W), values in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A function from images to probabilities of named attributes; made by `load_classifier`.

    Attributes
    ----------
    name : str
    attributes : tuple of str
        Columns of the tables, in order.
    hash : str or None
        Content hash of the weights (and prompts); None for a function that has none.
    device : torch.device
        Where the network runs. Images may be anywhere, results are numpy and pandas.
    """

    name: str
    attributes: tuple[str, ...]
    hash: str | None
    device: torch.device
    _score: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    _features: Callable[[torch.Tensor], torch.Tensor] | None = field(repr=False)
    _to_probability: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.sigmoid, repr=False)
    _maps: Callable[[torch.Tensor], list[torch.Tensor]] | None = field(default=None, repr=False)

    def __call__(self, images: Images, *, batch_size: int = 64, progress: bool = True) -> pd.DataFrame:
        """Probability of every attribute.

        Parameters
        ----------
        images : Tensor, ndarray or zarr array of shape (n, C, H, W), values in [-1, 1], or LabelledImages
            Of any size; networks for colours see grey images as colours, and of more channels the first three.
            Values beyond the range, as generated images have them, are clamped.
        batch_size : int
            Images per pass.
        progress : bool
            Show a bar if it takes more than two seconds.

        Returns
        -------
        pandas.DataFrame of shape (n, attributes), float64, values in [0, 1]
            Index: 0..n-1, or the file names of LabelledImages.

        Raises
        ------
        ValueError
            If the images are not finite floats of this shape, or look like 8-bit values.
        """
        scores = self._collect(self._score, images, batch_size=batch_size, progress=progress)
        return self._table(self._to_probability(scores), images)

    def scores(self, images: Images, *, batch_size: int = 64, progress: bool = True) -> pd.DataFrame:
        """Logits, which keep an order where probabilities are 0 or 1 to the last digit; arguments as of a call.

        Returns
        -------
        pandas.DataFrame of shape (n, attributes), float64
            Log odds; for a network of exclusive classes, the inputs of its softmax.
        """
        return self._table(self._collect(self._score, images, batch_size=batch_size, progress=progress), images)

    def features(self, images: Images, *, batch_size: int = 64, progress: bool = True) -> np.ndarray:
        """Inputs of the network's last layer, for distances between images or sets of them; arguments as in a call.

        Returns
        -------
        ndarray of shape (n, d), float32

        Raises
        ------
        ValueError
            If the classifier is a function, which has no inside.
        """
        if self._features is None:
            raise ValueError(f"{self.name} is a function and has no features; take a bundled classifier or a network")
        return self._collect(self._features, images, batch_size=batch_size, progress=progress).float().numpy()

    def maps(self, images: Images, *, batch_size: int = 64) -> list[np.ndarray]:
        """Feature maps of every stage of the network, for perceptual distances; arguments as in a call.

        Returns
        -------
        list of ndarray of shape (n, C_l, H_l, W_l), float32
            One per stage, finest first.

        Raises
        ------
        ValueError
            If the classifier is not a network of this project's, whose stages are known.
        """
        if self._maps is None:
            raise ValueError(f"the stages of {self.name} are not known; take a classifier that train_classifier wrote")
        with torch.inference_mode():
            stages = [[stage.cpu().numpy() for stage in self._maps(batch)] for batch in _read(images, batch_size)]
        return [np.concatenate(parts) for parts in zip(*stages, strict=True)]

    @torch.inference_mode()
    def _collect(self, function, images, *, batch_size: int, progress: bool) -> torch.Tensor:
        outputs, lowest, highest = [], np.inf, -np.inf
        bar = tqdm(total=_count(images), desc=self.name, unit="image", delay=2, leave=False, disable=not progress)
        with bar:
            for batch in _read(images, batch_size):
                outputs.append(self._in_threads(function, batch).cpu().double())
                lowest, highest = min(lowest, float(batch.min())), max(highest, float(batch.max()))
                bar.update(len(batch))
        if not isinstance(images, LabelledImages):
            warn_of_unit_range(lowest, highest)
        return torch.cat(outputs)

    def _in_threads(self, function, batch: torch.Tensor) -> torch.Tensor:
        """`function` of a batch; a network of this project's splits its images over the cores of a CPU."""
        if self.device.type != "cpu" or self._maps is None:
            return function(batch)
        return torch.cat(in_threads(lambda rows: function(batch[rows]), split(len(batch), batch.shape[1:])))

    def _table(self, values: torch.Tensor, images) -> pd.DataFrame:
        index = images.labels.index if isinstance(images, LabelledImages) else None
        return pd.DataFrame(values.numpy(), index=index, columns=list(self.attributes))

    def __repr__(self) -> str:
        known = ", ".join(self.attributes[:3]) + (", ..." if len(self.attributes) > 3 else "")
        weights = f"weights {self.hash}" if self.hash else "a function"
        return f"Classifier({self.name!r}: {len(self.attributes)} attributes {known}, {self.device}, {weights})"


def _count(images) -> int:
    """Number of images, of the right shape."""
    if isinstance(images, LabelledImages):
        n = len(images)
    else:
        shape = tuple(getattr(images, "shape", ()))
        if len(shape) != 4 or shape[1] > max(3, shape[3]):  # channels last
            given = f"have shape {shape}" if shape else f"are a {type(images).__name__}"
            raise ValueError(
                f"images {given}; give a Tensor or array of shape (n, C, H, W), or LabelledImages "
                "(a single image is images[None])"
            )
        n = shape[0]
    if n == 0:
        raise ValueError("there are no images; give 1 or more")
    return n


def _read(images, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of the images: float32 on the CPU, in [-1, 1]."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more")
    for start in range(0, _count(images), batch_size):
        batch = images[start : start + batch_size]
        batch = batch.detach().cpu() if isinstance(batch, torch.Tensor) else torch.from_numpy(np.asarray(batch))
        if not batch.is_floating_point():
            raise ValueError(f"images are {batch.dtype}; give floats in [-1, 1], for 8-bit images x / 127.5 - 1")
        if not torch.isfinite(batch).all():
            raise ValueError(f"images {start} to {start + len(batch) - 1} hold NaN or infinite values")
        if eight_bit(float(batch.min()), most := float(batch.max())):
            raise ValueError(f"images reach {most:g}; give values in [-1, 1], for 8-bit images x / 127.5 - 1")
        yield batch.float().clamp(-1, 1)
