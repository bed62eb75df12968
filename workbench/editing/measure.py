"""Measure the effects of edits: a judge's scores and the change of the images, in one tidy table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pandas as pd
import torch

from workbench.analysis.effect_metrics import EffectMatrix, effect_matrix, monotonicity, success_rate
from workbench.analysis.image_metrics import (
    directional_similarity,
    kernel_distance,
    peak_signal_to_noise,
    segmentation_consistency,
)
from workbench.analysis.intervals import Estimate, mean_interval
from workbench.datasets.clip import Clip
from workbench.diffusion.sampling import Trajectory, batches
from workbench.editing.edits import check_run
from workbench.editing.render import Edits, cells_bar, name_edits, run_plans
from workbench.io import one_of

Classifier = Callable[[torch.Tensor], pd.DataFrame]

TEXT_MEASURES = ("s_dir", "clip_score", "consistency")

IMAGE_BYTES = 2**28
"""Upper bound of the edited images in memory."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Scores before and after edits, and the change of the images.

    Attributes
    ----------
    table : DataFrame
        One row per edit, scale, sample and attribute: `edit`, `scale` (in the edit's unit), `seed` (the position of an
        inverted image), `attribute`, the score `before` (of the same process without the change) and `after`; and of
        the image `rms` (root mean square change), `psnr` against that process and `psnr_image` against the sample's
        own image (dB), and `psnr_outside` of the attribute's region where that is known. With prompts, `s_dir` (S_dir,
        `directional_similarity`; the loss of Asyrp and DiffusionCLIP is its complement, 1 - S_dir) and `clip_score`,
        the cosine of the edited image with the attribute's prompt; with a segmenter, `consistency` (SC).
    realism : DataFrame
        One row per edit and scale: `kid`, the `kernel_distance` of the judge's features from those of real images;
        empty without real images.
    """

    table: pd.DataFrame = field(repr=False)
    realism: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    @property
    def edits(self) -> list[str]:
        """Names of the edits."""
        return list(self.table["edit"].unique())

    @property
    def scales(self) -> list[float]:
        """Measured scales, ascending."""
        return sorted(float(s) for s in self.table["scale"].unique())

    def scores(self, edit: str, scale: float) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Scores before and after one edit.

        Returns
        -------
        before, after : DataFrame of shape (n, attributes), indexed by seed

        Raises
        ------
        ValueError
            If the edit was not measured.
        """
        rows = self.table[(self.table["edit"] == edit) & (self.table["scale"] == scale)]
        if rows.empty:
            measured = f"{', '.join(self.edits)} at {', '.join(f'{s:g}' for s in self.scales)}"
            raise ValueError(f"there is no edit {edit!r} at scale {scale:g}; measured are {measured}")
        attributes, seeds = rows["attribute"].unique(), rows["seed"].unique()
        wide = rows.pivot(index="seed", columns="attribute", values=["before", "after"])
        before, after = (wide[which].loc[seeds, attributes] for which in ("before", "after"))
        return before, after

    def change(self, edit: str, scale: float) -> pd.DataFrame:
        """after - before of one edit, (n, attributes), indexed by seed; raises as `scores`."""
        before, after = self.scores(edit, scale)
        return after - before

    def success(self, attribute: str, *, edit: str | None = None) -> dict[float, Estimate]:
        """`success_rate` of an attribute at every scale, ascending, for `edit` (default: the attribute's own)."""
        name = attribute if edit is None else edit
        return {s: success_rate(*self.scores(name, s), attribute) for s in self.scales}

    def matrix(self, scale: float | Mapping[str, float]) -> EffectMatrix:
        """`effect_matrix` of the edits at one scale, or at a scale for each of some edits."""
        scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(self.edits, scale)
        both = {name: self.scores(name, s) for name, s in scales.items()}
        before, after = ({name: scores[i] for name, scores in both.items()} for i in (0, 1))
        return effect_matrix(before, after)

    def _of(self, attribute: str) -> pd.DataFrame:
        """The rows of an attribute."""
        one_of("attribute", attribute, self.table["attribute"].unique())
        return self.table[self.table["attribute"] == attribute]

    def curves(self, attribute: str, *, lacking: bool = False) -> pd.DataFrame:
        """Mean change of an attribute's score against the scale, to draw.

        Parameters
        ----------
        attribute : str
        lacking : bool
            Average only over samples whose score before the edit was at most 0.5.

        Returns
        -------
        DataFrame, one row an edit and scale
            `edit`, `scale`, `value` with its 95% interval `low`, `high`, and `n`.
        """
        table = self._of(attribute)
        if lacking:
            table = table[table["before"] <= 0.5]
        rows = []
        for (edit, scale), part in table.groupby(["edit", "scale"], sort=False):
            change = (part["after"] - part["before"]).to_numpy()
            low, high = mean_interval(change, bounds=(-1.0, 1.0))
            rows.append(
                {"edit": edit, "scale": scale, "value": change.mean(), "low": low, "high": high, "n": len(part)}
            )
        return pd.DataFrame(rows)

    def summary(self, attribute: str) -> pd.DataFrame:
        """Effects of the edits on one attribute, on all others, and on the image.

        Returns
        -------
        DataFrame, one row an edit and scale
            `edit`, `scale`; `change` of the attribute's score with its 95% interval `low`, `high` over the samples;
            `gained`, the share of samples without the attribute that gain it, and `lost`, the share of those with it
            that lose it, with their numbers (`without`, `with`); `others`, the mean size of the change
            of all other attributes; median `psnr` and `psnr_image`; mean `s_dir`, `clip_score` and `consistency`, and
            `kid`, where they are known; `n`.
        """
        one_of("attribute", attribute, self.table["attribute"].unique())
        rows = []
        for (edit, scale), part in self.table.groupby(["edit", "scale"], sort=False):
            own, others = part[part["attribute"] == attribute], part[part["attribute"] != attribute]
            change = own["after"] - own["before"]
            low, high = mean_interval(change, bounds=(-1.0, 1.0))
            has, had = own["after"] > 0.5, own["before"] > 0.5
            rows.append(
                {
                    "edit": edit,
                    "scale": scale,
                    "change": change.mean(),
                    "low": low,
                    "high": high,
                    "gained": has[~had].mean(),
                    "without": int((~had).sum()),
                    "lost": (~has)[had].mean(),
                    "with": int(had.sum()),
                    "others": (others["after"] - others["before"]).abs().mean(),
                    "psnr": own["psnr"].median(),
                    "psnr_image": own["psnr_image"].median(),
                    **own[own.columns.intersection(TEXT_MEASURES)].mean(),
                    "n": len(own),
                }
            )
        table = pd.DataFrame(rows)
        return table if self.realism.empty else table.merge(self.realism, on=["edit", "scale"])

    def monotonicity(self, attribute: str) -> pd.Series:
        """Rank correlation of an attribute's score with the scale, averaged over the samples; one value per edit."""
        found = {}
        for edit, part in self._of(attribute).groupby("edit", sort=False):
            wide = part.pivot(index="seed", columns="scale", values="after")
            found[edit] = float(np.nanmean(monotonicity(wide, list(wide.columns))))
        return pd.Series(found, name=attribute)

    def __repr__(self) -> str:
        return (
            f"Effects({len(self.edits)} edits at scales {', '.join(f'{s:g}' for s in self.scales)}, "
            f"{self.table['seed'].nunique()} samples, {self.table['attribute'].nunique()} attributes)"
        )


def measure(
    run: Trajectory,
    edits: Edits,
    scales: Sequence[float],
    *,
    classifier: Classifier,
    masks: Mapping[str, np.ndarray] | None = None,
    real: torch.Tensor | None = None,
    clip: Clip | None = None,
    prompts: Mapping[str, tuple[str, str]] | None = None,
    segmenter: Callable[[torch.Tensor], np.ndarray] | None = None,
    progress: bool = True,
    **options: object,
) -> Effects:
    """Edit samples and score the images; keep only the measurements.

    Parameters
    ----------
    run : Trajectory
        Unedited samples; not those that the edits were found with.
    edits : Edit or Direction, a sequence or a mapping of them
        A Direction is a `Shift`; a mapping gives names.
    scales : sequence of float
        In the unit of the edits.
    classifier : callable (images of shape (n, C, H, W)) -> DataFrame of shape (n, attributes), values in [0, 1]
        The judge; never the classifier that labelled the samples the edits were found with. It limits images to
        [-1, 1], as those of the workbench do; all other measures are of limited images.
    masks : mapping of attribute -> bool array of shape (H, W), optional
        Region of each attribute; `psnr_outside` is measured outside of it.
    real : Tensor of shape (n, C, H, W), optional
        Real images to measure `kid` against; the classifier then needs `features`.
    clip : Clip, optional
        For `s_dir` and `clip_score`; with `prompts`.
    prompts : mapping of attribute -> (str, str), optional
        Texts with each attribute and without it, such as `domain_of(images).prompts`.
    segmenter : callable (images) -> int array of shape (n, h, w), optional
        For `consistency`; see `load_segmenter`.
    progress : bool
    **options
        `asymmetric`, `gain` and `t_range` of `edit`, for Directions.

    Returns
    -------
    Effects

    Raises
    ------
    ValueError
        If there is no edit or scale, two edits have the same name, one does not fit the run, or the classifier's table
        does not fit the images.
    """
    check_run(run.model, run)
    named, scales = name_edits(edits, **options), [float(s) for s in dict.fromkeys(scales)]
    if not named or not scales:
        raise ValueError("measuring effects needs at least one edit and one scale")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two edits are named {twice!r}; give a mapping of name -> edit")
    if (clip is None) != (not prompts):
        raise ValueError("S_dir compares images with texts; give clip= and prompts= together")
    texts = {name: clip.texts(pair) for name, pair in (prompts or {}).items()}
    plans, plains, plain_of = [edit.plan(run, scales) for _, edit in named], [], []
    for _, edit in named:
        plain = edit.plain(run)
        plain_of.append(next((i for i, other in enumerate(plains) if _alike(plain, other)), len(plains)))
        if plain_of[-1] == len(plains):
            plains.append(plain)
    ids = np.arange(len(run)) if run.seeds is None else np.array(run.seeds)
    size = max(1, IMAGE_BYTES // (4 * len(named) * len(scales) * math.prod(run.model.image_shape)))
    tables, features = [], [[] for _ in named]
    with cells_bar(run, plans, progress) as bar:
        for samples in batches(len(run), size):
            part = run[samples]
            parts = [[part if plan is run else plan[samples] for plan in row] for row in plans]
            edited = run_plans(part, parts, progress=bar)
            own = [[[part if plain is run else plain[samples]]] for plain in plains]
            unedited = [run_plans(part, each, progress=False)[0, :, 0] for each in own]
            scores = [_checked(classifier(images), len(images)) for images in unedited]
            for e, name in enumerate(names):
                images, plain = edited[e], unedited[plain_of[e]]
                tables.append(_table(classifier, scores[plain_of[e]], images, name, scales, ids[samples]))
                if real is not None:
                    features[e].append([classifier.features(column) for column in images.unbind(1)])
                images, plain = images.clamp(-1, 1), plain.clamp(-1, 1)  # nobody sees what is beyond black and white
                _add_image_measures(tables[-1], images, plain, part.images.clamp(-1, 1), masks or {})
                if texts:
                    _add_text_measures(tables[-1], images, plain, clip, texts)
                if segmenter is not None:
                    maps = segmenter(plain).repeat(len(scales), axis=0)
                    found = segmentation_consistency(segmenter(images.flatten(0, 1)), maps)
                    tables[-1]["consistency"] = np.repeat(found, len(tables[-1]) // len(found))
    rows = []
    if real is not None:
        target = classifier.features(real)
        for name, chunks in zip(names, features, strict=True):
            for scale, *columns in zip(scales, *chunks, strict=True):
                rows.append({"edit": name, "scale": scale, "kid": kernel_distance(np.concatenate(columns), target)})
    table = pd.concat(tables, ignore_index=True)
    order = {name: i for i, name in enumerate(names)}
    table = table.sort_values("edit", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    return Effects(table, pd.DataFrame(rows))


def _alike(plain: Trajectory, other: Trajectory) -> bool:
    """Whether two processes without a change are the same."""
    if plain is other:
        return True
    kept = plain.stored_noise is other.stored_noise is plain.edit is other.edit is None
    same = (plain.timesteps, plain.etas, plain.seeds) == (other.timesteps, other.etas, other.seeds)
    return kept and same and torch.equal(plain.x_T, other.x_T)


def _table(
    classifier: Classifier,
    before: pd.DataFrame,
    edited: torch.Tensor,
    name: str,
    scales: list[float],
    ids: np.ndarray,
) -> pd.DataFrame:
    """Scores of one edit of some samples; `edited` has shape (n, scales, C, H, W)."""
    after = _checked(classifier(edited.flatten(0, 1)), len(ids) * len(scales))
    attributes = list(before.columns)
    if list(after.columns) != attributes:
        raise ValueError(f"the classifier gave the attributes {attributes} and then {list(after.columns)}")
    cells = pd.MultiIndex.from_product([ids, scales, attributes], names=["seed", "scale", "attribute"])
    table = cells.to_frame(index=False)[["scale", "seed", "attribute"]]
    table.insert(0, "edit", name)
    scores = before.to_numpy(dtype=float)[:, None, :]
    table["before"] = np.broadcast_to(scores, (len(ids), len(scales), len(attributes))).ravel()
    table["after"] = after.to_numpy(dtype=float).ravel()
    return cast(pd.DataFrame, table)


def _add_image_measures(
    table: pd.DataFrame, edited: torch.Tensor, plain: torch.Tensor, own: torch.Tensor, masks: Mapping[str, np.ndarray]
) -> None:
    attributes, (n, k) = list(table["attribute"].unique()), edited.shape[:2]
    values = edited.flatten(0, 1).numpy()
    before, image = (x.repeat_interleave(k, dim=0).numpy() for x in (plain, own))
    measured = {
        "rms": np.sqrt(((values - before) ** 2).mean(axis=(1, 2, 3))),
        "psnr": peak_signal_to_noise(values, before),
        "psnr_image": peak_signal_to_noise(values, image),
    }
    for name, value in measured.items():
        table[name] = np.repeat(value, len(attributes))
    outside = np.full((n * k, len(attributes)), np.nan)
    for a, attribute in enumerate(attributes):
        if attribute in masks:
            outside[:, a] = peak_signal_to_noise(values, before, mask=~np.asarray(masks[attribute], dtype=bool))
    table["psnr_outside"] = outside.ravel()


def _add_text_measures(
    table: pd.DataFrame, edited: torch.Tensor, plain: torch.Tensor, clip: Clip, texts: Mapping[str, np.ndarray]
) -> None:
    before, after = clip.images(plain).repeat(edited.shape[1], axis=0), clip.images(edited.flatten(0, 1))
    attributes = list(table["attribute"].unique())
    for column in ("s_dir", "clip_score"):
        values = np.full((len(after), len(attributes)), np.nan)
        for a, (target, source) in ((a, texts[name]) for a, name in enumerate(attributes) if name in texts):
            moved = directional_similarity(before, after, source=source, target=target)
            values[:, a] = moved if column == "s_dir" else after @ target
        table[column] = values.ravel()


def _checked(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    if not isinstance(scores, pd.DataFrame) or len(scores) != n:
        shape = getattr(scores, "shape", None)
        given = f"{type(scores).__name__} of shape {shape} for {n} images"
        raise ValueError(f"the classifier gave {given}; it must give a DataFrame with one row an image")
    return scores
