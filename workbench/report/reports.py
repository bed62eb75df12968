"""Reports of all notebooks side by side, with an index page that can be opened at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from workbench import paths
from workbench.io import duration
from workbench.report.board import Board, default_jobs, start_kernels
from workbench.report.notebooks import Report, raise_failures, read_report
from workbench.report.plans import Plan, content_key, find_cuts, read_profile

UNIT_MODEL = "avataaars32"

UNFINISHED = ".unfinished"
"""File in `reports/` that stands there while a report runs, and is as old as the report."""


def report(
    profile: str = "quick",
    *,
    domain: str | None = None,
    only: Sequence[str] | str | None = None,
    jobs: int | None = None,
    since: float | None = None,
    progress: bool = True,
) -> list[Report]:
    """Run the staged notebooks and write the index page, which shows how far they are.

    After an interrupt the next call goes on: it keeps the notebooks that are finished, if their parameters, code and
    models are the same.

    Parameters
    ----------
    profile : str
        Name of a YAML file in `profiles/`. Its `notebooks` maps a notebook to its parameters (one that it leaves out
        runs with its defaults), its `common` holds parameters for every notebook that has them, its `timeout` the
        seconds that one cell may take, its `passes` how many passes of a network each notebook takes, and
        `in_short_for` names the profile that it cuts short.
    domain : str, optional
        Name of a domain, whose model, images, classifiers and attributes replace the profile's. The reports are then in
        a folder of `reports/` with this name.
    only : sequence of str or str, optional
        Run these notebooks alone; names or their starts.
    jobs : int, optional
        Notebooks that run side by side; by default as many as cores and memory allow, and one on an accelerator.
    since : float, optional
        When the command was given, by `time.monotonic()`; the time that it took is counted from there.
    progress : bool
        Say how far it is: in one line on a terminal, else in a line a notebook.

    Returns
    -------
    list of Report

    Raises
    ------
    ValueError, FileNotFoundError
        If the profile is unknown, or names an unknown notebook or parameter. Nothing has run then.
    NotebookFailed
        At the end, if a notebook failed. The others have run, and the index page shows both.
    KeyboardInterrupt
        If it is interrupted. Finished reports stay, and the next call resumes there.
    """
    since = time.monotonic() if since is None else since
    with start_kernels(jobs) as kernels:
        plan = read_profile(profile, [only] if isinstance(only, str) else only, domain=domain)
        plan = replace(plan, runs=tuple(replace(r, key=content_key(r.notebook, r.parameters)) for r in plan.runs))
        jobs, kept, marker = min(jobs or default_jobs(), len(plan.runs)), _finished(plan), plan.folder / UNFINISHED
        if not marker.exists():
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        notes = find_cuts(plan, domain=domain)
        with Board(plan, kept, jobs=jobs, kernels=kernels, notes=notes, show=progress) as board:
            results = board.run()
        marker.unlink(missing_ok=True)
        if only is None and not kept:
            seconds = time.monotonic() - since
            words = f"The profile {profile} took {duration(seconds)}, {jobs} notebooks side by side"
            if (paths.models() / UNIT_MODEL).is_dir():
                unit = unit_seconds()
                words += f": {seconds / unit:.1f} times as long as one thread of this machine takes for 1,000 passes "
                words += f"of {UNIT_MODEL} ({unit:.1f} s)"
            board.write_index(intro=f"<p>{words}.</p>")
            board.say(f"{words}.")
        if plan.in_short_for:
            board.say(f"Cut short for speed; for pictures worth printing: --profile {plan.in_short_for}")
    raise_failures([each for each in results.values() if isinstance(each, Exception)])
    return list(results.values())


def unit_seconds(*, batch: int = 32, repeats: int = 4) -> float:
    """Seconds of 1,000 passes of the smallest bundled model in one thread, from the fastest of a few batches.

    A report's time is given in this unit too, so that machines can be compared.
    """
    import torch

    from workbench.diffusion.loading import load_model
    from workbench.diffusion.parallel import in_threads

    model = load_model(UNIT_MODEL, device="cpu")
    x_t = torch.zeros(batch, *model.x_shape)

    def fastest(_: slice) -> float:
        times = []
        for _repeat in range(repeats):
            start = time.perf_counter()
            model.unet(x_t, 500)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        (seconds,) = in_threads(fastest, [slice(0, 1)])
    return 1000 / batch * seconds


def _finished(plan: Plan) -> dict[str, Report]:
    """Reports of the same content that an interrupted run has made."""
    marker = plan.folder / UNFINISHED
    if not marker.exists():
        return {}
    began, kept = marker.stat().st_mtime_ns, {}
    for run in plan.runs:
        found = read_report(run.out)
        if found is not None and found.key == run.key and run.out.stat().st_mtime_ns >= began:
            kept[run.name] = found
    return kept
