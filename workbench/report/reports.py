"""Reports of all notebooks, which run side by side and are entered in a page that can be opened at once."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import joblib
import nbformat
import psutil

from workbench import paths
from workbench.report.kernels import KernelServer, environment
from workbench.report.notebooks import NotebookFailed, Report, duration, run_job, write_index
from workbench.report.parameters import Profile, notebook_parameters, plan_profile, read_profile
from workbench.report.running import Job

UNFINISHED = ".unfinished"
"""File in `reports/` that stands there while a report runs, with the time at which it began."""

SUMMARY = ".summary.html"
"""File in `reports/` with the words that stand above the cards of the index page."""

UNIT_MODEL = "avataaars32"

KERNEL_MEMORY = 3 * 2**30
"""Bytes that a notebook on a CPU may need."""


def report(
    profile: str = "quick",
    *,
    only: Sequence[str] | str | None = None,
    jobs: int | None = None,
    since: float | None = None,
    progress: bool = True,
) -> list[Report]:
    """Run the staged notebooks and write the index page, which shows how far they are.

    A report that was interrupted is gone on with: notebooks that it finished, of the same parameters, code and models,
    are kept.

    Parameters
    ----------
    profile : str
        Name of a YAML file in `profiles/`. Its `notebooks` maps a notebook to its parameters (one that it leaves out
        runs with its defaults), its `common` holds parameters for every notebook that has them, its `timeout` the
        seconds that one cell may take, its `passes` how many passes of a network each notebook takes, and
        `in_short_for` names the profile that it cuts short.
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
        If it is interrupted. What is finished stays, and the next call goes on from there.
    """
    since = time.monotonic() if since is None else since
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; give 1 or more")
    # The process that kernels are copied from imports while this one imports and checks.
    many = jobs != 1 and KernelServer.possible()
    with KernelServer(environment(1)) if many else contextlib.nullcontext() as kernels:
        plan = plan_profile(profile, [only] if isinstance(only, str) else only)
        jobs = min(jobs or _default_jobs(), len(plan.parameters))
        keys = _keys(plan)
        kept = _finished(keys)
        marker = paths.reports() / UNFINISHED
        if not marker.exists():
            marker.parent.mkdir(exist_ok=True)
            (marker.parent / SUMMARY).unlink(missing_ok=True)
            marker.write_text(str(time.time()))
        options = {"threads": 1, "kernels": kernels} if jobs > 1 else {}
        todo = {name: Job(name, **options) for name in plan.parameters}
        with contextlib.closing(Board(plan, todo, kept, show=progress)) as board:
            results = board.run(jobs, keys)
    marker.unlink(missing_ok=True)
    if only is None and not kept:
        _write_summary(board, profile, jobs, time.monotonic() - since)
    return _outcome(results)


def _write_summary(board: Board, profile: str, jobs: int, seconds: float) -> None:
    """How long all of it took, on the index page: in seconds, and in the machine's own unit."""
    words = f"The profile {profile} took {duration(seconds)}, {jobs} notebooks side by side"
    if jobs > 1 and (paths.models() / UNIT_MODEL).is_dir():  # on an accelerator the unit would be another
        unit = unit_seconds()
        words += f": {seconds / unit:.1f} times what one thread of this machine takes for 1,000 passes of {UNIT_MODEL}"
        words += f" ({unit:.1f} s)"
    (paths.reports() / SUMMARY).write_text(f"<p>{words}.</p>\n", encoding="utf-8")
    board.write_index()
    board.say(f"{words}.")
    if board.plan.in_short_for:
        board.say(
            f"Cut short for speed; for pictures worth printing: workbench report --profile {board.plan.in_short_for}"
        )


def unit_seconds(*, batch: int = 32, repeats: int = 4) -> float:
    """Seconds of 1,000 passes of the smallest bundled model in one thread, from the fastest of a few batches."""
    import torch

    from workbench.diffusion.loading import load_model
    from workbench.diffusion.parallel import in_threads

    model = load_model(UNIT_MODEL, device="cpu")
    x_t = torch.zeros(batch, *model.image_shape)

    def fastest(_) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model.unet(x_t, 500)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        (seconds,) = in_threads(fastest, [slice(0, 1)])
    return 1000 / batch * seconds


def find_cuts(plan: Profile) -> dict[str, str]:
    """What each notebook of a profile has less of than in the one that it cuts short, in words."""
    if plan.in_short_for is None:
        return {}
    cuts, longer = {}, read_profile(plan.in_short_for).parameters
    for name, values in plan.parameters.items():
        defaults = {key: parameter.default for key, parameter in notebook_parameters(name).items()}
        own, other = defaults | values, defaults | longer[name]
        differ = [f"{key} = {own[key]!r} for {other[key]!r}" for key in own if own[key] != other[key]]
        if differ:
            cuts[name] = f"Cut short for speed: {', '.join(differ)} of the profile {plan.in_short_for}."
    return cuts


def _keys(plan: Profile) -> dict[str, str]:
    """Names of what each notebook is made of."""
    from workbench.report.sweep import content_key  # torch and diffusers, seconds

    return {name: content_key(name, values) for name, values in plan.parameters.items()}


def _default_jobs() -> int:
    import torch  # a second or two

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1
    return max(1, min(joblib.cpu_count(), psutil.virtual_memory().available // KERNEL_MEMORY))


def _finished(keys: Mapping[str, str]) -> dict[str, Report]:
    """Reports of the same content that an interrupted run has made."""
    marker = paths.reports() / UNFINISHED
    if not marker.exists():
        return {}
    kept = {}
    for name, key in keys.items():
        path = paths.reports() / f"{name}.ipynb"
        if path.exists() and path.stat().st_mtime >= marker.stat().st_mtime:
            record = nbformat.read(path, as_version=4).metadata.get("workbench", {})
            if record.get("key") == key:
                kept[name] = Report(name, path, path.with_suffix(".html"), record["parameters"], record["seconds"])
    return kept


def _outcome(results: Sequence[Report | NotebookFailed]) -> list[Report]:
    failures = [each for each in results if isinstance(each, NotebookFailed)]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        first = failures[0]
        what = "; ".join(f"{each.name} in cell {each.cell} ({each.ename})" for each in failures)
        message = f"{len(failures)} of {len(results)} notebooks failed: {what}; see {paths.reports() / 'index.html'}"
        details = dict(name=first.name, cell=first.cell, ename=first.ename, evalue=first.evalue, path=first.path)
        raise NotebookFailed(message, **details) from first
    return list(results)


class Board:
    """The notebooks of a report while they run: a line on the terminal, and the index page."""

    def __init__(self, plan: Profile, jobs: dict[str, Job], kept: Mapping[str, Report], *, show: bool) -> None:
        self.plan, self.jobs, self.kept, self.show, self.cuts = plan, jobs, kept, show, find_cuts(plan)
        for name in kept:
            self.jobs[name].state = "kept"
        self.began = time.monotonic()
        self._terminal = show and sys.stderr.isatty()
        self._index_at = 0.0

    def run(self, jobs: int, keys: Mapping[str, str]) -> list[Report | NotebookFailed]:
        """Run what is not kept, `jobs` at a time; the results in the order of the plan."""
        if self.kept and self.show:
            self.say(f"goes on with an interrupted report; kept: {', '.join(self.kept)}")
        todo = [job for job in self.jobs.values() if job.state == "waiting"]
        # The longest first, so that none is left alone at the end.
        todo.sort(key=lambda job: -self.plan.passes.get(job.name, 0))
        with ThreadPoolExecutor(jobs, "notebook") as threads:
            running = {threads.submit(self._run, job, keys[job.name]): job for job in todo}
            try:
                self._follow(running)
            except KeyboardInterrupt:
                for future in running:
                    future.cancel()
                for job in todo:
                    job.stop()
                raise
        results = self.kept | {job.name: future.exception() or future.result() for future, job in running.items()}
        return [results[name] for name in self.plan.parameters]

    def _run(self, job: Job, key: str) -> Report:
        job.state = "running"
        try:
            values = self.plan.parameters[job.name]
            result = run_job(job, job.name, values, progress=False, timeout=self.plan.timeout, key=key, index=None)
        except BaseException:
            job.state = "failed"
            raise
        job.state = "done"
        return result

    def _follow(self, running: dict[Future, Job]) -> None:
        left = set(running)
        while left:
            self.write_index(at_most_every=2.0)
            self._draw(self.line())
            ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                error, job = future.exception(), running[future]
                if error is not None and not isinstance(error, NotebookFailed):
                    raise error
                word = str(error) if error else f"{job.name}: {duration(future.result().seconds)}"
                self.say(f"{word} ({self._counted()})")
                self.write_index()

    def line(self) -> str:
        """What runs, and how long it will take, in one line."""
        now = [f"{job.name} {job.cell}/{job.cells}" for job in self.jobs.values() if job.state == "running"]
        return f"{self._counted()}: {', '.join(now)}"

    def _counted(self) -> str:
        ended = sum(job.state in ("done", "failed", "kept") for job in self.jobs.values())
        left = self.seconds_left()
        return f"{ended} of {len(self.jobs)} done" + ("" if left is None else f", about {_roughly(left)} left")

    def seconds_left(self) -> float | None:
        """An estimate from the passes that are left and those that were made so far; None while little is known."""
        waiting = [job for job in self.jobs.values() if job.state in ("waiting", "running")]
        if not waiting or any(job.name not in self.plan.passes for job in waiting):
            return None
        made = sum(job.passes for job in self.jobs.values() if job.state != "kept")
        left = sum(max(self.plan.passes[job.name] - job.passes, 0) for job in waiting)
        if made < 0.05 * (made + left):
            return None
        return left * (time.monotonic() - self.began) / made

    def write_index(self, *, at_most_every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._index_at < at_most_every:
            return
        self._index_at = now
        pending = {job.name: _state(job) for job in self.jobs.values() if job.state in ("waiting", "running")}
        intro = f"<p>{self._counted()}. This page renews itself until all are.</p>" if pending else _summary()
        write_index(intro=intro, pending=pending, notes=self.cuts, refresh=3 if pending else None)

    def say(self, words: str) -> None:
        if self.show:
            self._write(f"\r\033[K{words}\n" if self._terminal else f"{words}\n")

    def _draw(self, line: str) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\033[K{line[:width]}")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def close(self) -> None:
        """Clear the line, and write the page as it stays."""
        if self._terminal:
            self._write("\r\033[K")
        for job in self.jobs.values():
            job.close()
        write_index(intro=_summary(), notes=self.cuts)


def _summary() -> str:
    path = paths.reports() / SUMMARY
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _roughly(seconds: float) -> str:
    return f"{max(5 * round(seconds / 5), 5)} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _state(job: Job) -> str:
    if job.state == "waiting":
        return "waiting"
    return f"running: cell {job.cell} of {job.cells}" if job.cell else "starting"
