"""From a selection of samples to a direction: its first picture, a strip beside a random control, a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory, sample
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction, random_like
from workbench.directions.selection import Selection, find_from_selection
from workbench.editing.cross import Cross
from workbench.editing.edits import check_run
from workbench.editing.preview import predicted_images
from workbench.editing.render import EditGrid, render
from workbench.hspace.store import HStore
from workbench.paths import file_name, writable
from workbench.studio.renderings import PREVIEW_STEPS, Renderings
from workbench.studio.state import EditState, Progress, Rendering

METHODS = {"mean": "difference of means", "svm": "boundary (linear SVM)"}
PREVIEW_SCALE = 2.0
SCALES = (-3.0, -1.5, 0.0, 1.5, 3.0)
_QUICK_VALUES = 2**25
"""Values of h that a first picture reads, about: half a second's worth."""


class Desk:
    """Finds, renders and saves what a selection stands for.

    Parameters
    ----------
    store : HStore
    model : Model
    runs : Trajectory, optional
        Samples to edit; by default two whose seeds the store lacks.
    scores : DataFrame, optional
        In the order of the store.
    known : sequence of Direction

    Raises
    ------
    ValueError
        If the store, the samples or a direction belong to another model or tap.
    """

    def __init__(
        self,
        store: HStore,
        model: Model,
        *,
        runs: Trajectory | None = None,
        scores: pd.DataFrame | None = None,
        known: Sequence[Direction] = (),
    ) -> None:
        refuse_other_model(str(store.path), store.provenance["model"], model.provenance())
        for each in known:
            each.check_fits(model)
        if runs is not None:
            check_run(model, runs)
            if runs.timesteps != store.timesteps:
                raise ValueError(f"the samples visit {runs.steps} timesteps and the store {len(store.timesteps)}")
        self.store, self.model, self.scores, self.known = store, model, scores, list(known)
        self._runs = runs
        self._first: Renderings | None = None

    @property
    def runs(self) -> Trajectory:
        """The samples to edit."""
        if self._runs is None:
            first = max(self.store.seeds or [-1]) + 1
            self._runs = self._sample([first, first + 1])
        return self._runs

    def _sample(self, seeds: Sequence[int], **options) -> Trajectory:
        etas = tuple(self.store.provenance["etas"])
        return sample(self.model, seeds, steps=self.store.timesteps, eta=etas, progress=False, **options)

    def prepare(self, progress: Progress) -> None:
        """Compute the sample of the first picture, so that the picture comes at once."""
        if self._first is None:
            self._first = Renderings(self.model, self.runs[:1])
        self._first.render(state=self._state(), progress=progress)

    def _state(self, **scales: float) -> EditState:
        return EditState((self.store.timesteps[0], self.store.timesteps[-1]), scales=scales)

    def glimpse(self, a: Sequence[int], b: Sequence[int] | None, progress: Progress) -> Rendering:
        """One sample before and after the edit: few timesteps, few steps."""
        steps = len(self.store.timesteps)
        count = min(PREVIEW_STEPS, steps)
        some = [self.store.timesteps[round((i + 0.5) * steps / count - 0.5)] for i in range(count)]
        most = _QUICK_VALUES // (count * math.prod(self.store.h_shape))
        options = {"timesteps": some, "most": most, "progress": progress}
        found = find_from_selection(self.store, a, b, t=some[0], **options).direction
        self.prepare(progress)
        self._first.directions["found"] = found.resampled(self.store.timesteps)
        return self._first.render(preview=True, state=self._state(found=PREVIEW_SCALE), progress=progress)

    def find(
        self, a: Sequence[int], b: Sequence[int] | None, progress: Progress, *, t: int, method: str, name: str
    ) -> Selection:
        """The direction at all timesteps, and the boundary at one."""
        options = {"t": t, "method": method, "name": name, "scores": self.scores, "known": self.known}
        return find_from_selection(self.store, a, b, **options, progress=progress)

    def edit_of(self, found: Selection, method: str) -> Direction | Boundary:
        """Result of the method: the direction, or the boundary."""
        if method == "mean":
            return found.direction
        if found.boundary is None:
            raise ValueError(f"a boundary needs at least 3 samples in A and in B; there are {found.counts}")
        return found.boundary

    def strip(self, found: Selection, method: str, progress: Progress) -> EditGrid:
        """The edit of a few samples from weak to strong, beside a random one of the same length."""
        made, control = self.edit_of(found, method), "random control"
        if isinstance(made, Boundary):
            edits = {made.name: Cross(h=made, mode="shift"), control: Cross(h=made, mode="shift", control=0)}
        else:
            edits = {made.name: made, control: random_like(made, seed=0)}
        progress.expect(len(self.runs) * 2 * (len(SCALES) - 1) * self.runs.steps)
        return render(self.runs, edits, SCALES, progress=progress)

    def predictions(self, seed: int, progress: Progress) -> EditGrid:
        """The predicted image of a sample at every timestep."""
        run = self._sample([seed], record_x=True)
        images = predicted_images(run, range(run.steps))
        columns = tuple(f"t = {t}" for t in run.timesteps)
        return EditGrid(images[None], (f"predicted image\nseed {seed}",), columns, {})

    def save(self, found: Selection, method: str, folder: Path) -> str:
        """Write what was found to a file whose provenance lists the selected samples; returns what was done."""
        made = self.edit_of(found, method)
        ending = f"-{made.space}-t{made.t}" if isinstance(made, Boundary) else ""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.model.name.replace('/', '--')}-{file_name(made.name)}{ending}.safetensors"
        path = writable(folder / name)
        word = "replaced" if path.exists() else "saved"
        return f"{word} {made.save(path)}"


def rows_of(found: Selection) -> list[list[str]]:
    """Facts about a selection, as pairs of words."""
    sigma, held = found.direction.sigma, "unknown: it takes 3 samples on each side"
    if (boundary := found.boundary) is not None:
        share, where = boundary.balanced_accuracy, f"boundary at t = {boundary.t}, n = {boundary.accuracy.n}"
        held = f"{share.value:.0%} (95% interval {share.low:.0%} to {share.high:.0%}), {where}"
    rows = {
        "samples": "A {}, B {}".format(*found.counts),
        "means apart by": f"{found.direction.extras['class_gap']:.2f} sigma, each sample left out in turn",
        "1 sigma": f"{sigma.min():.3g} to {sigma.max():.3g} in h over {len(sigma)} timesteps, calibrated",
        "held-out separability": held,
        "cosine to known directions": ", ".join(f"{k} {v:+.2f}" for k, v in found.cosines.head(5).items()),
        "attributes (area under the curve)": ", ".join(f"{k} {v:.2f}" for k, v in found.attributes.auc.head(3).items()),
    }
    return [[name, words] for name, words in rows.items() if words]
