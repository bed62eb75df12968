"""Reports of several notebooks: checked first, run side by side, followed, and gone on with after an interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from notebook_files import output_of, write_notebook

from workbench import cli
from workbench.report import board, plans, reports
from workbench.report.kernels import KernelServer
from workbench.report.notebooks import NotebookFailed, run_job
from workbench.report.plans import Plan, Run, content_key
from workbench.report.running import Job

READY = "import pathlib, time\npathlib.Path('../data', {name!r}).touch()\n"
WAITS = READY + "while not pathlib.Path('../data', {other!r}).exists():\n    time.sleep(0.05)"


class TestProfile:
    @pytest.fixture
    def two(self, home):
        write_notebook(home / "notebooks" / "10_first.ipynb", "print('n', n)", parameters="model_name = 'a'\nn = 1")
        write_notebook(home / "notebooks" / "20_second.ipynb", "print('k', k)", "1 / k", parameters="k = 1\nseed = 0")
        return home

    @staticmethod
    def write_profile(home: Path, text: str) -> None:
        (home / "profiles" / "quick.yaml").write_text(text, encoding="utf-8")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("notebooks: {10_frist: {n: 2}}", "'10_frist' is none of 10_first, 20_second"),
            ("notebooks: {10_first: {m: 2}}", "10_first has no parameter 'm'"),
            ("notebooks: {10_first: {n: many}}", "must be int"),
            ("common: {modl_name: b}", "has the parameter 'modl_name'"),
            ("notebook: {}", "must be a mapping of common, notebooks, timeout"),
            ("timeout: long", "number of seconds"),
            ("passes: {10_first: many}", "it must map notebooks to numbers"),
            ("notebooks: [10_first]", r"quick.yaml is \['10_first'\]; it must map names"),
            ("notebooks: {10_first: [n]}", r"10_first of .*quick.yaml is \['n'\]"),
            ("notebooks: {10: {n: 2}, 10_first: {n: 3}}", "10_first twice, the second time as '10_first'"),
            ("common:\n\tn: 2", r"quick.yaml, line 2, can't be read: .*indent with spaces"),
            ("common:\n  n: 2\n  n: 3", "quick.yaml, line 3, can't be read: 'n' stands there twice"),
        ],
    )
    def test_is_checked_before_anything_runs(self, two, text, message):
        self.write_profile(two, text)
        with pytest.raises(ValueError, match=message):
            plans.read_profile("quick")

    def test_declared_types_and_starts_of_names_are_read(self, two):
        """Whatever YAML takes a word for; keys may be starts, and mappings be merged."""
        types = 'name: str = "a"\nnames: list[str] = []\nflag: bool = False\ncounts: list[int] = []\nrate: float = 0.5'
        write_notebook(two / "notebooks" / "30_third.ipynb", parameters=types)
        self.write_profile(
            two,
            "common: &all {name: 1:30, rate: 1e-3}\nnotebooks:\n  10: {n: 010}\n"
            "  30: {<<: *all, names: [Yes, no, 010, 1:30, 2020-01-01, 3, ~], flag: on, counts: 010, name: 0x10}\n",
        )
        found = plans.read_profile("quick", check=False)
        plan = found.parameters
        assert plan["10_first"] == {"n": 10} and found.timeout == 3600
        assert plan["30_third"] == {
            "name": "0x10",
            "rate": 0.001,
            "names": ["Yes", "no", "010", "1:30", "2020-01-01", "3", "~"],
            "flag": True,
            "counts": [10],
        }

    def test_unknown_profile_lists_the_known(self, two):
        self.write_profile(two, "")
        with pytest.raises(FileNotFoundError, match="no profile 'full'; the profiles are quick"):
            reports.report("full", progress=False)
        assert list((two / "reports").iterdir()) == [], "nothing runs before all is checked"

    def test_a_report_goes_on_after_a_failure_and_then_raises(self, two):
        self.write_profile(two, "common: {seed: 5}\nnotebooks:\n  10_first: {n: 7}\n  20_second: {k: 0}\n")
        write_notebook(two / "notebooks" / "30_third.ipynb", "print('third')", title="Third & last")
        with pytest.raises(NotebookFailed, match="20_second failed in cell 3 .ZeroDivisionError"):
            reports.report("quick", jobs=1, progress=False)
        assert "n 7" in output_of(two / "reports" / "10_first.ipynb")
        assert "third" in output_of(two / "reports" / "30_third.ipynb")
        index = (two / "reports" / "index.html").read_text(encoding="utf-8")
        assert "2 complete, 1 failed" in index and "seed = 5" in index and "Third &amp; last" in index

        self.write_profile(two, "")
        (only,) = reports.report("quick", only="20", jobs=1, progress=False)
        assert only.name == "20_second"
        index = (two / "reports" / "index.html").read_text(encoding="utf-8")
        assert "3 complete" in index and "failed" not in index.partition("<body>")[2]
        assert "Third &amp; last" in index, "earlier reports stay listed"

    def test_says_what_it_cuts_short(self, two):
        self.write_profile(two, "in_short_for: long\ncommon: {n: 2}\nnotebooks: {20_second: {k: 3}}")
        (two / "profiles" / "long.yaml").write_text("common: {n: 20, seed: 4}")
        cuts = plans.find_cuts(plans.read_profile("quick"))
        assert cuts["10_first"] == "Cut short for speed: n = 2 for 20 of the profile long."
        assert "k = 3 for 1" in cuts["20_second"] and "seed = 0 for 4" in cuts["20_second"]

    def test_a_notebook_elsewhere_is_no_staged_one_of_its_name(self, two):
        self.write_profile(two, "")
        write_notebook(two / "10_first.ipynb", "print('my own')")
        for call in (plans.read_profile, lambda _, names: plans.plan_sweep({"notebooks": names})):
            with pytest.raises(ValueError, match="is no staged notebook; copy it"):
                call("quick", [str(two / "10_first.ipynb")])

    def test_jobs_must_be_some(self, two):
        self.write_profile(two, "")
        with pytest.raises(ValueError, match="jobs is 0"):
            reports.report("quick", jobs=0, progress=False)


def test_notebooks_run_side_by_side_in_kernels_that_wait_asleep(home, monkeypatch):
    """Each of the two ends only when the other has begun; in kernels that start anew, as where there is no fork."""
    monkeypatch.setattr(KernelServer, "possible", lambda: False)
    say = "\nimport os\nprint(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'], os.getcwd())"
    for name, other in (("10_a", "20_b"), ("20_b", "10_a")):
        write_notebook(home / "notebooks" / f"{name}.ipynb", WAITS.format(name=name, other=other) + say)
    (home / "profiles" / "quick.yaml").write_text("timeout: 60")
    here = os.getcwd()
    first, second = reports.report("quick", jobs=2, progress=False)
    assert f"PASSIVE 1 {home / 'notebooks'}" in output_of(first.notebook)
    assert second.name == "20_b" and os.getcwd() == here


def test_the_index_is_there_from_the_start_and_an_interrupted_report_is_gone_on_with(home, capsys):
    write_notebook(home / "notebooks" / "10_done.ipynb", "print(1)")
    write_notebook(home / "notebooks" / "20_hangs.ipynb", WAITS.format(name="begun", other="go on"))
    (home / "profiles" / "quick.yaml").write_text("timeout: 100")
    index, pages = home / "reports" / "index.html", []

    def interrupt():
        deadline = time.monotonic() + 90
        while not (home / "data" / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2.5)  # the page is renewed every two seconds
        pages.append(index.read_text(encoding="utf-8"))
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        assert cli.main(["report", "--jobs", "1"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    said, (page,) = capsys.readouterr().err, pages
    assert 'http-equiv="refresh"' in page and "running: cell 3 of 3" in page and "1 complete, 1 to come" in page
    assert said.splitlines()[-1] == "workbench: interrupted" and "Traceback" not in said and "\r" not in said
    page = index.read_text(encoding="utf-8")
    assert "refresh" not in page and "20_hangs" not in page
    assert not list((home / "reports").glob(".20*")), "nothing half-written stays"

    done = (home / "reports" / "10_done.ipynb").stat().st_mtime_ns
    (home / "data" / "go on").touch()
    assert [each.name for each in reports.report("quick", jobs=1, progress=False)] == ["10_done", "20_hangs"]
    assert (home / "reports" / "10_done.ipynb").stat().st_mtime_ns == done, "it was kept"
    reports.report("quick", only="10", jobs=1, progress=False)
    assert (home / "reports" / "10_done.ipynb").stat().st_mtime_ns > done, "a whole report is made again"


def test_what_another_code_or_other_parameters_made_is_not_kept(home):
    write_notebook(home / "notebooks" / "10_a.ipynb", "print(1)")
    (home / "profiles" / "quick.yaml").write_text("")
    plan = plans.read_profile("quick")

    def kept(parameters: dict) -> list[str]:
        run = replace(plan.runs[0], parameters=parameters, key=content_key("10_a", parameters))
        return list(reports._finished(replace(plan, runs=(run,))))

    (home / "reports" / reports.UNFINISHED).touch()
    with contextlib.closing(Job("10_a")) as job:
        run_job(job, replace(plan.runs[0], key=content_key("10_a", {})))
    assert kept({}) == ["10_a"] and not kept({"steps": 3})
    write_notebook(home / "notebooks" / "10_a.ipynb", "print(2)")
    assert not kept({})


class TestEstimate:
    """Of a board whose notebooks have made some passes and not others."""

    @pytest.fixture
    def followed(self, home, monkeypatch):
        passes = {"10_a": 1000, "20_b": 3000, "30_c": 500}
        runs = tuple(Run(name, {}, home / "reports" / f"{name}.ipynb") for name in passes)
        followed = board.Board(Plan(runs, home / "reports", 60, passes), {}, show=False)
        monkeypatch.setattr(board.time, "monotonic", lambda: followed.began + 20.0)
        for job, state in zip(followed.jobs.values(), ("done", "running", "waiting"), strict=True):
            job.state = state
        return followed

    @staticmethod
    def count(followed, name: str, passes: object) -> None:
        Path(followed.jobs[name].counts.name, "1").write_text(str(passes))

    def test_is_of_the_passes_that_are_left(self, followed):
        self.count(followed, "10_a", 1000)
        self.count(followed, "20_b", 1000)
        # 2,000 passes took 20 seconds; 2,000 and 500 are left.
        assert followed.seconds_left() == pytest.approx(25.0)
        assert followed.line() == "1 of 3 done, about 25 s left: 20_b 0/0"

    def test_waits_until_something_is_known(self, followed):
        self.count(followed, "20_b", 30)
        assert followed.seconds_left() is None
        followed.plan.passes.pop("30_c")
        self.count(followed, "20_b", 2000)
        assert followed.seconds_left() is None and followed.line() == "1 of 3 done: 20_b 0/0"

    def test_a_count_that_is_just_being_written_is_the_last_one(self, followed):
        self.count(followed, "20_b", 700)
        assert followed.jobs["20_b"].passes == 700
        self.count(followed, "20_b", "")
        assert followed.jobs["20_b"].passes == 700
