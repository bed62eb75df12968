"""Figures of the papers: the notebook that saves each, its files and its numbers, and the verdicts that follow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import nbformat
import pandas as pd
import pytest
from notebook_files import write_notebook
from PIL import Image

from workbench.analysis.intervals import Estimate
from workbench.datasets.classifiers import load_classifier
from workbench.datasets.labelled import load_images
from workbench.diffusion.loading import load_model
from workbench.diffusion.models import wrap
from workbench.diffusion.schedule import NoiseSchedule
from workbench.report import claims, figures, plots
from workbench.report.facts import read_facts
from workbench.report.parameters import notebook_parameters

PARAMETERS = """model_name: str = "avataaars32"  # a bundled name or a folder
steps: int = 20
seed: int = 0
figures: str = ""  # folder to save the figures to"""

CELL = """
from types import SimpleNamespace

import pandas as pd
import workbench as wb

table = pd.DataFrame({"x": [0, 1], "y": [0.5, steps]})
wb.save_figure(
    "haas-fig4",
    wb.plots.line(table.x, table.y, xlabel="x", ylabel="y"),
    title="Haas et al. Fig. 4: a line",
    caption=f"{steps} steps.",
    table=table,
    numbers={"change_at_2": wb.Estimate(0.4, 0.3, 0.5, steps)},
    sources={"model": SimpleNamespace(name=model_name, hash="abc")},
    folder=figures,
)
"""


MODEL = SimpleNamespace(name="m", hash="abc")


def saved(name="haas-fig2a", folder="", **given):
    """A figure saved by hand, with what is given in place of the usual."""
    options = {
        "title": "a title",
        "caption": "a caption",
        "table": pd.DataFrame({"a": [1]}),
        "numbers": {"follows_h": Estimate(0.9, 0.8, 1.0, 10)},
        "sources": {"model": MODEL},
    }
    figure = plots.line([0, 1], [0, 1], xlabel="x", ylabel="y")
    return figures.save_figure(name, figure, folder=folder, **(options | given))


@pytest.fixture
def records(home, monkeypatch):
    """Where the records of a model are, to which figures are saved without their pictures, which take seconds."""
    monkeypatch.setattr(figures, "WIDTHS", {})
    return home / "data" / "records" / "m"


HAAS = "fig2a fig2b fig3 fig4 fig5 fig6 fig7 fig8a fig8b table1 table1-causes fig11 fig13 alg2 fig17 fig18".split()
EVERY = {f"haas-{name}" for name in HAAS} | {f"zhu-e{i}" for i in range(1, 22)} | {"zhu-text"}


def test_every_experiment_of_both_papers_is_in_a_notebook():
    known = figures.list_figures()
    assert known.keys() == EVERY
    assert {claim.figure for claim in claims.load_claims()} <= EVERY | {figures.BENCHMARK}
    assert all(made.title for made in known.values())
    for made in known.values():
        assert "figures" in notebook_parameters(made.notebook)


# A notebook and its figures


def test_a_notebook_writes_its_figures_and_keeps_their_numbers(home, tmp_path):
    write_notebook(home / "notebooks" / "10_first.ipynb", CELL, parameters=PARAMETERS)
    out = tmp_path / "drawn"
    files = figures.draw_figure("haas-fig4", out=out, parameters={"steps": "7"})
    assert [path.name for path in files] == [
        "haas-fig4.json",
        *(f"haas-fig4-{width}.{end}" for width in ("double", "single") for end in ("pdf", "png", "svg")),
    ]
    record = json.loads(files[0].read_text())
    assert record["numbers"] == {"change_at_2": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 7}}
    assert record["table"] == [{"x": 0, "y": 0.5}, {"x": 1, "y": 7.0}]
    assert (record["title"], record["caption"]) == ("Haas et al. Fig. 4: a line", "7 steps.")
    about = record["provenance"]
    assert about["parameters"] == {"model_name": "avataaars32", "steps": 7, "seed": 0}
    assert (about["notebook"], about["sources"]) == ("10_first", {"model": {"name": "avataaars32", "hash": "abc"}})
    assert read_facts(out / "10_first.ipynb") == {"haas-fig4.change_at_2": record["numbers"]["change_at_2"]}
    outputs = [o for cell in nbformat.read(out / "10_first.ipynb", 4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1

    (home / "data" / "records").mkdir()
    out.rename(home / "data" / "records" / "m")
    assert figures.read_records(model=MODEL)["haas-fig4"]["current"]
    write_notebook(home / "notebooks" / "10_first.ipynb", CELL + "# changed", parameters=PARAMETERS)
    assert not figures.read_records(model=MODEL)["haas-fig4"]["current"]


def test_each_notebook_runs_once_with_the_parameters_that_it_has(home, tmp_path, monkeypatch):
    from workbench.report import notebooks

    write_notebook(home / "notebooks" / "10_first.ipynb", CELL, CELL.replace("fig4", "fig5"), parameters=PARAMETERS)
    second = PARAMETERS + "\nn: int = 3"
    write_notebook(home / "notebooks" / "20_second.ipynb", CELL.replace("haas-fig4", "zhu-e3"), parameters=second)
    (home / "profiles" / "small.yaml").write_text(
        "timeout: 77\ncommon: {steps: 4}\nnotebooks: {20_second: {seed: 9}}\n"
    )
    ran = {}
    monkeypatch.setattr(notebooks, "run_notebook", lambda name, values, out, **on: ran.update({name: values}, on=on))
    options = {"out": tmp_path, "profile": "small"}
    assert figures.draw_figure("all", parameters={"n": "12", "seed": 1}, **options) == []
    both = {"steps": 4, "seed": 1, "figures": str(tmp_path)}
    assert ran == {"10_first": both, "20_second": both | {"n": 12}, "on": {"timeout": 77}}
    ran.clear()
    figures.draw_figure(["haas-fig4", "haas-fig5"], **options)
    assert ran == {"10_first": {"steps": 4, "figures": str(tmp_path)}, "on": {"timeout": 77}}
    with pytest.raises(ValueError, match="10_first.* no parameter 'n'"):
        figures.draw_figure("haas-fig4", parameters={"n": 12}, **options)
    with pytest.raises(ValueError, match="no figure 'haas-fig99'.*haas-fig4"):
        figures.draw_figure("haas-fig99", **options)


def test_a_notebook_that_fails_stops_no_other(home, tmp_path, monkeypatch):
    from workbench.report import notebooks

    for name in ("10_first", "20_second", "30_third"):
        cell = CELL.replace("haas-fig4", name)
        write_notebook(home / "notebooks" / f"{name}.ipynb", cell, parameters=PARAMETERS)
    ran = []

    def fail(name, values, out):
        ran.append(name)
        if name != "20_second":
            raise notebooks.NotebookFailed(f"{name} failed")

    monkeypatch.setattr(notebooks, "run_notebook", fail)
    for given, message in (("all", "2 notebooks failed: 10_first failed; 30_third failed"), ("10_first", "^10_first")):
        with pytest.raises(notebooks.NotebookFailed, match=message):
            figures.draw_figure(given, out=tmp_path)
    assert ran == ["10_first", "20_second", "30_third", "10_first"]


# Files


def test_a_figure_is_saved_at_both_widths_and_displayed_with_its_caption(tmp_path):
    shown = saved(folder=tmp_path)
    assert shown.get_figwidth() == 6.4 and "a caption" in [text.get_text() for text in shown.findobj(figures.Text)]
    for width, inches in figures.WIDTHS.items():
        with Image.open(tmp_path / f"haas-fig2a-{width}.png") as picture:
            # 0.16 inches of padding, and rounding of what the layout does.
            assert picture.width / 300 == pytest.approx(inches + 0.16, rel=0.02)
        assert b"a caption" not in (tmp_path / f"haas-fig2a-{width}.svg").read_bytes()
    assert (tmp_path / "haas-fig2a-single.pdf").read_bytes().count(b"/FontFile2") > 0, "no embedded font"


def test_the_same_figure_gives_the_same_files_also_next_year_by_the_same_versions(tmp_path):
    """PNG and PDF are compressed, which differs by machine; an SVG is text, with its letters as outlines."""
    for folder in ("one", "two"):
        saved(folder=tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    drawn = (tmp_path / "one" / "haas-fig2a-single.svg").read_bytes()
    digest = hashlib.sha256(drawn).hexdigest()[:16]
    assert digest == "967277d48e08b61f", f"drawn by matplotlib {matplotlib.__version__}"


def test_without_a_folder_nothing_is_written_but_the_verdicts_stand_there(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    monkeypatch.chdir(tmp_path)
    saved()
    assert not list(tmp_path.iterdir())
    assert "**holds**: h carries what an image shows" in shown[0].data


def test_letters_stay_legible_at_the_width_of_a_column():
    figure = plots.line([0, 1], [0, 1], xlabel="a long label of the abscissa", ylabel="the ordinate")
    small = figures.resized(figure, 3.4)
    sizes = [text.get_fontsize() for text in small.findobj(figures.Text) if text.get_text()]
    assert min(sizes) >= figures.SMALLEST
    assert {label.get_fontsize() for label in small.axes[0].get_xticklabels()} == {
        label.get_fontsize() for label in small.axes[0].get_yticklabels()
    }


# Records and claims


def test_a_record_of_another_condition_is_of_another_source(make_unet, records):
    model = wrap(make_unet(num_class_embeds=4), NoiseSchedule.linear(), name="m", device="cpu", label=1)
    saved(folder=records, sources={"model": model})
    assert figures.read_records(model=model)
    for other in (model.conditioned(label=2), model.conditioned(label=1, negative=0, guidance_scale=2.0)):
        assert not figures.read_records(model=other)


def test_records_of_other_sources_are_left_out(records):
    judge, images = SimpleNamespace(name="j", hash="def"), SimpleNamespace(hash="123")
    saved(folder=records, sources={"model": MODEL, "judge": judge, "images": images})
    other = SimpleNamespace(name="m", hash="xyz")
    # A figure that no labeller was needed for is of any.
    for given in ({}, {"judge": judge, "images": images}, {"labeller": other}):
        assert list(figures.read_records(**{"model": MODEL} | given)) == ["haas-fig2a"]
    for given in ({"model": other}, {"judge": other}, {"images": other}):
        assert figures.read_records(**{"model": MODEL} | given) == {}


def test_code_that_draws_does_not_make_a_record_outdated(home, monkeypatch):
    path = write_notebook(home / "notebooks" / "10_first.ipynb", "import workbench as wb\nwb.sample\nwb.plots.line")
    asked = []
    monkeypatch.setattr(figures, "code_hash", lambda *modules: asked.extend(modules) or "digest")
    figures._code_hash(path.stem)
    assert asked == ["workbench.diffusion.sampling"]


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.6, 0.9, "holds", "fails"),
        (0.1, 0.4, "fails", "holds"),
        (0.4, 0.6, "undecided", "undecided"),
        (float("nan"), float("nan"), "undecided", "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(low, high, above, below):
    claim = claims.Claim("a paper", "text", "measured", "figure", "number", 0.5)
    assert claim.verdict(low, high) == above
    assert replace(claim, above=False).verdict(low, high) == below


def test_there_are_claims_of_both_papers_each_of_a_number_of_its_own():
    known = claims.load_claims()
    assert {claim.paper for claim in known} == {"Haas et al. 2024", "Zhu et al. 2023"}
    assert len({(claim.figure, claim.number) for claim in known}) == len(known)


def test_the_bundled_records_have_the_number_of_every_claim_and_belong_to_the_bundled_model():
    model = load_model("avataaars32", device="cpu")
    parts = {"labeller": load_classifier("avataaars"), "judge": load_classifier("avataaars-judge")}
    records = figures.read_records(model=model, images=load_images("avataaars", size=32), **parts)
    judged = claims.verdicts(records)
    assert "not measured" not in set(judged.verdict)
    assert judged[["value", "low", "high", "n"]].notna().all(axis=None)


def test_a_claim_without_a_record_is_not_measured(records):
    saved(folder=records)
    judged = claims.verdicts(figures.read_records(model=MODEL)).set_index("claim")
    first = judged.loc["h carries what an image shows (Fig. 2a)"]
    assert (first.verdict, first.value, first.n, first.current) == ("holds", 0.9, 10, False)
    assert (judged.verdict == "not measured").sum() == len(claims.load_claims()) - 1


def test_claims_of_two_domains_stand_side_by_side_and_differ_only_where_one_holds_and_the_other_fails():
    verdicts = {"one": ["holds", "holds", "holds", "not measured"], "two": ["fails", "undecided", "holds", "fails"]}
    judged = {}
    for domain, found in verdicts.items():
        rows = pd.DataFrame({"paper": "a paper", "claim": list("abcd"), "verdict": found})
        judged[domain] = rows.assign(value=0.5, low=0.25, high=0.75).where(rows["verdict"] != "not measured")
        judged[domain]["verdict"] = found
    table = claims.compare(judged)
    assert table["differ"].tolist() == [True, False, False, False]
    assert table["two"].tolist()[:2] == ["fails 0.50 (0.25 to 0.75)", "undecided 0.50 (0.25 to 0.75)"]
    assert table["one"].iloc[3] == "not measured"
