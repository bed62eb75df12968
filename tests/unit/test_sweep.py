"""Sweeps: what runs is known by its content, and every run is accounted for."""

from __future__ import annotations

import notebook_files
import pandas as pd
import pytest
import yaml
from distributed import LocalCluster

from workbench import cli
from workbench.report.facts import read_facts, record_facts
from workbench.report.notebooks import run_notebook
from workbench.report.plans import plan_sweep
from workbench.report.sweep import _table, sweep

CELL = """import os
from workbench.report.facts import record_facts
assert seed != 3, "three is refused"
print("seed", seed)
record_facts({"twice": 2 * seed, "threads": os.environ.get("OMP_NUM_THREADS", "")})"""


def write_notebook(path, parameters: str, cell: str = CELL) -> None:
    notebook_files.write_notebook(path, cell, parameters=parameters)


@pytest.fixture
def home(home):
    """A project with two notebooks; by the environment, so that workers and kernels see it too."""
    write_notebook(home / "notebooks" / "10_first.ipynb", "seed: int = 0  # a seed\nn: int = 4  # samples")
    write_notebook(home / "notebooks" / "20_second.ipynb", "seed: int = 0  # a seed")
    return home


def write_sweep(home, **content):
    path = home / "seeds.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_combination_runs_once_in_the_notebooks_that_have_its_parameters(home):
    runs = plan_sweep({"matrix": {"seed": [1, 2], "n": [4, 8, 16]}}, name="all").runs
    assert [run.notebook for run in runs] == ["10_first"] * 6 + ["20_second"] * 2
    assert [run.varied for run in runs[6:]] == [{"seed": 1}, {"seed": 2}]
    assert len({run.name for run in runs}) == 8
    assert all(run.out.parent == home / "reports" / "sweeps" / "all" for run in runs)


def test_a_run_is_known_by_all_parameters_and_the_code(home):
    def key(**content):
        (run,) = plan_sweep({"notebooks": ["10"], **content}).runs
        return run.key

    assert key() == key(common={"n": 4}) == key(matrix={"seed": [0]})
    assert key() != key(common={"n": 5})
    before = key()
    write_notebook(
        home / "notebooks" / "10_first.ipynb", "seed: int = 0  # a seed\nn: int = 4  # samples", CELL + "\n1"
    )
    assert key() != before


def test_a_run_is_known_by_the_weights_of_its_model(home):
    names = 'model_name: str = "mine"\njudge_name: str = "avataaars-judge"'
    write_notebook(home / "notebooks" / "30_third.ipynb", names)
    file, models, keys = home / "mine.ckpt", home / "data" / "models", set()
    judge = models / "avataaars-attributes" / "judge" / "model.safetensors"
    for weights in (models / "mine" / "unet" / "weights.safetensors", judge, file):
        weights.parent.mkdir(parents=True, exist_ok=True)
        common = {"model_name": str(file)} if weights == file else {}
        for content in (b"one", b"two"):
            weights.write_bytes(content)
            keys.add(plan_sweep({"notebooks": ["30"], "common": common}, name="mine").runs[0].key)
    assert len(keys) == 6


def test_a_run_is_known_by_the_files_of_its_folder_of_images(home):
    write_notebook(home / "notebooks" / "30_third.ipynb", 'images_name: str = "avataaars"')
    images, keys = home / "images", []
    (images / "red").mkdir(parents=True)
    for file in (images / "a.png", images / "red" / "b.png", home / "attributes.csv"):
        file.write_bytes(b"1")
        keys.append(plan_sweep({"notebooks": ["30"], "common": {"images_name": str(images)}}).runs[0].key)
    assert len({*keys}) == 3
    assert keys[-1] == plan_sweep({"notebooks": ["30"], "common": {"images_name": str(images)}}).runs[0].key


@pytest.mark.parametrize(
    "content, sentence",
    [
        ({"matrix": {"nonsense": [1]}}, "has the parameter 'nonsense'"),
        ({"matrix": {"seed": 3}}, "must be a list of values"),
        ({"matrix": {"seed": ["many"]}}, "parameter seed of 10_first is 'many'"),
        ({"notebooks": ["30"]}, "notebook '30'"),
        ({"runs": 3}, "must be a mapping of notebooks, common, matrix, timeout"),
        ({"notebooks": [["10"]]}, r"notebooks of the sweep is \[\['10'\]\]"),
        ({"notebooks": {"10": {"n": 1}}}, "notebooks of the sweep is {'10'"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(home, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_sweep(content)


@pytest.mark.parametrize(
    "text, names",
    [
        ("notebooks: [20, 10]", ["20_second", "10_first"]),
        ("notebooks: 20", ["20_second"]),
        ("notebooks: 20, 10", ["20_second", "10_first"]),
        ("notebooks:\n- 010", "'010'"),
        ("common: {n: 1", "line 1, can't be read"),
        ("", "seeds.yaml must be a mapping"),
        ("common: {seed: one}", "seeds.yaml: parameter seed of 10_first is 'one'"),
    ],
)
def test_a_file_names_what_it_evidently_means_or_is_refused(home, text, names):
    path = home / "seeds.yaml"
    path.write_text(text)
    if isinstance(names, list):
        assert [run.notebook for run in plan_sweep(path).runs] == names
    else:
        with pytest.raises(ValueError, match=names):
            plan_sweep(path)


def test_a_missing_file_and_no_workers_are_sentences(home):
    with pytest.raises(FileNotFoundError, match="there is no sweep at"):
        plan_sweep(home / "none.yaml")
    with pytest.raises(ValueError, match="workers is 0"):
        sweep({}, workers=0)


def test_failures_stop_nothing_and_a_second_call_runs_only_what_is_missing(home, capsys):
    path = write_sweep(home, notebooks=["10"], matrix={"seed": [1, 3]})
    table = sweep(path, workers=1, progress=False)
    assert table["status"].tolist() == ["done", "failed"]
    assert "three is refused" in table["error"][1]
    assert table["twice"][0] == 2
    folder = home / "reports" / "sweeps" / "seeds"
    good, bad = (folder / "logs" / f"{run}.log" for run in table["run"])
    assert "seed 1" in good.read_text() and "three is refused" in bad.read_text()

    write_sweep(home, notebooks=["10"], matrix={"seed": [1, 2]})
    assert cli.main(["sweep", str(path), "--workers", "1"]) == 0
    again = pd.read_csv(folder / "facts.csv")
    assert again["status"].tolist() == ["cached", "done"] and again["twice"].tolist() == [2, 4]
    page = (folder / "index.html").read_text()
    assert "2 complete" in page and "failed" not in page.partition("<body>")[2], "the run of seed 3 is not this sweep's"
    assert all(f'href="{run}.html"' in page and f"logs/{run}.log" in page for run in again["run"])
    assert "refresh" not in page and "index.html" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_shows_whole_numbers_whole():
    both = pd.DataFrame({"run": ["a", "b"], "notebook": ["10", "20"], "status": ["done", "done"]})
    page = _table(both.assign(error="", seed=[123456, 123457], k=[1234567.0, float("nan")], part=[0.123456, 0.5]))
    assert all(f">{cell}<" in page for cell in ("123456", "123457", "1234567", "0.1235", "0.5"))


def test_workers_of_a_cluster_give_the_same_rows_and_logs(home):
    path = write_sweep(home, notebooks=["10"], matrix={"seed": [1, 3]})
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None, host="127.0.0.1") as cluster:
        table = sweep(path, scheduler=cluster.scheduler_address, progress=False)
    assert table["status"].tolist() == ["done", "failed"] and table["twice"][0] == 2
    assert "three is refused" in table["error"][1]
    logs = [(home / "reports" / "sweeps" / "seeds" / "logs" / f"{run}.log").read_text() for run in table["run"]]
    assert "seed 1" in logs[0] and "three is refused" in logs[1]


FACTS = """from workbench.analysis.intervals import Estimate
from workbench.report.facts import record_facts
record_facts({"rate": Estimate(0.5, 0.3, 0.7, 20), "t": 450, "loss": float("nan"), "model": "a"})"""


def test_facts_are_read_back_as_they_were_recorded(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "seed: int = 0", FACTS)
    run_notebook(tmp_path / "a.ipynb", {}, tmp_path / "out" / "a.ipynb", progress=False)
    rate = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20}
    assert read_facts(tmp_path / "out" / "a.ipynb") == {"rate": rate, "t": 450, "loss": "nan", "model": "a"}
    assert "0.5 (0.3 to 0.7), n = 20" in (tmp_path / "out" / "a.html").read_text()


def test_a_fact_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="fact 'curve' is list"):
        record_facts({"curve": [1, 2]})
