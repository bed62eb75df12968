"""Notebooks run with checked parameters, and a report is replaced only by a complete one."""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_files import output_of, write_notebook
from PIL import Image
from plotly import graph_objects as go

from workbench import cli
from workbench.diffusion.models import Model
from workbench.report import notebooks, pages, parameters, running
from workbench.report.plans import plan_sweep
from workbench.report.sources import from_here


@pytest.fixture
def notebook(home):
    return write_notebook(home / "notebooks" / "10_first.ipynb", "print('sum', steps + 1, eta, scales)")


class TestParameters:
    def test_names_types_defaults_and_help_are_read(self, home, notebook):
        found = parameters.notebook_parameters("10_first")
        assert list(found) == ["model_name", "steps", "seed", "eta", "images", "scales", "levels"]
        assert found["steps"] == parameters.Parameter("steps", "int", 20, "")
        assert found["model_name"].help == "a bundled name or a folder"
        assert found["scales"].default == [-1, 1]
        assert found["levels"].type == "list[float]"
        write_notebook(home / "notebooks" / "11_plain.ipynb", parameters='steps = 5\nname = "x"\nratio = 0.5')
        types = [each.type for each in parameters.notebook_parameters("11").values()]
        assert types == ["int", "str", "float"], "without annotation the default gives the type"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"sed": 4}, r"'sed'; it takes model_name, steps, seed, .* \(did you mean seed\?\)"),
            ({"steps": "many"}, r"steps of 10_first is 'many' \(str\); it must be int, like its default 20"),
            ({"steps": 2.0}, r"2.0 \(float\); it must be int"),
            ({"steps": True}, r"True \(bool\); it must be int"),
            ({"images": "perhaps"}, r"'perhaps' \(str\); it must be bool \(true or false\)"),
            ({"eta": "nan"}, "it must be float"),
            ({"levels": [0.5, "a"]}, r"'a' \(str\); it must be list\[float\]"),
            ({"scales": [object()]}, "plain value"),
        ],
    )
    def test_unknown_and_mistyped_ones_are_refused_before_anything_runs(self, home, notebook, given, message):
        with pytest.raises(ValueError, match=message):
            notebooks.run_notebook("10_first", given, progress=False)
        assert list((home / "reports").iterdir()) == []

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("name", "007", "007"),
            ("names", "Yes,No", ["Yes", "No"]),
            ("names", "[010, 'a, b', 2020-01-01, on, 1:30]", ["010", "a, b", "2020-01-01", "on", "1:30"]),
            ("names", "", []),
            ("mixed", "1,Yes,2.5,010", [1, "Yes", 2.5, "010"]),
            ("counts", "010,-20", [10, -20]),
            ("rates", "[1e-3, 2]", [0.001, 2.0]),
            ("rate", "1", 1.0),
            ("flag", "on", True),
            ("counts", "1:30", None),
            ("rates", "nan", None),
            ("flag", "maybe", None),
        ],
    )
    def test_the_declared_type_decides_what_a_text_is(self, home, key, text, value):
        types = 'names: list[str] = []\nwords: list = ["a"]\nmixed: list = []\ncounts: list[int] = [1]\n'
        types += 'name: str = ""\nrates: list[float] = [0.5]\nflag: bool = False\nrate: float = 0.5'
        write_notebook(home / "notebooks" / "10_first.ipynb", parameters=types)
        if value is None:
            with pytest.raises(ValueError, match="must be"):
                parameters.read_parameters("10", {key: text})
        else:
            found = parameters.read_parameters("10", {key: text})
            assert found == {key: value} and type(found[key]) is type(value)


class TestCondition:
    """The parameter that makes a model conditional: its keys have types, whatever a text looks like."""

    @pytest.fixture
    def read(self, home):
        write_notebook(home / "notebooks" / "10_first.ipynb", parameters="condition: dict = {}  # of a model")
        return lambda given: parameters.read_parameters("10", {"condition": given})["condition"]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("{prompt: a face}", {"prompt": "a face"}),
            ("{prompt: 1984, negative_prompt: 007}", {"prompt": "1984", "negative_prompt": "007"}),
            ("{prompt: 'a face, with {braces} and \\'}", {"prompt": "a face, with {braces} and \\"}),
            ("{label: 3, negative: 0, guidance_scale: 2}", {"label": 3, "negative": 0, "guidance_scale": 2.0}),
            ({"label": np.int64(3)}, {"label": 3}),
            ("", {}),
        ],
    )
    def test_is_read_by_its_keys(self, read, given, expected):
        found = read(given)
        assert found == expected
        assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in expected.items()}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("{lable: 3}", r"'lable'; it takes prompt, .* \(did you mean label\?\)"),
            ("{label: three}", "label .*'three'.*whole number"),
            ({"label": True}, "True"),
            ({"prompt": 3}, "prompt .* 3; it must be a text"),
            ("[1]", r"'\[1\]'"),
        ],
    )
    def test_of_another_form_is_refused(self, read, given, message):
        with pytest.raises(ValueError, match=message):
            read(given)

    def test_takes_the_options_of_models_that_a_text_can_give(self):
        known = inspect.signature(Model.conditioned).parameters
        assert parameters._CONDITION.keys() == known.keys() - {"self", "condition"}

    def test_reaches_the_notebook_as_it_is(self, home):
        """papermill writes parameters as Python, and takes braces of paths for a format."""
        write_notebook(home / "notebooks" / "10_first.ipynb", "print([condition])", parameters="condition: dict = {}")
        given = {"prompt": 'it\'s {a} "b"\\ \n c', "guidance_scale": 2}
        report = notebooks.run_notebook("10", {"condition": given}, progress=False)
        assert str([given | {"guidance_scale": 2.0}]) in output_of(report.notebook)


class TestSources:
    """What parameters name is looked at before a kernel starts, in the staged notebooks as they are."""

    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [
            ("00", {"model_name": "nope"}, "model_name of 00_quickstart is 'nope': no model 'nope'"),
            ("00", {"model_name": "/nowhere/x.ckpt"}, "no model '/nowhere/x.ckpt'"),
            ("95", {"images_name": "nowhere"}, "there is no folder or zip nowhere"),
            ("90", {"image_path": "none.jpg"}, "there is no image none.jpg"),
            ("20", {"classifier_name": "nobody"}, "no classifier 'nobody'"),
            ("10", {"steps": 2000}, "steps of 10_extract: steps is 2000; a model trained on 1000 timesteps"),
            ("00", {"n": -3}, "n of 00_quickstart is -3; give 1"),
            ("30", {"inversion_steps": [10, 5000]}, "inversion_steps of 30_dynamics: steps is 5000"),
            ("60", {"timestep": 1000}, "timestep of 60_boundaries is 1000; .* 0 to 999"),
            ("20", {"attributes": ["Smiling", "Smilng"]}, "no attribute Smilng; give classifier_name"),
            ("30", {"attributes": ["3", "7"]}, "the images have no attribute 3, 7; give images_name"),
            ("55", {"nuisances": ["Long"]}, "the classifier has no attribute Long"),
            ("50", {"judge_name": "clip"}, "the judge has no attribute Long_Hair"),
            ("70", {"attributes": ["Long", "Smiling"]}, "the classifier has no attribute Long"),
            ("00", {"condition": {"label": 3}}, "condition of 00_.* model avataaars32: .*unconditional.* no label"),
            ("60", {"images_name": ""}, "images_name of 60_boundaries is empty"),
        ],
    )
    def test_are_refused_in_a_sentence(self, name, given, message):
        with pytest.raises(ValueError, match=message):
            parameters.check_parameters(name, given)

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            *((name, {}) for name in parameters.list_notebooks()),
            ("40", {"judge_name": ""}),
            *((name, {"images_name": ""}) for name in ("10", "30", "40", "50", "85")),
            ("00", {"model_name": "google/ddpm-celebahq-256"}),
        ],
    )
    def test_that_are_there_or_may_be_left_out_or_fetched_pass(self, name, given):
        assert parameters.check_parameters(name, given) == given

    @pytest.mark.parametrize(
        ("condition", "message"),
        [
            ({}, "conditioned on a label and none is given; give {label: 3}"),
            ({"label": 4}, "label 4.*0 to 3"),
            ({"label": 1, "prompt": "a face"}, "one of them"),
            ({"label": 1, "guidance_scale": 3.0}, "3.0.*negative"),
            ({"label": 1}, None),
            ({"label": 1, "negative": 2, "guidance_scale": 3.0}, None),
        ],
    )
    def test_a_condition_is_the_model_s_own(self, tiny_folder, make_unet, condition, message):
        make_unet(num_class_embeds=4).save_pretrained(tiny_folder / "unet")
        given = {"model_name": str(tiny_folder), "condition": condition}
        if message is None:
            assert parameters.check_parameters("00", given) == given
        else:
            with pytest.raises(ValueError, match=message):
                parameters.check_parameters("00", given)

    def test_a_judge_that_lacks_what_the_images_have_is_named_without_a_kernel(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(notebooks, "run_job", lambda *args, **options: pytest.fail("a kernel was started"))
        for name in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / "attributes.csv").write_text("file,Long,Short,Smiling\na.png,1,0,1\nb.png,0,1,0\n")
        given = {"images_name": str(tmp_path), "attribute": "Long", "pair": "Short,Smiling"}
        words = [word for key, value in given.items() for word in ("-p", key, value)]
        assert cli.main(["run", "60", *words, "--out", str(tmp_path / "out.ipynb")]) == 2
        assert "the judge has no attribute Long, Short; give judge_name" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path.parent)
        with pytest.raises(ValueError, match="the judge has no attribute Long, Short; give judge_name"):
            plan_sweep({"notebooks": "60", "common": given | {"images_name": tmp_path.name}})

    def test_a_default_is_meant_from_the_notebooks_folder(self, home, monkeypatch):
        path = home / "notebooks" / "10_first.ipynb"
        write_notebook(path, "load_image(image_path)", parameters='image_path: str = "beside.png"')
        Image.new("RGB", (2, 2)).save(path.parent / "beside.png")
        monkeypatch.chdir(home)
        assert parameters.check_parameters("10", {}) == {}
        with pytest.raises(ValueError, match="there is no image other.png"):
            parameters.check_parameters("10", {"image_path": "other.png"})


def test_names_are_in_order_and_unknown_or_ambiguous_ones_are_refused(home, notebook):
    write_notebook(home / "notebooks" / "11_second.ipynb")
    write_notebook(home / "notebooks" / "00_start.ipynb")
    assert parameters.list_notebooks() == ["00_start", "10_first", "11_second"]
    for name, error, message in (
        ("10_frist", ValueError, "is none of 00_start, 10_first, 11_second.*did you mean 10_first"),
        ("1", ValueError, "fits 10_first, 11_second"),
        ("elsewhere.ipynb", FileNotFoundError, "elsewhere.ipynb"),
    ):
        with pytest.raises(error, match=message):
            parameters.notebook_parameters(name)


class TestRun:
    def test_any_place_will_do_and_pictures_in_the_text_are_in_the_report(self, home, tmp_path):
        """Pasted ones, which the cell holds, and files beside the notebook, wherever that lies."""
        source = write_notebook(tmp_path / "mine.ipynb", "print(steps)")
        data = io.BytesIO()
        Image.new("RGB", (2, 2), "red").save(data, format="PNG")
        (tmp_path / "beside.png").write_bytes(data.getvalue())
        notebook = nbformat.read(source, as_version=4)
        cell = new_markdown_cell("![pasted](attachment:image.png) ![file](beside.png)")
        cell["attachments"] = {"image.png": {"image/png": base64.b64encode(data.getvalue()).decode()}}
        notebook.cells.append(cell)
        nbformat.write(notebook, source)
        report = notebooks.run_notebook(source, out=tmp_path / "out" / "result.ipynb", progress=False)
        assert report.html == tmp_path / "out" / "result.html" and list((home / "reports").iterdir()) == []
        page = report.html.read_text(encoding="utf-8")
        body = page[page.index("pasted") - 9000 :]
        assert body.count("data:image/png;base64") == 2 and "attachment:" not in body and "beside.png" not in body
        with pytest.raises(ValueError, match="must end in .ipynb"):
            notebooks.run_notebook(source, out=tmp_path / "result.html", progress=False)

    def test_what_was_computed_stays_where_its_page_cannot_be_made(self, home, notebook, monkeypatch):
        def broken(*args, **options):
            raise ValueError("no page")

        monkeypatch.setattr(notebooks, "export_html", broken)
        with pytest.raises(notebooks.NotebookFailed, match="no page"):
            notebooks.run_notebook("10", progress=False)
        assert "sum" in output_of(home / "reports" / "failed" / "10_first.ipynb")
        assert "its page could not be made: no page" in (home / "reports" / "index.html").read_text(encoding="utf-8")

    def test_a_file_and_a_home_here_are_meant_although_the_notebook_runs_elsewhere(self, home, tmp_path, monkeypatch):
        parameters = 'image_path: str = ""\nimages_name: str = ""\nmodel_name: str = ""\ntarget: str = ""'
        cell = "from pathlib import Path\nfrom workbench import paths\n"
        cell += "print(Path(image_path).read_text(), images_name, target, paths.home())"
        write_notebook(home / "notebooks" / "10_first.ipynb", cell, parameters=parameters)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WORKBENCH_HOME", home.name)
        (tmp_path / "photo.jpg").write_text("here")
        for folder in ("avataaars", "Smiling", "models", "avataaars-judge"):
            (tmp_path / folder).mkdir()
        given = {"image_path": "photo.jpg", "images_name": "avataaars", "model_name": "none", "target": "Smiling"}
        report = notebooks.run_notebook("10", given, progress=False)
        assert f"here avataaars Smiling {home}" in output_of(report.notebook), "bundled names and attributes stay"
        assert report.parameters["image_path"] == str(tmp_path / "photo.jpg")
        assert report.parameters["model_name"] == "none"
        others = from_here({"images_name": "models", "judge_name": "avataaars-judge", "model_name": "models"})
        here = f"{tmp_path}/models"
        assert others == {"images_name": here, "judge_name": "avataaars-judge", "model_name": here}

    def test_a_notebook_that_is_no_report_is_not_replaced(self, home, notebook):
        before = notebook.read_bytes()
        with pytest.raises(ValueError, match="would be replaced"):
            notebooks.run_notebook("10", out=notebook, progress=False)
        assert notebook.read_bytes() == before

    def test_runs_with_the_given_values_and_says_how(self, home, notebook):
        given = {"steps": np.int64(4), "eta": 1, "scales": (0, np.float32(0.5)), "model_name": Path("some/where")}
        report = notebooks.run_notebook("10", given, progress=False)
        assert report.notebook == home / "reports" / "10_first.ipynb"
        assert "sum 5 1.0 [0, 0.5]" in output_of(report.notebook)
        assert report.parameters["model_name"] == "some/where" and report.parameters["seed"] == 0
        assert 0 < report.seconds < 120
        assert "\n" not in repr(report)

        page = report.html.read_text(encoding="utf-8")
        footer = page[page.index("report-footer") :]
        for expected in ("steps = 4", "eta = 1.0", "seed = 0", "torch 2.", "hspace-workbench", "UTC", "unknown"):
            assert expected in footer
        assert re.search(r">\d+ s<", footer)
        assert not re.search(r'(src|href)="(https?:)?//', page)
        assert "A title" in (home / "reports" / "index.html").read_text(encoding="utf-8")
        made = {path.name for path in (home / "reports").iterdir()}
        assert made == {"10_first.html", "10_first.ipynb", "index.html"}
        assert str(home) not in json.dumps(nbformat.read(report.notebook, as_version=4).metadata)

    def test_a_failure_is_kept_apart_and_the_last_good_report_stays(self, home):
        source = home / "notebooks" / "10_first.ipynb"
        write_notebook(source, "print('one')", "if steps > 20:\n    raise KeyError('too many')", "print('three')")
        good = notebooks.run_notebook("10", progress=False)
        kept = good.notebook.read_bytes(), good.html.read_bytes()

        with pytest.raises(notebooks.NotebookFailed, match="10_first failed in cell 3 .KeyError: 'too many'") as caught:
            notebooks.run_notebook("10", {"steps": 21}, progress=False)
        failed = home / "reports" / "failed" / "10_first.html"
        assert str(caught.value).endswith(str(failed)) and "too many" in failed.read_text(encoding="utf-8")
        assert output_of(failed.with_suffix(".ipynb")).strip() == "one"
        assert (good.notebook.read_bytes(), good.html.read_bytes()) == kept
        index = (home / "reports" / "index.html").read_text(encoding="utf-8")
        assert "card failed" in index and 'href="failed/10_first.html"' in index and 'href="10_first.html"' in index

        notebooks.run_notebook("10", progress=False)
        assert list((home / "reports" / "failed").iterdir()) == [], "a later success clears the failure"
        assert "card failed" not in (home / "reports" / "index.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("cell", "ename"),
        [("import time\ntime.sleep(60)", "CellTimeoutError"), ("import os\nos._exit(3)", "DeadKernelError")],
    )
    def test_a_hung_cell_and_a_dead_kernel_are_failures(self, home, cell, ename):
        write_notebook(home / "notebooks" / "10_first.ipynb", "x = 1", cell)
        with pytest.raises(notebooks.NotebookFailed, match=f"cell 3 .{ename}"):
            notebooks.run_notebook("10", progress=False, timeout=5)
        assert (home / "reports" / "failed" / "10_first.html").exists()

    def test_a_log_has_no_lines_of_bars(self, home, capsys):
        write_notebook(home / "notebooks" / "10_first.ipynb", "x = 1")
        notebooks.run_notebook("10")
        assert capsys.readouterr().err == ""

    def test_an_interrupt_leaves_nothing_half_written(self, home):
        started = home / "started"
        cell = f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)"
        write_notebook(home / "notebooks" / "10_first.ipynb", cell)
        code = "from workbench.report import notebooks; notebooks.run_notebook('10', progress=False)"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors
        assert list((home / "reports").iterdir()) == []

    def test_a_kernel_that_does_not_start_is_tried_once_more(self, notebook, monkeypatch):
        calls = []
        execute = running.papermill.execute_notebook

        def fail_once(*args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise RuntimeError("Kernel died before replying to kernel_info")
            return execute(*args, **kwargs)

        monkeypatch.setattr(running.papermill, "execute_notebook", fail_once)
        assert notebooks.run_notebook("10", progress=False).notebook.exists()
        assert len(calls) == 2


class TestHtml:
    """What the exporter makes of outputs, without running anything."""

    @staticmethod
    def export(tmp_path, *cells) -> str:
        nbformat.write(new_notebook(cells=list(cells)), tmp_path / "n.ipynb")
        page = pages.export_html(tmp_path / "n.ipynb", tmp_path / "n.html", footer={"Made": "by <hand>"})
        return page.read_text(encoding="utf-8")

    @staticmethod
    def cell_with(data: dict) -> nbformat.NotebookNode:
        output = nbformat.v4.new_output("display_data", data=data)
        return new_code_cell("draw()", outputs=[output], execution_count=1)

    def test_formulas_become_mathml(self, home, tmp_path):
        text = r"Inline $x_t$, and $$\sqrt{\bar\alpha_t}$$ and \begin{align*} a &= b \\ c &= d \end{align*}"
        page = self.export(tmp_path, new_markdown_cell(text), self.cell_with({"text/latex": r"$\eta = 0$"}))
        assert page.count("<math") == 4
        assert "<msqrt>" in page and "<mtable" in page
        assert "$" not in page.partition("<main>")[2]

    @pytest.mark.parametrize("latex", [r"\unknown{x}", r"\frac{1}{", "a < b &"])
    def test_a_formula_that_cannot_be_converted_stays_readable(self, home, tmp_path, latex):
        page = self.export(tmp_path, new_markdown_cell(f"See ${latex}$."))
        shown = latex.replace("&", "&amp;").replace("<", "&lt;")
        assert f'<code class="latex">{shown}</code>' in page

    def test_plotly_figures_share_one_copy_of_the_library(self, home, tmp_path):
        figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
        plain = self.cell_with({"application/vnd.plotly.v1+json": json.loads(figure.to_json()), "text/plain": "f"})
        own = {"text/html": figure.to_html(full_html=False, include_plotlyjs=True)}
        page = self.export(tmp_path, plain, self.cell_with(own))
        assert page.count("Plotly.newPlot(") >= 2
        assert page.count(pages.get_plotlyjs()[:300]) == 1
        assert "Plotly" not in self.export(tmp_path, new_markdown_cell("no figure"))

    def test_scripts_from_the_network_are_taken_out_words_escaped_and_inline_html_stays(self, home, tmp_path):
        script = self.cell_with({"text/html": '<script src="https://cdn/x.js"></script><b>bold</b>'})
        page = self.export(tmp_path, script, new_markdown_cell("# A <i>b</i>\n\nSome <em>other</em> words"))
        assert "cdn" not in page and "<b>bold</b>" in page and '<details class="code">' in page
        assert "by &lt;hand&gt;" in page and "<em>other</em>" in page

    def test_a_drawing_without_pixels_is_shown_as_it_is(self, home, tmp_path):
        drawing = '<svg xmlns="http://www.w3.org/2000/svg"><circle r="3"/></svg>'
        alone = self.cell_with({"image/svg+xml": drawing, "text/plain": "SVG object"})
        drawn = base64.b64encode(drawing.encode()).decode()
        assert drawn in self.export(tmp_path, alone)
        page = pages.export_html(tmp_path / "n.ipynb", tmp_path / "n.html", footer={}, vectors=True)
        assert drawn in page.read_text(encoding="utf-8")

    def test_progress_bars_go_and_widgets_show_their_picture(self, home, tmp_path):
        view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
        png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        bar, studio = {"text/plain": "0%| | 0/5"}, {"text/plain": "EditStudio", "image/png": png}
        output = nbformat.v4.new_output("stream", name="stderr", text=" 10%\r 50%\r100%\nwarning: careful\n")
        stream = new_code_cell("x", outputs=[output], execution_count=1)
        page = self.export(tmp_path, self.cell_with(view | bar), self.cell_with(view | studio), stream)
        assert "0/5" not in page and page.count(png) == 1
        assert "50%" not in page and "100%" in page and "warning: careful" in page
