"""What the two papers claim, and what the recorded numbers of a model say about it.

A claim names a figure, a number that it records and the side of a threshold that the number must lie on. The verdict
follows from the number's interval: it holds if the whole interval is on that side, fails if none of it is, and is
undecided otherwise. Some claims name no amount ("few examples suffice"); then the threshold is the workbench's own, and
the claim says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

HAAS, ZHU = "Haas et al. 2024", "Zhu et al. 2023"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes
    ----------
    paper, text : str
    measured : str
        What the number is.
    figure, number : str
        Recipe that records it, and its name there.
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


CLAIMS = (
    Claim(
        HAAS,
        "h carries what an image shows (Fig. 2a)",
        "share of swapped attributes that follow h",
        "haas-fig2a",
        "follows_h",
        0.5,
    ),
    Claim(
        HAAS,
        "x_T and the noise keep background and low-level looks (Fig. 2a)",
        "backdrop: distance to the donor's less that to its own",
        "haas-fig2a",
        "backdrop_nearer_to_x",
    ),
    Claim(
        HAAS,
        "h-space has vector arithmetic: the difference of one pair edits others (Fig. 2b)",
        "change of the score, less a random direction's",
        "haas-fig2b",
        "effect",
    ),
    Claim(
        HAAS,
        "principal components change what can be named (Fig. 3)",
        "mean size of the scores' changes, less a random direction's",
        "haas-fig3",
        "more_than_random",
    ),
    Claim(
        HAAS,
        "a random direction as long changes the image less (Fig. 4)",
        "change of the image at 2 sigma, PC1 less random",
        "haas-fig4",
        "change_at_2",
    ),
    Claim(
        HAAS,
        "scaled up, a random direction degrades the image (Fig. 4)",
        "KID at 8 sigma, random less PC1",
        "haas-fig4",
        "random_degrades",
    ),
    Claim(
        HAAS,
        "Jacobian directions of one image transfer to others (Fig. 5)",
        "cosine of the changes, less a random direction's",
        "haas-fig5",
        "cosine_above_random",
    ),
    Claim(
        HAAS,
        "masks give local edits (Fig. 6)",
        "share of the change inside, masked less not masked",
        "haas-fig6",
        "masked_above_plain",
    ),
    Claim(
        HAAS,
        "a classifier's labels give single-attribute edits (Fig. 7)",
        "effect at 2 sigma, less a random direction's",
        "haas-fig7",
        "effect_above_random",
    ),
    Claim(
        HAAS,
        "a few examples suffice in h (Fig. 8a; own threshold: 10 a side, half of the full effect)",
        "effect from 10 examples by that from all",
        "haas-fig8a",
        "share_of_full_effect",
        0.5,
    ),
    Claim(
        HAAS,
        "x_T needs many more examples than h (Fig. 8a)",
        "cosine to the direction of all others at most examples, h less x_T",
        "haas-fig8a",
        "h_cosine_above_x_T",
    ),
    Claim(
        HAAS,
        "edits add (Fig. 8b; own threshold: error below half)",
        "relative error of two edits' sum",
        "haas-fig8b",
        "error_of_two",
        0.5,
        above=False,
    ),
    Claim(
        HAAS,
        "projection disentangles (Fig. 9, Table I)",
        "fall of the sum of all leaks by the sum of own effects",
        "haas-table1",
        "leakage_falls",
    ),
    Claim(
        HAAS,
        "Asyrp's injection amplifies the edit (SM B)",
        "change of the image, asymmetric by symmetric",
        "haas-fig11",
        "amplification",
        1.0,
    ),
    Claim(
        HAAS,
        "rescaled, both injections give similar edits (SM B; own threshold: cosine 0.8)",
        "cosine of the changes when matched",
        "haas-fig11",
        "alike_when_matched",
        0.8,
    ),
    Claim(
        HAAS,
        "eps and P_t have the same singular vectors (SM C)",
        "|cos| of the first",
        "haas-fig13",
        "same_vector_of_eps_and_x0",
        0.999,
    ),
    Claim(
        HAAS,
        "early Jacobians are coarse, late ones fine (SM D)",
        "rank correlation of frequency and t",
        "haas-fig13",
        "rank_correlation",
        above=False,
    ),
    Claim(
        HAAS,
        "Algorithms 1 and 2 find the same space (SM E)",
        "smallest cosine between the spaces",
        "haas-alg2",
        "smallest_cosine",
        0.99,
    ),
    Claim(
        HAAS,
        "directions of inverted real images edit generated ones (SM F)",
        "effect at 2 sigma, less a random direction's",
        "haas-fig17",
        "effect_above_random",
    ),
    Claim(
        ZHU,
        "inverted latents lie inside the shell of sampled ones (project page)",
        "radius of inverted x_T by r(T)",
        "zhu-e1",
        "inverted",
        1.0,
        above=False,
    ),
    Claim(
        ZHU,
        "that does not go away with more inversion steps (own reading)",
        "radius by r(T) in 40 steps",
        "zhu-e2",
        "in_40_steps",
        1.0,
        above=False,
    ),
    Claim(
        ZHU,
        "inverted latents are not centred like noise (project page)",
        "mean cosine of pairs at the noisiest t",
        "zhu-e3",
        "cosine_of_inverted",
    ),
    Claim(
        ZHU,
        "at the mixing step x is linearly separable (abstract)",
        "held-out accuracy, less that of shuffled labels",
        "zhu-e5",
        "x_above_chance",
    ),
    Claim(
        ZHU,
        "and beyond what noise leaves of the pixels (its control)",
        "accuracy, inverted less forward-diffused",
        "zhu-e5",
        "x_above_forward",
    ),
    Claim(
        ZHU,
        "one crossing edits a real image (abstract)",
        "score at the far side, less at the near side",
        "zhu-e7",
        "effect",
    ),
    Claim(
        ZHU,
        "the degree follows the distance (own threshold: 0.5)",
        "rank correlation of score and distance",
        "zhu-e8",
        "rank_correlation",
        0.5,
    ),
    Claim(
        ZHU,
        "x alone edits more than h alone (project page)",
        "change, x less h in the first step",
        "zhu-e9",
        "x_above_h",
    ),
    Claim(
        ZHU,
        "both together edit most (project page)",
        "change, both less x",
        "zhu-e9",
        "both_above_x",
    ),
    Claim(
        ZHU,
        "the mixing step is better than a late one (project page)",
        "change, at the step less at the last of t >= 100",
        "zhu-e10",
        "middle_above_late",
    ),
    Claim(
        ZHU,
        "eta 1 after the move helps the edit (released code)",
        "change, eta 1 less eta 0",
        "zhu-e11",
        "eta_1_above_0",
    ),
    Claim(
        ZHU,
        "leaving the shell is the harm of a long move (project page)",
        "PSNR, great circle less straight",
        "zhu-e12",
        "circle_keeps_more",
    ),
    Claim(
        ZHU,
        "generation is controlled from the same noise (abstract)",
        "share with it, plus side less minus side",
        "zhu-e13",
        "with_less_without",
    ),
    Claim(
        ZHU,
        "what the model never saw is out of reach of a boundary, or nearly (stated limitation)",
        "change of a probe's probability: hats less an attribute that it knows",
        "zhu-e15",
        "unseen_less_than_known",
        above=False,
    ),
    Claim(
        ZHU,
        "a boundary is fitted in about a second",
        "seconds",
        "zhu-e19",
        "seconds_of_a_fit",
        2.0,
        above=False,
    ),
    Claim(
        ZHU,
        "one step across a boundary does what a direction at all steps does (own reading; own threshold: .1 less)",
        "success at equal change, boundary in x less mean difference",
        "zhu-e17",
        "boundary_above_mean_difference",
        -0.1,
    ),
    Claim(
        HAAS,
        "supervised directions beat random ones (Fig. 4, at equal change)",
        "success, mean difference less random",
        "zhu-e17",
        "supervised_above_random",
    ),
    Claim(
        HAAS,
        "h is a better space for directions than the noise (Fig. 8a, at equal change)",
        "success at equal change, mean difference less noise",
        "zhu-e17",
        "h_above_noise",
    ),
)
"""The claims of both papers, in their order."""


def verdicts(records: Mapping[str, Mapping]) -> pd.DataFrame:
    """Every claim with its verdict.

    Parameters
    ----------
    records : mapping of figure -> record
        From `figures.read_records`.

    Returns
    -------
    DataFrame, one row a claim
        `paper`, `claim`, `verdict`: "holds", "fails", "undecided", or "not measured" where there is no record;
        `measured`, `value`, `low`, `high` (95%), `n`, the `side` of the threshold that the claim needs, `figure`, and
        `current`: whether the code that measured it is still the same.
    """
    rows = []
    for claim in CLAIMS:
        record = records.get(claim.figure, {})
        found = record.get("claims", {}).get(claim.number)
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
