"""Write the generated blocks of the pages, between markers in their Markdown: python docs/blocks.py

The claims come from the records in `data/records`, the names from the docstrings. A test compares the pages with them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

import workbench as wb
from workbench.datasets.domain import DOMAINS
from workbench.report import claims, figures

ROOT = Path(__file__).resolve().parent.parent
FEW = 16
"""Samples up to which a verdict is counted as one of few samples."""

ROOMS = {
    "diffusion": "Models, sampling and inversion",
    "datasets": "Images, classifiers and text models",
    "hspace": "Recording h",
    "analysis": "Estimates",
    "directions": "Directions and boundaries",
    "editing": "Edits and their measurement",
    "benchmark": "The benchmark",
    "evaluate": "Quality of a model",
    "studio": "The studio and the explorer",
    "report": "Figures, facts and reports",
}


def summary(judged: Mapping[str, pd.DataFrame], versions: Mapping[str, pd.Series]) -> str:
    """How many claims hold, fail and are undecided on each model, from how many samples, by which version."""
    lines = [f"| model | claims measured | hold | fail | undecided | from at most {FEW} samples | measured with |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model, table in judged.items():
        measured = table[table["verdict"] != "not measured"]
        counts = [int((measured["verdict"] == verdict).sum()) for verdict in ("holds", "fails", "undecided")]
        few = int((measured["n"] <= FEW).sum())
        made = ", ".join(f"{version} ({count} records)" for version, count in versions[model].value_counts().items())
        cells = [f"`{model}`", f"{len(measured)} of {len(table)}", *counts, few, made]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def claim_table(judged: Mapping[str, pd.DataFrame], paper: str) -> str:
    """Every claim of a paper with its verdict and number on each model."""
    lines = [f"| claim | what is measured | holds if | {' | '.join(f'`{model}`' for model in judged)} | record |"]
    lines.append("|---" * (4 + len(judged)) + "|")
    for rows in zip(*(table.itertuples() for table in judged.values()), strict=True):
        first = rows[0]
        if first.paper == paper:
            measured = first.measured.replace("|", "\\|")
            cells = [first.claim, measured, first.side, *map(_verdict, rows), f"`{first.figure}`"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(row) -> str:
    if row.verdict == "not measured":
        return "not measured"
    return f"**{row.verdict}**: {row.value:.3g} ({row.low:.3g} to {row.high:.3g}), n = {row.n:.0f}"


def names() -> str:
    """Every exported name with the first line of its docstring, by room."""
    lines = []
    for room, title in ROOMS.items():
        lines += [f"## {title}", "", "| name | what it is or does |", "|---|---|"]
        for name, module in wb._NAMES.items():
            if module.split(".")[0] == room:
                about = inspect.getdoc(getattr(wb, name)).partition("\n")[0].replace("|", "\\|")
                lines.append(f"| `wb.{name}` | {about} |")
        lines.append("")
    lines += ["## Modules", "", "| module | what it holds |", "|---|---|"]
    lines += [
        f"| `wb.{module}` | {inspect.getdoc(getattr(wb, module)).partition(chr(10))[0]} |" for module in wb._MODULES
    ]
    return "\n".join(lines)


def blocks() -> dict[str, dict[str, str]]:
    """The text of every block, by page and name."""
    of = {domain.name: domain.model for domain in DOMAINS}
    records = {of[domain]: found for domain, found in figures.domain_records().items()}
    judged = {model: claims.verdicts(found) for model, found in records.items()}
    versions = {
        model: pd.Series([record["provenance"]["workbench"] for record in found.values() if "provenance" in record])
        for model, found in records.items()
    }
    papers = {"haas": "Haas et al. 2024", "zhu": "Zhu et al. 2023"}
    findings = {"summary": summary(judged, versions)} | {
        name: claim_table(judged, paper) for name, paper in papers.items()
    }
    return {"docs/findings.md": findings, "docs/api.md": {"names": names()}}


def filled(text: str, made: Mapping[str, str]) -> str:
    """A page with its blocks, each between `<!-- NAME: ... -->` and `<!-- /NAME -->`."""
    for name, block in made.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, block=block: f"{found[1]}\n{block}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"the page has {count} blocks named {name}; give it one")
    return text


if __name__ == "__main__":
    for page, made in blocks().items():
        (ROOT / page).write_text(filled((ROOT / page).read_text(encoding="utf-8"), made), encoding="utf-8")
