"""Figures show the data that they are given, and refuse data that they would show wrongly."""

from __future__ import annotations

import io
import json
import shutil
import subprocess

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection
from PIL import Image

from workbench.analysis.mixing_criteria import MixingStep
from workbench.report import plots, style


@pytest.fixture
def images():
    """12 images of 3 x 8 x 8; image i is grey of level i / 11, but for a white pixel at row 2, column 5."""
    levels = np.linspace(-1, 1, 12, dtype=np.float32)[:, None, None, None]
    images = np.broadcast_to(levels, (12, 3, 8, 8)).copy()
    images[:, :, 2, 5] = 1.0
    return images


def drawn(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


class TestImageGrid:
    def test_holds_each_image_once_row_by_row_with_its_values(self, images):
        (axes,) = plots.image_grid(images, columns=5).axes
        assert len(axes.images) == 12
        for i, shown in enumerate(axes.images):
            pixels = np.asarray(shown.get_array())
            assert pixels.shape == (8, 8, 3) and (pixels[2, 5] == 255).all()
            assert pixels[0, 0] == pytest.approx([round(255 * i / 11)] * 3, abs=1)
        left, top = np.array([shown.get_extent() for shown in axes.images])[:, [0, 3]].T
        assert (np.diff(left[:5]) > 0).all() and (left[5], left[6]) == (left[0], left[1]) and top[5] > top[0]

    def test_every_pixel_is_drawn_as_one_sharp_square(self):
        checks = np.indices((8, 8)).sum(0) % 2 * 2.0 - 1.0
        picture = drawn(plots.image_grid(np.broadcast_to(checks, (1, 3, 8, 8))))
        inner = picture[20:-20, 20:-20, 0]
        assert np.isin(inner, (0, 255)).mean() > 0.99
        edges = np.flatnonzero(np.diff(inner[len(inner) // 2].astype(int)))
        assert len(set(np.diff(edges))) == 1

        image = -np.ones((1, 3, 32, 32))  # orientation and colour
        image[0, 0, :16, :16] = 1
        picture = drawn(plots.image_grid(image))
        height, width = picture.shape[:2]
        assert picture[height // 4, width // 4].tolist() == [255, 0, 0]
        assert picture[3 * height // 4, 3 * width // 4].tolist() == [0, 0, 0]

    def test_carries_labels_titles_and_a_caption(self, images):
        rows, columns, titles = ["plain", "smile", "beard"], ["-3", "-1", "1", "3"], [f"seed {i}" for i in range(12)]
        labels = {"row_labels": rows, "column_labels": columns, "titles": titles}
        figure = plots.image_grid(images.reshape(3, 4, 3, 8, 8), **labels, caption="Edits of one sample.")
        (axes,) = figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == rows
        assert [label.get_text() for label in axes.get_xticklabels()] == columns
        assert len(axes.images) == 12 and "seed 11" in texts(figure) and "Edits of one sample." in texts(figure)

    def test_a_saved_one_has_its_labels_which_stand_outside(self, tmp_path):
        """With matplotlib's own settings, which know the canvas alone."""
        grid = plots.image_grid(torch.zeros(2, 3, 3, 8, 8), row_labels=["a", "b"], column_labels=list("123"))
        grid.savefig(tmp_path / "grid.png", dpi=grid.dpi)
        displayed = Image.open(io.BytesIO(grid._repr_png_()))
        assert Image.open(tmp_path / "grid.png").size == displayed.size
        assert displayed.width > grid.get_figwidth() * grid.dpi

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_takes_tensors_noisy_images_and_grey_ones(self, images, dtype):
        (first, *_, last) = plots.image_grid(torch.tensor(images[:, :1] * 4).to(dtype)).axes[0].images
        assert np.asarray(last.get_array()).shape == (8, 8, 3) and np.asarray(last.get_array())[0, 0, 0] == 255
        assert np.asarray(first.get_array())[0, 0, 0] == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x[0], "must be \\(n, C, H, W\\)"),
            (lambda x: x.transpose(0, 2, 3, 1), "channels first"),
            (lambda x: (x * 127.5 + 127.5).astype(np.uint8), "x / 127.5 - 1"),
            (lambda x: x * 127.5 + 127.5, "must be in \\[-1, 1\\] \\(8 bits: x / 127.5 - 1"),
            (lambda x: np.where(x == 1, np.nan, x), "NaN or infinite"),
        ],
    )
    def test_refuses_what_is_no_image(self, images, change, message):
        with pytest.raises(ValueError, match=message):
            plots.image_grid(change(images))


class TestCurves:
    """Of a tidy table, and of arrays by `line`, which draws by it."""

    def test_one_line_a_name_each_with_its_own_x_and_band(self):
        table = pd.DataFrame(
            {"t": [0, 1, 2, 0, 5], "y": [0, 1, 4, 7, 8], "low": [-1, 0, 3, None, None], "high": [1, 2, 5, None, None]}
        ).assign(space=["x", "x", "x", "h_t", "h_t"])
        options = {"xlabel": "timestep t", "ylabel": "norm", "caption": "of space"}
        figure = plots.curves(table, x="t", y="y", by="space", low="low", high="high", reverse_x=True, **options)
        (axes,) = figure.axes
        assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0], [1, 1], [2, 4]], [[0, 7], [5, 8]]]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "h_t"]
        (band,) = axes.collections
        assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (-1, 5)
        assert axes.get_xlabel() == "timestep t" and axes.get_ylabel() == "norm" and axes.xaxis_inverted()
        assert axes.lines[0].get_color() != axes.lines[1].get_color() and "of space" in texts(figure)
        alone = plots.curves(table[:3], x="t", y="y", xlabel="t", ylabel="y").axes[0]
        assert len(alone.lines) == 1 and alone.get_legend() is None and not alone.collections

    def test_arrays_are_drawn_as_their_table(self):
        x = np.arange(5)
        two = {"h": torch.tensor(x), "Long_Hair": pd.Series(2 * x, index=x + 7)}
        axes = plots.line(pd.Index(x), two, low={"h": x - 1}, high={"h": x + 1}, xlabel="t", ylabel="norm").axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["h", "Long Hair"]
        assert len(axes.collections) == 1 and axes.lines[1].get_ydata().tolist() == [0, 2, 4, 6, 8]

    def test_more_lines_than_colours_can_still_be_told_apart_and_their_legend_stands_above(self):
        lines = {f"s{i}": [0, i] for i in range(20)}
        figure = plots.line([0, 1], lines, xlabel="t", ylabel="y")
        drawn = figure.axes[0].lines
        assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 20
        assert {line.get_linestyle() for line in drawn[:8]} == {"-"}
        assert figure.axes[0].get_legend() is None and len(figure.legends[0].get_texts()) == 20

    def test_an_end_of_an_interval_may_be_unknown_but_not_infinite(self):
        options = {"xlabel": "x", "ylabel": "y"}
        assert plots.line([0, 1], [0, 1], low=[np.nan, 0], high=[np.nan, 2], **options).axes[0].collections
        with pytest.raises(ValueError, match="low has 1 of 2 values that are NaN or infinite"):
            plots.line([0, 1], [0, 1], low=[-np.inf, 0], high=[2, 2], **options)

    @pytest.mark.parametrize(
        ("y", "extra", "message"),
        [
            ([1, 2], {}, r"\(2,\)"),
            ([1, 2, np.nan], {}, "y has 1 of 3"),
            ([1, 2, 3], {"low": [0, 0, 0]}, "both ends"),
            ([1, 2, 3], {"low": [0, 9, 0], "high": [4, 4, 4]}, "low is above high"),
            ({"a": [1, 2, 3]}, {"low": {"b": [0] * 3}, "high": {"b": [1] * 3}}, "'b', which is no line"),
        ],
    )
    def test_refuses_what_does_not_match(self, y, extra, message):
        with pytest.raises(ValueError, match=message):
            plots.line([0, 1, 2], y, xlabel="x", ylabel="y", **extra)


class TestScatter:
    def test_shows_every_point_and_a_colour_bar_or_a_legend(self, images):
        points = np.random.default_rng(0).normal(size=(12, 2))
        color = np.arange(12.0)
        figure = plots.scatter(points, color=color, xlabel="PC 1", ylabel="PC 2", color_label="score")
        (dots,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
        assert np.allclose(dots.get_offsets(), points)
        assert np.allclose(dots.get_array(), color)
        assert "score" in texts(figure)

        figure = plots.scatter(np.eye(3, 2), color=["cat", "dog", "cat"], xlabel="x", ylabel="y", color_label="animal")
        legend = figure.axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["cat", "dog"]
        assert legend.get_title().get_text() == "animal"

    def test_thumbnails_do_not_overlap_and_lie_on_their_points(self, images):
        rng = np.random.default_rng(1)
        points = np.concatenate([rng.normal(size=(300, 2)) * [5, 1], [[40.0, 0.0]]])
        pictures = np.concatenate([np.zeros((300, 3, 8, 8)), np.ones((1, 3, 8, 8))])
        axes = plots.scatter(points, images=pictures, xlabel="x", ylabel="y").axes[0]
        boxes = np.array([shown.get_extent() for shown in axes.images])
        assert 5 < len(boxes) <= 40
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
        centres = np.stack([boxes[:, :2].mean(1), boxes[:, 2:].mean(1)], 1)
        assert (np.abs(centres[:, None] - points[None]).max(-1).min(1) < 1e-9).all()
        assert np.allclose(centres[0], [40, 0]), "the outlier is shown"
        assert np.asarray(axes.images[0].get_array()).min() == 255, "with its own picture"

    @pytest.mark.parametrize(
        ("points", "extra", "message"),
        [
            (np.zeros((12, 5)), {}, "points has shape"),
            (np.full((12, 2), np.inf), {}, "NaN or infinite"),
            (np.zeros((11, 2)), {}, "12 images for 11 points"),
            (np.zeros((12, 2)), {"color": np.zeros(3)}, "one value per point"),
            (np.zeros((12, 2)), {"color": [str(i) for i in range(12)]}, "12 categories"),
        ],
    )
    def test_refuses_what_does_not_match(self, images, points, extra, message):
        with pytest.raises(ValueError, match=message):
            plots.scatter(points, images=images, xlabel="x", ylabel="y", **extra)


class TestAnimate:
    @pytest.mark.parametrize("suffix", [".gif", ".webp"])
    def test_a_film_has_every_frame_there_and_back(self, tmp_path, suffix):
        shades = np.linspace(-1, 1, 4)
        images = np.broadcast_to(shades[None, :, None, None, None], (2, 4, 3, 100, 100))
        film = Image.open(plots.animate(images, tmp_path / f"film{suffix}"))
        assert (film.n_frames, film.size, film.info["loop"]) == (6, (600, 300), 0)
        seen = []
        for k in range(film.n_frames):
            film.seek(k)
            seen.append(np.asarray(film.convert("RGB"))[3, 3, 0])
        expected = (np.array([*shades, *shades[2:0:-1]]) + 1) * 127.5
        assert np.allclose(seen, expected, atol=2) and film.info["duration"] in (120, 125)

    def test_an_mp4_without_ffmpeg_or_its_codec_is_refused_in_a_sentence(self, tmp_path, monkeypatch):
        images = np.zeros((3, 3, 8, 8))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match="ffmpeg, which is not installed"):
            plots.animate(images, tmp_path / "film.mp4")
        program = tmp_path / "ffmpeg"
        program.write_text("#!/bin/sh\n/bin/cat > /dev/null\necho no codec >&2\nexit 1\n")
        program.chmod(0o755)
        with pytest.raises(ValueError, match="no codec"):
            plots.animate(images, tmp_path / "other.mp4")
        assert not (tmp_path / "other.mp4").exists()

    @pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
    def test_an_mp4_holds_the_frames(self, tmp_path):
        shades = np.linspace(-0.9, 0.9, 4)
        images = np.broadcast_to(shades[:, None, None, None], (4, 3, 257, 257))
        film = plots.animate(images, tmp_path / "film.mp4")
        decode = ["ffmpeg", "-loglevel", "error", "-i", str(film), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        decoded = subprocess.run(decode, capture_output=True, check=True).stdout
        seen = np.frombuffer(decoded, np.uint8).reshape(6, 258, 258, 3)  # an odd side is padded to an even one
        expected = (np.array([*shades, *shades[2:0:-1]]) + 1) * 127.5
        assert np.allclose(seen[:, 12, 12], expected[:, None], atol=6)
        assert film.read_bytes()[4:8] == b"ftyp"

    @pytest.mark.parametrize(
        ("shape", "path", "message"),
        [((1, 3, 8, 8), "a.gif", r"\(1, 1, 3, 8, 8\)"), ((3, 3, 8, 8), "a.png", "ends in .png")],
    )
    def test_refuses_what_is_no_film(self, tmp_path, shape, path, message):
        with pytest.raises(ValueError, match=message):
            plots.animate(np.zeros(shape), tmp_path / path)


def test_a_figure_is_a_vector_only_where_it_is_printed_and_not_too_large(monkeypatch):
    figure = plots.line([1, 2], {"a": [0, 1]}, xlabel="x", ylabel="y")
    assert figure._repr_svg_() is None
    monkeypatch.setenv(style.VECTORS, "1")
    assert figure._repr_svg_().startswith("<?xml") and figure._repr_svg_() == figure._repr_svg_()
    monkeypatch.setattr(style, "_LARGEST", 1000)
    assert figure._repr_svg_() is None


class TestSaveFigure:
    @pytest.mark.parametrize("given", ["t0.5", "t0.5.pdf", "t0.5.PNG", "deep/t0.5.svg"])
    def test_writes_three_formats(self, tmp_path, given):
        figure = plots.line([0, 1], [0, 1], xlabel="x", ylabel="y")
        written = plots.save_figure(figure, tmp_path / given)
        assert [path.name for path in written] == ["t0.5.pdf", "t0.5.svg", "t0.5.png"]
        assert written[0].read_bytes().startswith(b"%PDF")
        assert b"/FontFile2" in written[0].read_bytes(), "TrueType fonts are embedded"
        assert b"<svg" in written[1].read_bytes() and b"<text" not in written[1].read_bytes(), "text is outlines"
        assert Image.open(written[2]).info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)

    def test_a_failure_leaves_the_old_files(self, tmp_path):
        (tmp_path / "f.pdf").write_text("old")
        figure = plots.line([0, 1], [0, 1], xlabel="$\\unknown$", ylabel="y")
        with pytest.raises(ValueError):
            plots.save_figure(figure, tmp_path / "f")
        assert [path.name for path in tmp_path.iterdir()] == ["f.pdf"]
        assert (tmp_path / "f.pdf").read_text() == "old"

        with pytest.raises(ValueError, match="got ndarray"):
            plots.save_figure(np.zeros(3), tmp_path / "f")


def test_figures_change_no_settings_outside_and_use_the_palette(images):
    before = json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()})
    plots.image_grid(images)
    plots.line([0, 1], [0, 1], xlabel="x", ylabel="y")._repr_png_()
    assert json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()}) == before
    with matplotlib.style.context(plots.STYLE):
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.PALETTE)


def test_bars_draw_each_series_at_its_heights():
    first, second = pd.Series({"a": 0.2, "b": 0.4}), pd.Series({"a": 0.3, "b": 0.1})
    figure = plots.bars({"one": first, "two": second}, ylabel="share")
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.2, 0.4, 0.3, 0.1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert axes.get_ylabel() == "share"
    many = plots.bars({f"s{i}": pd.Series({"a": 1.0}) for i in range(20)}, ylabel="y").axes[0].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in many}) == 20
    for groups, options, message in (
        ({"one": first, "two": pd.Series({"b": 1.0})}, {}, "different names"),
        ({}, {}, "nothing to draw"),
        ({"one": first}, {"low": {"one": first}}, "both ends"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.bars(groups, ylabel="share", **options)


def test_a_matrix_writes_its_numbers_and_zero_is_the_middle_colour():
    table = pd.DataFrame([[0.5, -1.0], [0.0, 0.25]], index=["Smiling", "Beard"], columns=["Smiling", "Long_Hair"])
    axes = plots.matrix(table).axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.50", "-1.00", "+0.00", "+0.25"]
    assert axes.images[0].get_clim() == (-1.0, 1.0)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Smiling", "Long Hair"]
    with pytest.raises(ValueError, match="finite"):
        plots.matrix(table.replace(0.25, float("nan")))
    wide = pd.DataFrame([[0.05, -0.25, 10.05, 20.3, -30.25, 1.0, 0.0, 0.5, 0.1, 0.2, 0.3, 0.4]])
    shown = [text.get_text() for text in plots.matrix(wide).axes[0].texts]
    assert shown[:7] == [".05", "-.25", "10.05", "20.30", "-30.25", "1.00", ".00"], "only leading zeros are lost"


def mixing_step_of(values, *, t, threshold=0.5, reached=True):
    curve = pd.DataFrame({"value": values, "low": values - 0.1, "high": values + 0.1}, index=[900, 600, 300, 0])
    alpha_bars = np.linspace(0.99, 0.01, 1000)
    return MixingStep(t, (300, 600), "commit", curve, threshold, reached, "agreement", 24, alpha_bars)


def test_mixing_steps_share_one_axis_of_timesteps_noise_first():
    first = mixing_step_of(np.array([0.1, 0.4, 0.7, 1.0]), t=300)
    second = mixing_step_of(np.array([0.0, 0.1, 0.2, 0.3]), t=0, reached=False)
    figure = plots.mixing_steps([first, second], caption="Two criteria.")
    assert len(figure.axes) == 2
    for step, axes in zip((first, second), figure.axes, strict=True):
        curve, threshold, chosen = axes.lines
        assert curve.get_xdata().tolist() == [900, 600, 300, 0]
        np.testing.assert_array_equal(curve.get_ydata(), step.curve["value"])
        assert set(threshold.get_ydata()) == {0.5} and set(chosen.get_xdata()) == {step.t}
        left, right = axes.get_xlim()
        assert left > right
    assert "t = 300 [300, 600], n = 24" in texts(figure) and "threshold not reached, nearest at 0" in texts(figure)
    assert len(plots.mixing_steps(first).axes) == 1
    with pytest.raises(ValueError, match="at least one mixing step"):
        plots.mixing_steps([])


def test_a_training_curve_draws_each_noise_level_and_all_of_them():
    log = pd.DataFrame({"images": [10, 20, 30], "loss": [0.5, 0.2, 0.1], "t 0-99": [0.9, 0.5, None], "t 100-999": 0.1})
    figure = plots.training_curve(log, caption="a caption")
    (axes,) = figure.axes
    found = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(found) == ["t 0-99", "t 100-999", "all"]
    np.testing.assert_array_equal(found["all"], log["loss"])
    np.testing.assert_array_equal(found["t 0-99"], log["t 0-99"])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert "a caption" in texts(figure)
    with pytest.raises(ValueError, match="log of the training is empty"):
        plots.training_curve(log[:0])


def pareto_table(*methods):
    rows = []
    for k, method in enumerate(methods):
        for i in range(3):
            x, y = 40 - 5 * i, 0.2 * i + 0.1 * k
            ends = {"psnr_outside_low": x - 1, "psnr_outside_high": x + 1, "success_low": y, "success_high": y + 0.1}
            rows.append({"method": method, "psnr_outside": x, "success": y, **ends})
    return pd.DataFrame(rows)


def test_pareto_has_a_panel_a_family_and_the_controls_in_each():
    family = {"PCA": "unsupervised, h", "mean": "supervised, h", "probe": "supervised, h", "random": "control"}
    figure = plots.pareto(pareto_table(*family), family=family)
    panels = {axes.get_title(loc="left"): axes.get_legend_handles_labels()[1] for axes in figure.axes}
    assert panels == {"unsupervised, h": ["PCA", "random"], "supervised, h": ["mean", "probe"]}
    assert [len(axes.lines) for axes in figure.axes] == [2, 3], "the control is drawn in each, and named once"
    (drawn,) = [line for line in figure.axes[1].lines if line.get_label() == "probe"]
    np.testing.assert_allclose(drawn.get_xdata(), [40, 35, 30])
    assert plots.pareto(pareto_table("random"), family={"random": "control"}).axes[0].lines
    names = [f"method {i}" for i in range(10)]
    lines = plots.pareto(pareto_table(*names), family=dict.fromkeys(names, "one")).axes[0].lines
    assert len({(line.get_color(), line.get_marker(), line.get_mfc()) for line in lines}) == 10
    with pytest.raises(ValueError, match="there is no family of 'PCA'"):
        plots.pareto(pareto_table("PCA"), family={})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.pareto(pareto_table("PCA")[:0], family={"PCA": "control"})


def test_strips_have_a_row_a_method_and_white_cells_where_it_has_fewer_strengths():
    strips = {("long", "A"): np.zeros((3, 4, 3, 8, 8)), ("short", "A"): np.zeros((3, 2, 3, 8, 8))}
    figure = plots.edit_strips(strips, "A", names=["one", "two"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["long", "short"]
    edits = [f"edit {i}" for i in (1, 2, 3)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", *edits, "two", *edits]
    cells = [image.get_array() for image in axes.images]
    assert [int(cell.min()) for cell in cells] == [127 + 1] * 8 + [128, 128, 255, 255] * 2
    with pytest.raises(ValueError, match="there is no strip of 'B'; there are 'A'"):
        plots.edit_strips(strips, "B", names=["one"])
