"""The picture of ``demo --data icd``: accuracy by how many texts of a class were trained on; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import demo_icd as demo
from .methods import CROSS_ENTROPY
from .output import origin, plotting, save_figure, with_provenance
from .palette import colour_of

BANDWIDTH = 0.5  # octaves, of the Gaussian kernel
POINTS = 200
MARGIN = 1.15  # left and right of the curves


def smoothed(per_class: Tensor, counts: Tensor, octaves: Tensor) -> tuple[Tensor, Tensor]:
    """Mean accuracy around each number of training texts, and its standard error over the classes.

    Args:
        per_class: accuracies [C], NaN of a class that was not tested.
        counts: training texts of each class, [C], at least 1.
        octaves: logarithms to base 2 of training texts, within the range of ``counts``.
    """
    known = ~per_class.isnan()
    values = per_class[known].double()
    distance = (octaves.double()[:, None] - counts[known].double().log2()) / BANDWIDTH
    weight = (-0.5 * distance.square()).softmax(1)  # of each class, for each point
    mean = weight @ values
    error = (weight * (values - mean[:, None])).square().sum(1).sqrt()
    return mean, error


def curve(result: demo.Result, counts: list[Tensor], octaves: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the seeds and half the height of the band, in percent: their standard deviation, of one its error."""
    of_seeds = [smoothed(scores.per_class, n, octaves) for scores, n in zip(result.scores, counts, strict=True)]
    means = 100 * torch.stack([mean for mean, _ in of_seeds])
    return means.mean(0), means.std(0) if len(of_seeds) > 1 else 100 * of_seeds[0][1]


def draw(plan: demo.Plan, texts: demo.Texts, results: list[demo.Result], path: Path) -> None:
    """Accuracy by frequency, a line a loss, over the number of classes of each frequency; a PNG at ``path``."""
    counts = texts.counts[0].double().log2()
    octaves = torch.linspace(float(counts.min()), float(counts.max()), POINTS)
    figure = plotting().figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    shown = (2**octaves).tolist()
    for result in results:
        family = demo.LOSSES[result.loss].family
        mean, half = curve(result, texts.counts, octaves)
        control = demo.LOSSES[result.loss] == CROSS_ENTROPY  # dashes on top: what lies below them shows
        style: dict[str, Any] = {"linestyle": "--", "zorder": 3} if control else {}
        above.plot(shown, mean.tolist(), color=colour_of(family), label=family, linewidth=1.8, **style)
        above.fill_between(
            shown, (mean - half).tolist(), (mean + half).tolist(), color=colour_of(family), alpha=0.15, linewidth=0
        )
    above.set_ylabel("test accuracy in %, mean of the categories")
    above.grid(linewidth=0.3)
    above.set_xlim(shown[0] / MARGIN, shown[-1] * MARGIN)
    above.legend(frameon=False, loc="lower right")
    _draw_classes(below, texts.counts[0])
    bands = "one standard deviation over the seeds" if plan.seeds > 1 else "the standard error over the categories"
    figure.suptitle(
        f"Diagnoses (ICD-10-CM) to {len(texts.corpus.classes)} categories: accuracy by frequency, {plan.epochs} "
        f"epoch(s), mean of {plan.seeds} seed(s)\nSmoothed by a Gaussian kernel of {BANDWIDTH:g} octaves over the "
        f"categories; bands: {bands}\n{texts.corpus.source}\n{origin(with_provenance({}))}",
        fontsize=9,
    )
    save_figure(figure, path, 120)


def _draw_classes(axis: Any, counts: Tensor) -> None:
    ends = [2**k for k in range(int(counts.max()).bit_length() + 1)]
    axis.hist(counts.tolist(), bins=ends, color="lightgrey", edgecolor="white")
    axis.set_ylabel("categories")
    axis.set_xlabel("training texts of a category (log axis)")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
