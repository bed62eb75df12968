"""Figures of the papers by name: the list, the files, the numbers, and the verdicts that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workbench import paths
from workbench.datasets.classifiers import load_classifier
from workbench.datasets.labelled import load_images
from workbench.diffusion.loading import load_model
from workbench.report import claims, figures, plots
from workbench.report.figures import Drawn, Number, Setup


@pytest.fixture(scope="module")
def known():
    return figures.list_figures()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A setup of a few samples, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "cache", lambda: tmp_path_factory.getbasetemp() / "figure-cache")
        yield Setup(n=32, measured=4, steps=4, device="cpu")


def test_every_experiment_of_both_papers_has_a_figure(known):
    there = {made.experiment for made in known.values()}
    assert there >= {f"Haas E{i}" for i in range(1, 16)}
    assert there >= {f"Zhu E{i}" for i in range(1, 22)}
    assert all(made.shows and 0 < made.minutes < 30 for made in known.values())
    assert all(name == made.name for name, made in known.items())


QUICK = ("haas-fig2b", "haas-fig8b", "zhu-e2")
"""Figures of few passes, which every run of the tests makes."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in figures.list_figures()]
)
def test_every_figure_can_be_made_and_has_the_numbers_of_its_claims(name, small, tmp_path):
    (path,) = figures.draw_figure(name, small, out=tmp_path, columns="none")
    record = json.loads(path.read_text())
    assert record["table"] and {c.number for c in claims.CLAIMS if c.figure == name} <= set(record["claims"])
    for number in record["claims"].values():
        assert number["n"] >= 2 and not (number["low"] > number["value"] or number["value"] > number["high"])


@pytest.mark.parametrize("name", ["haas-fig2a", "zhu-e3"])
def test_a_figure_is_drawn_at_both_widths_and_beside_its_numbers(name, small, tmp_path):
    files = figures.draw_figure(name, small, out=tmp_path)
    assert sorted(path.name for path in files) == sorted(
        [f"{name}.json", *(f"{name}-{w}.{end}" for w in ("single", "double") for end in ("pdf", "svg", "png"))]
    )
    for width, inches in figures.WIDTHS.items():
        with Image.open(tmp_path / f"{name}-{width}.png") as picture:
            # 0.16 inches of padding, and rounding of what the layout does.
            assert picture.width / 300 == pytest.approx(inches + 0.16, rel=0.02)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["figure"] == name and record["table"] and record["caption"]
    assert record["provenance"]["settings"]["n"] == 32
    assert record["provenance"]["model"]["hash"] == small.model.hash
    assert (tmp_path / f"{name}-single.pdf").read_bytes().count(b"/FontFile2") > 0, "no embedded font"


def test_the_same_setup_gives_the_same_numbers(small, tmp_path):
    (one,), (two,) = (figures.draw_figure("zhu-e3", small, out=tmp_path / which, columns="none") for which in "ab")
    assert one.read_text() == two.read_text()


def test_numbers_are_those_of_the_images(small):
    """Fig. 2a again, by hand."""
    from workbench.editing.edit import edit
    from workbench.report import haas

    drawn = haas.swap(small)
    run = small.run
    donors = run[[1, 2, 3, 0]]
    swapped = edit(small.model, run, donors, mode="replace", progress=False).x0
    own, given, mixed = (small.judge(x).to_numpy() > 0.5 for x in (run.x0, donors.x0, swapped))
    shares = [(mixed[i] == given[i])[own[i] != given[i]].mean() for i in range(4) if (own[i] != given[i]).any()]
    assert drawn.claims["follows_h"].value == pytest.approx(np.mean(shares))
    assert drawn.claims["follows_h"].n == len(shares)


def test_letters_stay_legible_at_the_width_of_a_column():
    figure = plots.line([0, 1], [0, 1], xlabel="a long label of the abscissa", ylabel="the ordinate")
    small = figures.resized(figure, 3.4)
    sizes = [text.get_fontsize() for text in small.findobj(figures.Text) if text.get_text()]
    assert min(sizes) >= figures.SMALLEST
    assert {label.get_fontsize() for label in small.axes[0].get_xticklabels()} == {
        label.get_fontsize() for label in small.axes[0].get_yticklabels()
    }


def test_an_unknown_name_or_width_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no figure 'haas-fig99'; `workbench figure --list` has haas-fig2a"):
        figures.draw_figure("haas-fig99", out=tmp_path)
    with pytest.raises(ValueError, match="columns is 'wide'; it is single, double, both or none"):
        figures.draw_figure("zhu-e3", out=tmp_path, columns="wide")
    few = Setup(n=8, measured=2, steps=2, device="cpu", attribute="Wings")
    with pytest.raises(ValueError, match="has no attribute 'Wings'; it has Smiling"):
        figures.draw_figure("zhu-e4", few, out=tmp_path, columns="none")


def test_intervals_of_means_ratios_and_differences():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, 200)
    found = figures.mean_of([*values, np.nan])
    half = 1.96 * values.std() / np.sqrt(200)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    ratio = figures.ratio_of(3 * np.abs(values), np.abs(values))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))
    gap = figures.difference_of(Number(5, 4, 7, 10), Number(1, 0, 1, 8))
    assert (gap.value, gap.low, gap.high, gap.n) == pytest.approx((4, 3, 4 + np.hypot(2, 1), 8))
    assert np.isnan(figures.mean_of([np.nan]).value)


# Claims


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
    claim = claims.Claim(claims.HAAS, "text", "measured", "figure", "number", 0.5)
    assert claim.verdict(low, high) == above
    assert (
        claims.Claim(claims.HAAS, "text", "measured", "figure", "number", 0.5, above=False).verdict(low, high) == below
    )


def test_there_are_claims_of_both_papers_each_with_a_figure(known):
    assert {claim.paper for claim in claims.CLAIMS} == {claims.HAAS, claims.ZHU}
    assert len(claims.CLAIMS) >= 20
    assert {claim.figure for claim in claims.CLAIMS} <= set(known)
    assert len({(claim.figure, claim.number) for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def test_the_bundled_records_have_the_number_of_every_claim_and_belong_to_the_bundled_model():
    model = load_model("avataaars32", device="cpu")
    parts = {"labeller": load_classifier("avataaars"), "judge": load_classifier("avataaars-judge")}
    records = figures.read_records(model=model, images=load_images("avataaars", size=32), **parts)
    judged = claims.verdicts(records)
    assert "not measured" not in set(judged.verdict)
    assert judged[["value", "low", "high", "n"]].notna().all(axis=None)
    for record in records.values():
        assert record["provenance"]["model"]["hash"] == model.hash


def test_a_record_of_other_weights_code_or_none_at_all_is_not_measured(small, tmp_path, monkeypatch):
    known = figures.list_figures()["haas-fig2a"]
    drawn = Drawn(plots.line([0, 1], [0, 1], xlabel="x", ylabel="y"), pd.DataFrame({"a": [1]}), "caption",
                  {"follows_h": Number(0.9, 0.8, 1.0, 10)})  # fmt: skip
    path = figures.write_record(known, drawn, small, out=tmp_path)
    judged = claims.verdicts(figures.read_records(tmp_path, model=small.model)).set_index("claim")
    first = judged.loc["h carries what an image shows (Fig. 2a)"]
    assert (first.verdict, first.value, first.n, first.current) == ("holds", 0.9, 10, True)
    with monkeypatch.context() as patch:
        patch.setattr(figures, "code_hash", lambda *modules: "other")
        judged_later = claims.verdicts(figures.read_records(tmp_path, model=small.model)).set_index("claim")
        assert not judged_later.loc["h carries what an image shows (Fig. 2a)"].current, "what the recipe calls changed"
    assert (judged.verdict == "not measured").sum() == len(claims.CLAIMS) - 1
    same = {"labeller": small.labeller, "judge": small.judge, "images": small.images}
    assert list(figures.read_records(tmp_path, model=small.model, **same)) == ["haas-fig2a"]
    assert figures.read_records(tmp_path, model=small.model, judge=small.labeller) == {}
    assert figures.read_records(tmp_path, model=small.model, labeller=small.judge) == {}
    assert figures.read_records(tmp_path, model=small.model, images=small.images.at_size(8)) == {}
    with monkeypatch.context() as patch:
        patch.setitem(figures._RECIPES, "haas-fig2a", replace(known, draw=figures.list_figures()["haas-fig3"].draw))
        assert figures.read_records(tmp_path, model=small.model) == {}, "it is drawn in another way now"
    content = json.loads(path.read_text())
    content["provenance"]["model"]["hash"] = "other"
    path.write_text(json.dumps(content))
    assert figures.read_records(tmp_path, model=small.model) == {}
