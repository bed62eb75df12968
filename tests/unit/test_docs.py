"""The pages: short where they promise it, complete, with links that lead somewhere and code that is not out of date."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer
import yaml
from safetensors import safe_open

import workbench as wb
from workbench import cli
from workbench.report import claims, figures, parameters
from workbench.studio import recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
GENERATED = {"gallery", "api/index"}
"""Pages that `docs/build.py` makes."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as code hosts and myst make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(name: str) -> list[str]:
    """Lines of shell blocks that call `workbench`, without what launches it, and without comments."""
    lines = "\n".join(blocks(name, "sh")).replace("\\\n", " ").replace("$part", "0").splitlines()
    lines = [part for line in lines for part in re.split(r"; do |; done|&& ", line)]
    called = [re.search(r"(?:^|-m (?:-- )?)workbench(?:\.cli)?( .*|$)", line.strip()) for line in lines]
    return [found[1].strip() for found in called if found]


def parsed(words: list[str]) -> None:
    """Parse a command with the real command line, without running it."""
    group = typer.main.get_command(cli.app)
    while hasattr(group, "commands"):
        assert words and words[0] in group.commands, f"there is no command {words}"
        group, words = group.commands[words[0]], words[1:]
    group.make_context("workbench", words)


def test_the_readme_is_short_and_has_two_commands_a_picture_and_one_block_of_python():
    assert len(text_of("README.md").split()) <= 850
    assert len(blocks("README.md", "python")) == 1
    assert len([line for line in blocks("README.md", "sh")[0].splitlines() if line]) == 2
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text_of("README.md"))
    assert 0 < (ROOT / picture).stat().st_size < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name):
    page = ROOT / name
    assert not re.search(r"^(<{7}|>{7}) ", text_of(name), re.M), f"{name} holds an unfinished merge"
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{name} links to {target}"


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_compiles_and_calls_what_there_is(name):
    for block in blocks(name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "wb":
                assert hasattr(wb, node.attr), f"{name}: wb.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("workbench"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name}: {node.module}"


@pytest.mark.parametrize("name", [name for name in NAMES if commands_in(name)])
def test_commands_are_those_that_the_command_line_takes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # options that name an output check that it can be written
    for command in commands_in(name):
        parsed(shlex.split(command, comments=True))


def test_every_command_notebook_and_sheet_is_in_its_page():
    commands = typer.main.get_command(cli.app).commands
    page = text_of("docs/command-line.md")
    missing = [name for name in commands if not re.search(rf"workbench {name}\b", page)]
    assert missing == []
    page = text_of("docs/notebooks.md")
    assert [name for name in parameters.list_notebooks() if f"`{name}`" not in page] == []
    sheets = {path.stem for path in (ROOT / "notebooks" / "exercises").glob("*.ipynb")}
    assert [name for name in sheets if f"`{name}`" not in text_of("docs/course.md")] == []


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^[\w./-]+$", "\n".join(blocks("docs/index.md", "{toctree}")), re.M)) - GENERATED
    for entry in listed:
        assert (ROOT / "docs" / f"{entry}.md").exists(), entry
    pages = {name.removeprefix("docs/").removesuffix(".md") for name in NAMES if name.startswith("docs/")}
    assert pages - {"index"} <= listed
    shown = set(re.findall(r"\]\(([\w./-]+)\.md\)", text_of("docs/index.md")))
    assert {page for page in pages if page.startswith("how-to/")} <= shown, "a reader of the page sees no hidden table"


@pytest.mark.slow
def test_the_readme_and_the_tour_run_as_they_are_written_but_for_the_number_of_samples(cache):
    for name in ("README.md", "docs/tour.md"):
        text, scope = "\n".join(blocks(name, "python")), {}
        for many, few in {"n=128": "n=40", "k=32": "k=8", "steps=50": "steps=10", "data[:100]": "data[:40]"}.items():
            text = text.replace(many, few)
        exec(compile(text.replace("[:100].to_numpy", "[:40].to_numpy"), name, "exec"), scope)
        assert scope["effects"].summary("Smiling")["change"].notna().all()


# The site


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_blocks_are_those_of_the_records_and_the_docstrings():
    made = script("blocks")
    blocks = made.blocks()
    for page, of in blocks.items():
        assert made.filled(text_of(page), of) == text_of(page), f"{page} is out of date; run `python docs/blocks.py`"
    names = blocks["docs/api.md"]["names"]
    assert [name for name in wb._NAMES if f"| `wb.{name}` | " not in names] == []
    verdicts = claims.verdicts({})
    for claim in verdicts["claim"]:
        assert any(claim in block for block in blocks["docs/findings.md"].values()), claim


def test_a_finding_has_the_verdict_and_the_number_of_its_record():
    made, claim = script("blocks"), claims.load_claims()[0]
    number = {"value": 0.25, "low": 0.125, "high": 0.375, "n": 12}
    record = {claim.figure: {"numbers": {claim.number: number}, "current": False}}
    judged = {"one": claims.verdicts(record), "other": claims.verdicts({})}
    rows = made.claim_table(judged, claim.paper).splitlines()
    assert rows[2].endswith(f"| **fails**: 0.25 (0.125 to 0.375), n = 12 | not measured | `{claim.figure}` |")
    assert len(rows) == 2 + sum(each.paper == claim.paper for each in claims.load_claims())
    versions = {"one": pd.Series(["0.1.0"]), "other": pd.Series([], dtype=str)}
    total = made.summary(judged, versions).splitlines()
    assert total[2] == f"| `one` | 1 of {len(claims.load_claims())} | 0 | 1 | 0 | 1 | 0.1.0 (1 records) |"
    with pytest.raises(ValueError, match="0 blocks named claims"):
        made.filled("a page without a block", {"claims": ""})


def test_every_citation_is_in_the_references():
    listed = text_of("docs/references.md")
    sources = [*(ROOT / "workbench").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    sources += [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "data").rglob("README.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name != "references.md")
    numbers = set(re.findall(r"arxiv(?:\.org/abs/|:? ?)(\d{4}\.\d{4,5})", text, re.I))
    assert "2303.11073" in numbers and [number for number in numbers if f"arXiv {number}" not in listed] == []
    author = r"([A-Z][a-z][\w-]+)(?:\s+et\s+al\.?|\s+(?:&|and)\s+[A-Z][\w-]+),?\s+\(?((?:19|20)\d\d)\b"
    cited = set(re.findall(author, text))
    assert ("Kwon", "2023") in cited
    assert [pair for pair in sorted(cited) if not re.search(rf"{pair[0]}\b[^\n]*{pair[1]}", listed)] == []


def test_the_page_of_formats_names_every_field_that_is_written(tmp_path):
    page = text_of("docs/formats.md")
    provenance = {"model": {"name": "m", "hash": "0", "tap": "after"}, "method": "none", "parameters": {}}
    direction = wb.Direction(torch.ones(1, 1, 1, 1), torch.ones(1), (500,), "d", provenance)
    boundary = wb.Boundary(torch.ones(1, 1, 1), 0.0, 500, "h", "b", provenance)
    fields = recipe._KEYS | recipe._RESULT_KEYS
    for part in (direction, boundary):
        with safe_open(part.save(tmp_path / "part.safetensors"), framework="np") as file:
            about = json.loads(file.metadata()[type(part).__name__.lower()])
            fields |= {*file.keys(), *file.metadata(), *about}
    for columns in ("h x0 x x_T seeds done", "figure title caption numbers table provenance"):
        fields |= set(columns.split())
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []


def test_links_of_a_site_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#part">b</a><a href="#top">up</a><a href="https://example.org">x</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="part">B</h1><a href="a.html">a</a>')
    follow_links = script("build").follow_links
    broken, elsewhere = follow_links(tmp_path)
    assert broken == [] and elsewhere == {"https://example.org"}
    (tmp_path / "b.html").write_text('<a href="c.html">c</a><img src="https://example.org/x.png">')
    broken, _ = follow_links(tmp_path)
    assert len(broken) == 3
    for part in ("b.html#part", "c.html", "x.png"):
        assert any(part in line for line in broken)


def test_the_reference_has_every_public_name_and_the_gallery_every_figure(tmp_path):
    build = script("build")
    build.write_api(tmp_path / "api")
    pages = "\n".join(path.read_text() for path in (tmp_path / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto(?:class|function|module):: ([\w.]+)$", pages, re.M))
    assert set(wb._NAMES) <= documented
    build.write_gallery(tmp_path, {})
    gallery = (tmp_path / "gallery.md").read_text()
    assert [name for name in figures.list_figures() if f"### {name}\n" not in gallery] == []
    record = json.loads((ROOT / "data" / "records" / "avataaars32" / "haas-fig2a.json").read_text())
    value = record["numbers"]["follows_h"]["value"]
    assert f"| `follows_h` | {value:.3g} |" in gallery


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the [docs] extra")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", tmp_path / "site"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "docs" / "tour.html").exists()


# Habits


def test_one_version_stands_in_the_package_the_changelog_and_the_citation():
    version = wb.__version__
    heading = re.search(r"^## (\S+)(.*)$", text_of("CHANGELOG.md"), re.M)
    assert heading[1] == version.partition(".dev")[0]
    assert (".dev" in version) == ("unreleased" in heading[2])
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    project = tomllib.loads(text_of("pyproject.toml"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "workbench.__version__"}
