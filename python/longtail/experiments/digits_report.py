"""The digits experiment's tables and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import digits
from .claims import print_claims
from .comparison import LEVEL, cells_of
from .methods import CROSS_ENTROPY
from .output import Row, number_of, origin, plotting, print_notes, print_table, save_figure
from .palette import colour_of

HEADINGS = (("method",), ("balanced", "difference", "p", ""), ("few-shot", "difference", "p", ""), ("train",))


def print_report(rows: Sequence[Row]) -> None:
    """A table for each imbalance factor, and what it says in words."""
    for factor in dict.fromkeys(row["imbalance_factor"] for row in rows):
        own = [row for row in rows if row["imbalance_factor"] == factor]
        title = f"Digits, imbalance factor {factor:g}, {own[0]['train_images']} training images: accuracy in %"
        print_table(title, HEADINGS, map(_cells, own), _findings(own))
        print()
        print_claims(f"Claims of the papers at imbalance factor {factor:g}, by balanced accuracy", own, "balanced")
        print()
    print_notes(notes(rows))


def _cells(row: Row) -> list[str]:
    cells = [str(row["method"])]
    for metric in digits.TESTED:
        cells += cells_of(row, metric)
    return [*cells, f"{_percent(row, 'train_mean'):.1f}"]


def _percent(row: Row, name: str) -> float:
    return 100 * number_of(row, name)


def _findings(rows: Sequence[Row]) -> list[str]:
    lines = []
    for metric, what in zip(digits.TESTED, ("balanced accuracy", "few-shot accuracy"), strict=True):
        names = {
            verdict: [str(row["method"]) for row in rows if row[f"{metric}_verdict"] == verdict]
            for verdict in ("better", "worse", "no difference shown")
        }
        if not any(names.values()):
            lines.append(f"{what}: not tested.")
            continue
        for verdict in ("better", "worse"):
            lines.append(f"{what}, {verdict}: {'; '.join(names[verdict]) or 'none'}.")
        lines.append(f"{what}, no difference shown: {len(names['no difference shown'])} of {len(rows) - 1} methods.")
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """How the figures were made."""
    first, comparisons = rows[0], sum(row["method"] != CROSS_ENTROPY.name for row in rows)
    groups = {
        f"{row['imbalance_factor']:g}: more than {row['many_above']} / fewer than {row['few_below']}" for row in rows
    }
    return [
        f"± is the standard deviation over {first['seeds']} seeds; a seed draws the test images (50 of each digit, so "
        "that balanced = overall), the training images, the first weights and the order, the same for every method.",
        "difference: to cross-entropy, mean over the seeds. p: paired t-test, two-sided, after Holm's correction for "
        f"all {comparisons} comparisons of a metric in this run; better or worse below {LEVEL}, else '-'. "
        "Seeds draw from the same 1797 images: the tests speak of these data and this network.",
        f"many / few-shot digits by training images (thirds of the classes), per imbalance factor: "
        f"{'; '.join(sorted(groups))}.",
        f"Training: {first['epochs']} epochs, batches of {digits.BATCH_SIZE}, SGD with momentum, learning rate "
        f"{digits.LEARNING_RATE:g} (warm-up for {digits.WARM_UP:.0%} of the epochs, half cosine), weight decay "
        f"{digits.WEIGHT_DECAY:g}: the same for every method, chosen for cross-entropy alone on other seeds. Losses "
        "keep their published hyperparameters, where there are some; every one of the grid is shown, none was picked.",
        "Decision: the largest raw logit, for every method. Sigmoid methods start at probability 1/10, with no weight "
        "decay on that bias. LDAM-DRW: normalized last layer, margins up to 0.5, scale 30, re-weighted from 80 % of "
        "the epochs on. Vector scaling: gamma 0.2, tau 1.2; CDT: gamma 0.2; IMMAX: margins of mean 1, by the cube root "
        "of the counts; Seesaw: p 0.8, q 2, a plain last layer. Label over-smoothing: from 90 % of the epochs "
        "on the last layer alone, label smoothing 0.98. train: accuracy on the training images at the end.",
    ]


MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""By imbalance factor."""
TITLES = {
    "balanced": "balanced accuracy (mean over the classes)",
    "few": "few-shot accuracy (the third of the classes with the fewest images)",
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Difference to cross-entropy of every method with its 95 % interval, filled where the test finds one; a PNG."""
    factors = list(dict.fromkeys(row["imbalance_factor"] for row in rows))
    methods = [m for m in dict.fromkeys(str(row["method"]) for row in rows) if m != CROSS_ENTROPY.name]
    size = (13, 2.9 + 0.26 * len(methods))
    figure, axes = plotting().subplots(1, len(digits.TESTED), figsize=size, sharey=True, layout="constrained")
    for axis, metric in zip(axes, digits.TESTED, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for i in range(0, len(methods), 2):
            axis.axhspan(i - 0.5, i + 0.5, color="whitesmoke", zorder=0)
        for i, factor in enumerate(factors):
            own = [row for row in rows if row["imbalance_factor"] == factor]
            offset, marker = (i - (len(factors) - 1) / 2) * 0.25, MARKERS[i % len(MARKERS)]
            for row in own:
                if row["method"] != CROSS_ENTROPY.name:
                    _draw_difference(axis, row, metric, methods.index(str(row["method"])) + offset, marker)
            mean = _percent(next(row for row in own if row["method"] == CROSS_ENTROPY.name), f"{metric}_mean")
            known = "no such class" if mean != mean else f"cross-entropy {mean:.1f} %"
            label = f"imbalance factor {factor:g} ({known})"
            axis.plot([], [], marker, color="grey", label=label)
        axis.set_xlabel(f"{TITLES[metric]}:\ndifference to cross-entropy in percentage points")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    axes[0].set_yticks(range(len(methods)), methods, fontsize=8)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(
        f"Long-tailed digits: mean difference over {rows[0]['seeds']} seeds and its 95 % interval; filled where it is "
        f"significant ({LEVEL:.0%}, paired t-test, Holm's correction)\nImbalance factor: training images of the "
        "largest class over those of the smallest. beta: of the class-balanced weights; gamma: of the focal factor. A "
        f"colour is a method, whatever its beta and gamma\n{origin(rows[0])}",
        fontsize=9,
    )
    save_figure(figure, path, 110)


def _draw_difference(axis: Any, row: Row, metric: str, height: float, marker: str) -> None:
    """A mean and its interval, in the colour of the method."""
    colour, found = colour_of(str(row["method"])), row[f"{metric}_verdict"] in ("better", "worse")
    axis.errorbar(
        *(_percent(row, f"{metric}_difference"), height),
        xerr=_percent(row, f"{metric}_half_width"),
        fmt=marker,
        markersize=4,
        color=colour,
        linewidth=0.9,
        markerfacecolor=colour if found else "white",
    )
