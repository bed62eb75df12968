"""Cells of a benchmark: one method, one attribute, one population, found, measured and kept.

A cell is found and measured by itself, from its parameters alone, and kept on disk under a digest of all that it
depends on. So a benchmark that was cut short goes on where it stopped, and one with a new method measures that alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from workbench import paths
from workbench.analysis.image_metrics import (
    cosine_similarity,
    directional_similarity,
    peak_signal_to_noise,
    perceptual_distance,
    segmentation_consistency,
)
from workbench.benchmark.methods import METHODS
from workbench.benchmark.protocol import HELD_OUT, LADDER, Protocol
from workbench.benchmark.study import Method, Study, TextModels, digest_of_mask, found_edit
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.images import to_bytes
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, sample
from workbench.editing.edits import Edit, NotApplicable
from workbench.editing.render import run_plans
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.io import code_hash, one_of

SAME_COLOUR = 0.2
"""Largest difference of a channel, in [-1, 1], between the backdrop and a pixel that belongs to it."""

PIXEL_COMPONENTS = 64
"""Principal components of real images' pixels: the feature space of no network."""


@dataclass(frozen=True, eq=False)
class Bench:
    """All that cells share: who labels, who judges, who is edited. Parameters as of `run_benchmark`."""

    model: Model
    protocol: Protocol
    labeller: Classifier = field(repr=False)
    judge: Classifier = field(repr=False)
    images: LabelledImages = field(repr=False)
    masks: dict[str, np.ndarray] = field(repr=False)
    texts: TextModels | None = field(default=None, repr=False)
    segmenter: Callable[[torch.Tensor], np.ndarray] | None = field(default=None, repr=False)
    _studies: dict[int, Study] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        p = self.protocol
        if self.judge is self.labeller or (self.judge.hash is not None and self.judge.hash == self.labeller.hash):
            raise ValueError("the judge is the labeller; give another classifier as judge")
        shared = [name for name in self.judge.attributes if name in self.labeller.attributes]
        for what, given, known in (("method", p.methods, METHODS), ("attribute", p.attributes, shared)):
            for name in given:
                one_of(what, name, known)
        if min(p.population, p.held_out) < 8 or p.repeats < 1 or not 0 <= p.shown <= p.held_out:
            raise ValueError(
                f"population is {p.population}, held_out {p.held_out}, repeats {p.repeats} and shown {p.shown}; give 8 "
                "samples or more, 1 population or more, and show no more than are held out"
            )
        if p.labelled > len(self.images) // 2:
            raise ValueError(f"labelled is {p.labelled}; keep half of {len(self.images)} images as real images")

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Every method, attribute and population; those of one population follow each other, as they share it."""
        p = self.protocol
        return ((m, a, r) for r in range(p.repeats) for m in p.methods for a in p.attributes)

    def measure(self, method: str, attribute: str, repeat: int) -> Cell:
        """Find and measure one cell, or read it from the cache."""
        found = METHODS[method]
        if not self.kept:
            return self._measured(found, attribute, repeat)
        known = self._inputs(found, attribute, repeat)
        path = _path(known)
        if path.is_file():
            return Cell.read(path, known)
        cell = self._measured(found, attribute, repeat)
        save_tensors(path, cell.tensors, {"about": cell.about, "inputs": known}, kind="cell")
        return cell

    def measured(self, method: str, attribute: str, repeat: int) -> bool:
        """Whether a cell is in the cache."""
        return self.kept and _path(self._inputs(METHODS[method], attribute, repeat)).is_file()

    @property
    def kept(self) -> bool:
        """Whether cells are kept: those of a network that is a function can't be told from another's."""
        return None not in (self.labeller.hash, self.judge.hash) and self.segmenter is None

    def study(self, repeat: int) -> Study:
        """Study of one population, for methods to learn from."""
        if repeat not in self._studies:
            p = self.protocol
            visited = self.model.schedule.timesteps(p.steps)
            self._studies.clear()
            self._studies[repeat] = Study(
                self.model,
                self.labeller,
                attributes=self.labeller.attributes,
                n=p.population,
                seed=p.seed + repeat * p.population,
                steps=p.steps,
                eta=p.eta,
                t=min(visited, key=lambda t: abs(t - p.t * self.model.schedule.T / 1000)),
                images=self.images.select(slice(p.labelled)),
                masks=self.masks,
                texts=self.texts,
            )
        return self._studies[repeat]

    @property
    def code(self) -> str:
        """Digest of all code that finds and measures."""
        return code_hash(__name__)

    @cached_property
    def held_out(self) -> Trajectory:
        p = self.protocol
        seeds = range(HELD_OUT + p.seed, HELD_OUT + p.seed + p.held_out)
        return sample(self.model, seeds, steps=p.steps, eta=p.eta, record_x=True, progress=False)

    @cached_property
    def _finer(self) -> Trajectory:
        p, visited = self.protocol, self.held_out.timesteps
        # Every timestep of the others and one between each two: methods that act at one find theirs.
        between = [(a + b) // 2 for a, b in zip(visited, visited[1:], strict=False)]
        steps = sorted({*visited, *between}, reverse=True)
        seeds = self.held_out.seeds[: p.held_out // 2]
        return sample(self.model, seeds, steps=steps, eta=p.eta, record_x=True, progress=False)

    @cached_property
    def plain(self) -> dict[str, Any]:
        """Judge's readings of the held-out samples."""
        images = self.held_out.images
        return {
            "scores": self._logits(images),
            "embedded": None if self.texts is None else self.texts.clip.images(images.clamp(-1, 1)),
            "features": self.judge.features(images),
            "maps": self.judge.maps(images),
            "segments": None if self.segmenter is None else self.segmenter(images.clamp(-1, 1)),
        }

    @cached_property
    def real(self) -> torch.Tensor:
        """Real images that nothing was learned from, an even number."""
        unseen = len(self.images) - self.protocol.labelled
        n = min(unseen, 1000) // 2 * 2
        return self.images.at_size(self.model.image_shape)[len(self.images) - n :]

    @cached_property
    def pixels(self) -> PCA:
        pixels = self.real.flatten(1).numpy()
        return PCA(min(PIXEL_COMPONENTS, len(pixels) - 1), random_state=0).fit(pixels)

    @cached_property
    def _labels(self) -> str:
        """Digest of the images' labels, which methods may learn from."""
        text = self.images.labels.iloc[: self.protocol.labelled].to_csv()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shown(self) -> list[int]:
        """Positions of the held-out samples that are shown: drawn by the seed, none picked."""
        rng = np.random.default_rng(self.protocol.seed)
        return np.sort(rng.choice(self.protocol.held_out, self.protocol.shown, replace=False)).tolist()

    def _logits(self, images: torch.Tensor) -> np.ndarray:
        return self.judge.scores(images)[list(self.judge.attributes)].to_numpy()

    def _inputs(self, method: Method, attribute: str, repeat: int) -> dict:
        """All that a cell depends on, as JSON can hold it."""
        p, mask = self.protocol, self.masks.get(attribute)
        return {
            "code": self.code,
            "model": self.model.provenance(),
            "precision": str(self.model.dtype),
            "labeller": [self.labeller.name, self.labeller.hash, list(self.labeller.attributes)],
            "judge": [self.judge.name, self.judge.hash, list(self.judge.attributes)],
            "images": [self.images.fingerprint, self._labels],
            "method": [method.name, method.code, method.scale, method.limit],
            "attribute": attribute,
            "repeat": repeat,
            "texts": self.texts and self.texts.inputs(attribute),
            "mask": None if mask is None else digest_of_mask(mask),
            "protocol": {
                key: value for key, value in vars(p).items() if key not in ("methods", "attributes", "repeats")
            },
        }

    def _measured(self, method: Method, attribute: str, repeat: int) -> Cell:
        study = self.study(repeat)
        study.cost.clear()
        start = time.perf_counter()
        try:
            # Many small matrices: more threads cost more than they give, and far more where cores are busy.
            with threadpool_limits(1, user_api="blas"):
                edit = found_edit(method.find(study, attribute))
            limit = method.limit / LADDER[-1]
            (scale,), study.cost["strength"] = study.strengths([edit], start=method.scale, limit=limit)
            scale = float(scale)
            seconds, held_out = time.perf_counter() - start, self.held_out
            cost = sum(study.cost.values(), Counter())
            with _counted(self.model) as passes:
                edited = self._edited(edit, held_out, [scale * each for each in LADDER])
            tensors = self._scored(edited, attribute) | self._transferred(edit, scale, attribute, study)
        except NotApplicable as reason:
            return Cell({}, {"reason": str(reason)})
        per_edit = passes[0] / (len(edited) * len(LADDER))
        about = {"edit": edit.name, "scale": scale, "seconds": seconds, "edit_passes": per_edit}
        about |= {name: cost[name] for name in ("passes", "scored", "labels")}
        return Cell({name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in tensors.items()}, about)

    def _edited(self, edit: Edit, run: Trajectory, scales: Sequence[float]) -> torch.Tensor:
        """The images of an edit, (n, scales, C, H, W)."""
        return run_plans(run, [edit.plan(run, list(scales))], progress=False)[0]

    def _scored(self, edited: torch.Tensor, attribute: str) -> dict[str, np.ndarray]:
        """Measure the effect of an edit on the held-out samples, (n, scales) or (n, scales, ...)."""
        plain, n = self.held_out.images.clamp(-1, 1).numpy(), len(edited)
        measured: dict[str, list] = {}
        maps = self.plain["maps"]
        # Where no region is known, all but the backdrop may change.
        mask = self.masks.get(attribute, ~backdrop(plain))
        for images in edited.unbind(1):
            images = images.clamp(-1, 1)
            values, features = images.numpy(), self.judge.features(images)
            found = {
                "logits": self._logits(images),
                "rms": np.sqrt(((values - plain) ** 2).mean(axis=(1, 2, 3))),
                "psnr": peak_signal_to_noise(values, plain),
                "psnr_outside": peak_signal_to_noise(values, plain, mask=~mask),
                "perceptual": perceptual_distance(self.judge.maps(values), maps),
                "identity": cosine_similarity(features, self.plain["features"]),
                "features": features,
                "pixels": self.pixels.transform(values.reshape(n, -1)),
            }
            if self.texts is not None:
                found |= self._text_similarity(images, attribute)
            if self.segmenter is not None:
                found["consistency"] = segmentation_consistency(self.segmenter(images), self.plain["segments"])
            for name, value in found.items():
                measured.setdefault(name, []).append(np.asarray(value, dtype=np.float32))
        kept = to_bytes(edited[self.shown], progress=False)
        return {name: np.stack(values, axis=1) for name, values in measured.items()} | {"shown": kept.numpy()}

    def _text_similarity(self, edited: torch.Tensor, attribute: str) -> dict[str, np.ndarray]:
        """S_dir and the gain in CLIP score of the held-out samples, (n,); NaN without texts of the attribute."""
        if attribute not in self.texts.prompts:
            return dict.fromkeys(("s_dir", "clip_gain"), np.full(len(edited), np.nan))
        clip, (text, against) = self.texts.clip, self.texts.prompts[attribute]
        target, source = clip.texts([text, against])
        before, after = self.plain["embedded"], clip.images(edited)
        s_dir = directional_similarity(before, after, source=source, target=target)
        return {"s_dir": s_dir, "clip_gain": (after - before) @ target}

    def _transferred(self, edit: Edit, scale: float, attribute: str, study: Study) -> dict[str, np.ndarray]:
        """The attribute's logit before and after, on samples that it was found on and at other timesteps; (n, 2)."""
        if not self.protocol.transfer:
            return {}
        p, found = self.protocol, {}
        seeds = range(study.seed, study.seed + min(p.held_out // 2, p.population))
        options = {"steps": p.steps, "eta": p.eta, "record_x": True, "progress": False}
        seen = study.learned("seen by the benchmark", lambda: sample(self.model, seeds, **options))
        for name, run in {"population": seen, "other steps": self._finer}.items():
            try:
                after = self._edited(edit, run, [scale])[:, 0]
            except NotApplicable:
                continue
            k = list(self.judge.attributes).index(attribute)
            found[name] = np.stack([self._logits(run.images)[:, k], self._logits(after)[:, k]], axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Cell:
    """One method, attribute and population: the measurements, and the provenance of the edit.

    Attributes
    ----------
    tensors : dict of str -> Tensor
        Empty if the method had nothing to offer.
    about : dict
        Name and cost of the edit, or the reason why there is none (`reason`).
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    about: dict

    @classmethod
    def read(cls, path: Path, inputs: dict) -> Cell:
        """Read a cell from the cache; ValueError if it is damaged or of other inputs."""
        try:
            tensors, header = load_tensors(path, kind="cell")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        if header["inputs"] != json.loads(json.dumps(inputs)):
            raise ValueError(f"{path} holds a measurement of other inputs; delete it and run again")
        return cls(tensors, header["about"])


def _path(inputs: dict) -> Path:
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
    return paths.cache() / "benchmark" / f"{digest}.safetensors"


def backdrop(images: np.ndarray) -> np.ndarray:
    """Pixels of the colour of an image's upper corners.

    Parameters
    ----------
    images : array of shape (n, C, H, W), values in [-1, 1]

    Returns
    -------
    ndarray of bool, shape (n, 1, H, W)
    """
    corners = np.concatenate([images[:, :, :2, :2], images[:, :, :2, -2:]], axis=3)
    colour = np.median(corners, axis=(2, 3), keepdims=True)
    return np.all(np.abs(images - colour) < SAME_COLOUR, axis=1, keepdims=True)


@contextmanager
def _counted(model: Model) -> Iterator[list[int]]:
    """How many samples pass the mid block within: the passes through the U-Net."""
    passes = [0]

    def count(module, inputs, output) -> None:
        passes[0] += len(inputs[0])

    handle = model.unet.unet.mid_block.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
