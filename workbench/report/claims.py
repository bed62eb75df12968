"""Claims of the two papers, and their verdicts by the recorded numbers of a model.

A claim names a figure, a number that it records and the side of a threshold that the number must lie on. The verdict
follows from the number's interval: it holds if the whole interval is on that side, fails if none of it is, and is
undecided otherwise. Some claims name no amount ("few examples suffice"); then the threshold is the workbench's own, and
the claim says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import yaml


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes
    ----------
    paper, text : str
    measured : str
        Meaning of the number.
    figure, number : str
        Figure that records it, and its name there; of the recorded benchmark "benchmark", and "A less B".
    threshold : float
    above : bool
        Whether the claim puts the number above the threshold, or below.
    """

    paper: str
    text: str
    measured: str
    figure: str
    number: str
    threshold: float = 0.0
    above: bool = True

    def verdict(self, low: float, high: float) -> str:
        """ "holds", "fails" or "undecided", by the number's interval."""
        if not low <= high:
            return "undecided"
        side = (low > self.threshold, high < self.threshold)
        holds, fails = side if self.above else side[::-1]
        return "holds" if holds else "fails" if fails else "undecided"


@cache
def load_claims() -> tuple[Claim, ...]:
    """The claims of both papers, in their order."""
    text = Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")
    return tuple(Claim(**row) for row in yaml.safe_load(text))


def verdicts(records: Mapping[str, Mapping]) -> pd.DataFrame:
    """Every claim with its verdict.

    Parameters
    ----------
    records : mapping of figure -> record
        From `figures.read_records`.

    Returns
    -------
    DataFrame, one row per claim
        `paper`, `claim`, `verdict`: "holds", "fails", "undecided", or "not measured" where there is no record;
        `measured`, `value`, `low`, `high` (95%), `n`, the `side` of the threshold that the claim needs, `figure`, and
        `current`: whether the code that measured it is still the same.
    """
    rows = []
    for claim in load_claims():
        record = records.get(claim.figure, {})
        found = record.get("numbers", {}).get(claim.number)
        row = {"paper": claim.paper, "claim": claim.text, "measured": claim.measured, "figure": claim.figure}
        row["side"] = f"{'>' if claim.above else '<'} {claim.threshold:g}"
        if found is None:
            rows.append(row | {"verdict": "not measured"})
        else:
            rows.append(
                row | {"verdict": claim.verdict(found["low"], found["high"]), "current": record["current"], **found}
            )
    columns = ["paper", "claim", "verdict", "measured", "value", "low", "high", "n", "side", "figure", "current"]
    return pd.DataFrame(rows).reindex(columns=columns)


def compare(judged: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The claims' verdicts on several domains side by side.

    Parameters
    ----------
    judged : mapping of domain -> DataFrame
        From `verdicts`.

    Returns
    -------
    DataFrame, one row per claim
        `paper`, `claim`; for each domain its verdict, with value and 95% interval; and `differ`: whether the claim
        holds on one domain and fails on another.
    """
    first = next(iter(judged.values()))
    table = first[["paper", "claim"]].copy()
    for domain, rows in judged.items():
        numbers = [
            f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" if pd.notna(r.value) else "" for r in rows.itertuples()
        ]
        table[domain] = [
            f"{verdict} {number}".strip() for verdict, number in zip(rows["verdict"], numbers, strict=True)
        ]
    found = [set(each) for each in zip(*(rows["verdict"] for rows in judged.values()), strict=True)]
    return table.assign(differ=[{"holds", "fails"} <= each for each in found])
