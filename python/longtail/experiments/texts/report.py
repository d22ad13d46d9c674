"""The tables and the picture of an experiment on texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..claims import print_claims
from ..comparison import LEVEL, cells_of
from ..output import Row, number_of, origin, plotting, print_notes, print_table, save_figure, text_of
from ..palette import colour_of
from . import run, several_labels
from .corpus import FEW, MANY
from .settings import SETTINGS

NAMES = {
    "balanced": "balanced accuracy",
    "mean_average_precision": "mAP",
    "few": "few",
    "medium": "medium",
    "many": "many",
    "overall": "overall",
    "f1": "F1",
    "macro_f1": "macro F1",
    "calibration_error": "ECE",
    "train": "train",
    "mistake_height": "height",
}
"""Of the metrics, in tables and pictures."""

PERCENT = 100.0
DRAWN = {
    "one": (
        *("cross-entropy", "complement cross-entropy", "logit adjustment", "LDAM-DRW", "Seesaw", "vector scaling"),
        *("class-balanced softmax, beta 0.999", "class-balanced sigmoid focal, beta 0.999, gamma 1"),
    ),
    "several": (
        *("binary cross-entropy", "positive weight, power 0.5", "logit adjustment", "sigmoid focal, gamma 2"),
        *("class-balanced sigmoid, beta 0.999", "asymmetric", "distribution-balanced", "ZLPR"),
    ),
}
"""Methods whose scores are drawn by frequency: one of each kind."""


def _metrics(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(tested, others) of the rows' experiment."""
    kind = run.KINDS[str(rows[0]["experiment"])]
    others = [name for name in NAMES if f"{name}_mean" in rows[0] and name not in kind.TESTED]
    return list(kind.TESTED), others


def _several(rows: Sequence[Row]) -> bool:
    """Whether a text has several labels."""
    return run.KINDS[str(rows[0]["experiment"])] is several_labels


def _control(rows: Sequence[Row]) -> str:
    return str(run.KINDS[str(rows[0]["experiment"])].CONTROL.name)


def title_of(row: Row) -> str:
    title = SETTINGS[str(row["experiment"])].title
    return f"{title}: {row['classes']} classes, {row['train_texts']} training texts"


def print_report(rows: Sequence[Row]) -> None:
    """One table, what it says in words, and how it was made."""
    tested, others = _metrics(rows)
    first = rows[0]
    title = f"{title_of(first)}; test scores in %"
    groups = [("method",), *((NAMES[metric], "difference", "p", "") for metric in tested), [NAMES[m] for m in others]]
    print_table(title, groups, (_cells(row, tested, others) for row in rows), _findings(rows, tested))
    print()
    print_claims(f"Claims of the papers, by {NAMES[tested[0]]}", rows, tested[0])
    print()
    print_notes(notes(rows))


def _cells(row: Row, tested: Sequence[str], others: Sequence[str]) -> list[str]:
    cells = [str(row["method"])]
    for metric in tested:
        cells += cells_of(row, metric)
    for metric in others:
        mean = number_of(row, f"{metric}_mean")
        cells.append("-" if mean != mean else f"{mean:.2f}" if metric == "mistake_height" else f"{PERCENT * mean:.1f}")
    return cells


def _findings(rows: Sequence[Row], tested: Sequence[str]) -> list[str]:
    lines = []
    for metric in tested:
        names: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
        for row in rows:
            if row[f"{metric}_verdict"]:
                names[str(row[f"{metric}_verdict"])].append(str(row["method"]))
        if not any(names.values()):
            lines.append(f"{NAMES[metric]}: not tested.")
            continue
        lines += (f"{NAMES[metric]}, {said}: {'; '.join(found) or 'none'}." for said, found in names.items())
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """How the figures were made."""
    first, control = rows[0], _control(rows)
    lines = [
        f"Data: {first['data']}. {first['classes']} classes, {first['train_texts']} training and {first['test_texts']} "
        f"test texts in seed 0; the largest class has {first['largest']}, {first['many_classes']} have more than "
        f"{MANY} (many), {first['few_classes']} fewer than {FEW} (few).",
        f"± is the standard deviation over {first['seeds']} seeds; a seed draws the test texts, the first weights and "
        "the order, the same for every method. Texts of a group (a stem, a place's names, a source "
        "package) are all in training or all in the test; the same text may stand in both under other labels.",
        f"difference: to {control}, mean over the seeds. p: paired t-test, two-sided, after Holm's correction for all "
        f"{len(rows) - 1} comparisons of a metric; better or worse below {LEVEL}, else '-'. Seeds draw from the same "
        "texts: the tests speak of these data and this model.",
        f"Model: mean of the vectors (width {first['width']}) of a text's hashed n-grams, and a linear layer. "
        f"{first['epochs']} epochs, batches of {first['batch_size']}, Adam, learning rate {first['learning_rate']:g} "
        f"falling in a line to 0: the same for every method, chosen for {control} alone on other seeds. Losses keep "
        "published hyperparameters.",
        "ECE: expected calibration error, 15 bins, on the test texts as frequent as they are; losses that balance the "
        "classes pay in it. many, medium, few: means over the classes with so many training texts.",
    ]
    if _several(rows):
        lines.append(
            "mAP: mean of the average precisions of the labels. F1: of all decisions, macro: mean over the labels; "
            "a label is predicted where its logit is above 0; two-way only ranks, and is its half over rows. "
            "ECE: of all probabilities; ZLPR and two-way have none. The linear layer has a weight decay of "
            f"{several_labels.WEIGHT_DECAY:g}."
        )
    else:
        lines.append("Decision: the largest raw logit, for every method but the post-hoc adjustment.")
    if "mistake_height_mean" in first:
        lines.append("height: of the lowest node above both classes of a wrong decision: 1 block, 2 chapter, 3 root.")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Differences to the control with their 95 % intervals, and scores by frequency; a PNG."""
    tested, _ = _metrics(rows)
    first = rows[0]
    methods = [str(row["method"]) for row in rows if row["method"] != _control(rows)]
    figure = plotting().figure(figsize=(17, 3.4 + 0.26 * len(methods)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 5))
    for axis, metric in zip((left, middle), tested, strict=True):
        _draw_differences(axis, rows, methods, metric)
    left.set_yticks(range(len(methods)), methods, fontsize=8)
    middle.set_yticks(range(len(methods)), [""] * len(methods))
    _draw_by_count(right, rows)
    figure.suptitle(
        f"{title_of(first)}. Left: mean difference over {first['seeds']} seeds and its 95 % interval, filled where it\n"
        f"is significant ({LEVEL:.0%}, paired t-test, Holm's correction). Right: score by training texts of a class, "
        "mean of the classes with 1, 2 to 3, 4 to 7, ...;\nbands: one standard deviation over the seeds. beta: of the "
        f"class-balanced weights; gamma: of the focal factor\n{first['data']}\n{origin(first)}",
        fontsize=9,
    )
    save_figure(figure, path, 110)


def _draw_differences(axis: Any, rows: Sequence[Row], methods: list[str], metric: str) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    for i in range(0, len(methods), 2):
        axis.axhspan(i - 0.5, i + 0.5, color="whitesmoke", zorder=0)
    control = PERCENT * number_of({row["method"]: row for row in rows}[_control(rows)], f"{metric}_mean")
    for row in rows:
        if row["method"] == _control(rows):
            continue
        colour, found = colour_of(str(row["method"])), row[f"{metric}_verdict"] in ("better", "worse")
        axis.errorbar(
            *(PERCENT * number_of(row, f"{metric}_difference"), methods.index(str(row["method"]))),
            xerr=PERCENT * number_of(row, f"{metric}_half_width"),
            fmt="o",
            color=colour,
            markersize=5,
            markerfacecolor=colour if found else "white",
        )
    axis.set_ylim(len(methods) - 0.5, -0.5)
    name = f"{NAMES[metric]}-shot classes (fewer than {FEW} training texts)" if metric == "few" else NAMES[metric]
    axis.set_xlabel(f"{name}:\ndifference in points to {_control(rows)} ({control:.1f} %)")


def _draw_by_count(axis: Any, rows: Sequence[Row]) -> None:
    several = _several(rows)
    drawn = DRAWN["several" if several else "one"]
    for row in rows:
        if row["method"] not in drawn:
            continue
        counts, means, deviations = (
            [float(value) for value in text_of(row[f"octave{name}"]).split()] for name in ("s", "_means", "_stds")
        )
        percent, colour = [PERCENT * mean for mean in means], colour_of(str(row["method"]))
        axis.plot(counts, percent, "o-", markersize=3, color=colour, label=str(row["method"]))
        if deviations:
            below, above = (
                [p + sign * PERCENT * d for p, d in zip(percent, deviations, strict=True)] for sign in (-1, 1)
            )
            axis.fill_between(counts, below, above, color=colour, alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("training texts of a class, at least (log axis)")
    axis.set_ylabel("mean average precision in %" if several else "mean accuracy in %")
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8, frameon=False)
