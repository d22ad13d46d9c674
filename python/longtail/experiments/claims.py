"""Claims of the papers, tested on the rows of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .comparison import verdict
from .output import Row, print_table, text_of
from .statistics import holm, paired_comparison


class Claim(NamedTuple):
    """That one method is better than another, by their names in the rows."""

    better: str
    than: str
    source: str


CLAIMS = (
    Claim("complement cross-entropy", "complement objective training", "Kim et al. 2021"),
    Claim("complement objective training", "softmax focal, gamma 1", "Kim et al. 2021"),
    Claim("complement objective training", "cross-entropy", "Chen et al. 2019"),
    Claim("class-balanced softmax, beta 0.999", "cross-entropy", "Cui et al. 2019"),
    Claim("class-balanced sigmoid, beta 0.999", "sigmoid", "Cui et al. 2019"),
    Claim("class-balanced sigmoid, beta 0.999", "binary cross-entropy", "Cui et al. 2019"),
    Claim("class-balanced sigmoid focal, beta 0.999, gamma 1", "sigmoid focal, gamma 1", "Cui et al. 2019"),
    Claim("asymmetric", "sigmoid focal, gamma 2", "Ridnik et al. 2021"),
    Claim("distribution-balanced", "binary cross-entropy", "Wu et al. 2020"),
)


class Finding(NamedTuple):
    """What the paired test says of a claim; Holm's correction takes those of the same rows and metric as one family."""

    claim: Claim
    difference: float
    p_holm: float

    @property
    def outcome(self) -> str:
        said = {"better": "holds", "worse": "the reverse holds", "": "not tested"}
        found = verdict(self.difference, self.p_holm)
        return said.get(found, found)


def findings(rows: Sequence[Row], metric: str) -> list[Finding]:
    """Of the claims whose methods are among the rows of one setting."""
    by_seed = {row["method"]: [float(x) for x in text_of(row[f"{metric}_by_seed"]).split()] for row in rows}
    claims = [claim for claim in CLAIMS if by_seed.get(claim.better) and by_seed.get(claim.than)]
    found = [paired_comparison(by_seed[claim.better], by_seed[claim.than]) for claim in claims]
    corrected = holm([comparison.p for comparison in found])
    return [
        Finding(claim, comparison.difference, p) for claim, comparison, p in zip(claims, found, corrected, strict=True)
    ]


def print_claims(title: str, rows: Sequence[Row], metric: str) -> None:
    """A table of the claims that can be tested on the rows of one setting."""
    groups, found = (("claim",), ("difference", "p", "outcome"), ("source",)), findings(rows, metric)
    note = f"difference: of the first to the second, in points; p: Holm's correction takes these {len(found)} claims."
    print_table(title, groups, map(_cells, found), [note])


def _cells(finding: Finding) -> list[str]:
    claim, p = finding.claim, finding.p_holm
    shown = "" if p != p else f"{p:.2g}"
    return [
        f"{claim.better} over {claim.than}",
        f"{100 * finding.difference:+.1f}",
        shown,
        finding.outcome,
        claim.source,
    ]
