"""The tables and the picture of how the benefit grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison import LEVEL, cells_of
from ..methods import CROSS_ENTROPY
from ..output import Row, number_of, origin, plotting, print_notes, print_table, save_figure
from ..palette import colour_of
from ..tokens import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from . import growth, growth_speed
from .report import PERCENT
from .settings import SETTINGS

NAMES = {"balanced": "balanced accuracy", "rarest_third": "rarest third"}
CONTROL = CROSS_ENTROPY.name
DASHED, MARKERS = "--", ("o", "s")
"""Lines of plain PyTorch; marks of the two fused implementations."""


def parts(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of (quality, speed)."""
    quality, speed = ([row for row in rows if row["part"] == part] for part in ("quality", "speed"))
    if not quality or not speed:
        raise ValueError("rows of quality or of speed are missing")
    return quality, speed


def by_imbalance(quality: Sequence[Row]) -> dict[Any, list[Row]]:
    """Rows of each imbalance factor, in their order."""
    factors = dict.fromkeys(row["imbalance_factor"] for row in quality)
    return {factor: [row for row in quality if row["imbalance_factor"] == factor] for factor in factors}


def print_report(rows: Sequence[Row]) -> None:
    """A table of quality for each imbalance, one of speed and memory, and how both were made."""
    quality, speed = parts(rows)
    groups = [("method",), *((name, "difference", "95 %", "p", "") for name in NAMES.values()), ("train",)]
    for of_factor in by_imbalance(quality).values():
        print_table(_title(of_factor[0]), groups, map(_quality_cells, of_factor))
        print()
    print_notes(quality_notes(quality))
    print()
    groups = [
        ("loss",),
        ("classes", "implementation"),
        ("ms", "plain / it", "optimizer ms"),
        ("peak MB", "plain / it"),
        ("off",),
    ]
    title = f"One training step of {speed[0]['batch_size']} texts by number of classes, {speed[0]['threads']} threads"
    starts = [i for i, row in enumerate(speed) if row is _plain(row, speed)]
    print_table(title, groups, (_speed_cells(row, _plain(row, speed)) for row in speed), sections=starts)
    print()
    print_notes(speed_notes(speed))


def _title(row: Row) -> str:
    factor = row["imbalance_factor"]
    name = factor if isinstance(factor, str) else f"imbalance factor {_factor_name(factor)}"
    return (
        f"Diagnoses, {name}: {row['train_texts']} training texts of {row['classes']} classes, the largest "
        f"{row['largest']}, the rarest {row['rarest']}; test scores in %"
    )


def _factor_name(factor: Any) -> str:
    return factor if isinstance(factor, str) else f"{factor:g}"


def _quality_cells(row: Row) -> list[str]:
    cells = [str(row["method"])]
    for metric in NAMES:
        shown, difference, *rest = cells_of(row, metric)
        width = PERCENT * number_of(row, f"{metric}_half_width")
        cells += [shown, difference, "" if width != width else f"±{width:.1f}", *rest]
    return [*cells, f"{PERCENT * number_of(row, 'train_mean'):.1f}"]


def quality_notes(quality: Sequence[Row]) -> list[str]:
    """How the scores were made."""
    first = quality[0]
    totals = ", ".join(
        f"{_factor_name(factor)}: {of[0]['train_texts']}" for factor, of in by_imbalance(quality).items()
    )
    return [
        f"Data: {first['data']}; the {first['classes']} classes with at least {growth.LEAST} training texts, and their "
        f"{first['test_texts']} test texts, in seed 0: the same for every factor. Their training texts are cut to an "
        "exponential profile, the most frequent class first, whose total is as near as can be to that of factor 1, "
        f"where every class has as many texts as the rarest. Training texts by factor: {totals}. 'as it is' is not "
        "cut: it has more texts, and more steps. Counts are whole: largest over rarest is not quite the factor.",
        f"± is the standard deviation over {first['seeds']} seeds; difference: to {CONTROL} at the same factor, mean "
        "over the seeds; 95 %: half width of its confidence interval. p: paired t-test, two-sided, after Holm's "
        f"correction for all {sum(row['method'] != CONTROL for row in quality)} comparisons of a metric, of all "
        f"factors; better or worse below {LEVEL}, else '-'. Seeds draw from the same texts: the tests speak of these "
        "data and this model.",
        "rarest third: mean accuracy of the third of the classes that has the fewest texts as the data are; the same "
        "classes for every factor. train: accuracy on the training texts.",
        f"Model and training are those of the experiment icd, batches of {first['batch_size']}, learning rate "
        f"{first['learning_rate']:g}, chosen there for {CONTROL} alone; epochs: {first['epochs']}, not tuned "
        f"(icd: {SETTINGS[growth.EXPERIMENT].epochs}, over all texts).",
    ]


def _plain(row: Row, speed: Sequence[Row]) -> Row:
    """Of the same classes and loss in plain PyTorch, which comes first."""
    return next(other for other in speed if (other["classes"], other["loss"]) == (row["classes"], row["loss"]))


def _short(row: Row) -> str:
    """Its loss without what the notes say."""
    return str(row["loss"]).split(",")[0]


def _speed_cells(row: Row, plain: Row) -> list[str]:
    peak, plain_peak = number_of(row, "peak_extra_MB"), number_of(plain, "peak_extra_MB")
    ratio = plain_peak / peak if peak else math.nan
    return [
        _short(row),
        str(row["classes"]),
        str(row["implementation"]),
        f"{number_of(row, 'step_ms'):.3g}",
        f"{number_of(plain, 'step_ms') / number_of(row, 'step_ms'):.2f}",
        f"{number_of(row, 'optimizer_ms'):.3g}",
        "" if peak != peak else f"{peak:.0f}",
        "" if ratio != ratio else f"{ratio:.2f}",
        f"{max(number_of(row, 'loss_difference'), number_of(row, 'gradient_difference')):.1e}",
    ]


def speed_notes(speed: Sequence[Row]) -> list[str]:
    """How times and memory were measured."""
    first = speed[0]
    return [
        f"Data: {first['data']}. Up to {first['regions']} classes are contiguous groups of whole regions, with their "
        "tail; more are equal pieces of the places in the order of their regions, without one. Their "
        "counts do not matter to time and memory. "
        f"Model: that of the experiment places, width {first['width']}, and a linear layer with bias.",
        "ms: forward, loss and backward of the whole model, median of steps that took turns in one process (steps in "
        "the CSV), on the same weights and batches. The optimizer, the same for all, is measured apart. peak: memory "
        "that these take at most beyond model and optimizer, gradients with them, in a process of its own; the bag of "
        "n-grams has its part in time and memory, whatever the loss. plain / it: plain PyTorch's time or memory over "
        "this one's. in place: the gradient is written over the logits.",
        "off: largest relative difference, of loss or gradients, to plain PyTorch's at the same weights, before the "
        f"steps and after them; beyond {LOSS_TOLERANCE:g} and {GRADIENT_TOLERANCE:g} the "
        "run stops.",
        f"The combined loss: class-balanced weights of beta {growth_speed.BETA:g}, focal gamma "
        f"{growth_speed.FOCAL_GAMMA:g}, complement gamma {growth_speed.COMPLEMENT_GAMMA:g}, log-priors added.",
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Differences by imbalance, and time and memory of a step by number of classes; a PNG."""
    quality, speed = parts(rows)
    figure, axes = plotting().subplots(1, 3, figsize=(17, 7), layout="constrained", width_ratios=(5, 4, 4))
    _draw_quality(axes[0], quality)
    for axis, column, label in (
        (axes[1], "step_ms", f"ms of a step of {speed[0]['batch_size']} texts, without optimizer"),
        (axes[2], "peak_extra_MB", "peak MB of a step, beyond model and optimizer"),
    ):
        _draw_by_classes(axis, speed, column, label)
    for axis, columns in ((axes[0], 2), (axes[1], 1)):
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)
    first = quality[0]
    cut = [row for row in quality if not isinstance(row["imbalance_factor"], str)]
    totals = [int(number_of(row, "train_texts")) for row in cut]
    figure.suptitle(
        f"Left: diagnoses (ICD-10-CM), the {first['classes']} classes with at least {growth.LEAST} training texts, cut "
        f"to an exponential profile ({min(totals)} to {max(totals)} texts; 'as it is': not cut): mean difference to "
        f"{CONTROL} over {first['seeds']} seeds\nand its 95 % interval, filled where it is significant ({LEVEL:.0%}, "
        f"paired t-test, Holm's correction). Middle and right: places (GeoNames) to groups of regions, above "
        f"{speed[0]['regions']} classes to equal pieces, {speed[0]['threads']} threads;\nplain PyTorch dashed, fused "
        "losses in full lines; the loss "
        f"with complement has log-priors added\n{first['data']}; {speed[0]['data']}\n{origin(first)}",
        fontsize=9,
    )
    save_figure(figure, path, 110)


def _draw_quality(axis: Any, quality: Sequence[Row]) -> None:
    groups = by_imbalance(quality)
    names = [f"{_factor_name(factor)}\n{of[0]['largest']} to {of[0]['rarest']}" for factor, of in groups.items()]
    methods = list(dict.fromkeys(str(row["method"]) for row in quality if row["method"] != CONTROL))
    axis.axhline(0, color="black", linewidth=0.8)
    for i, method in enumerate(methods):
        of_method = [row for row in quality if row["method"] == method]
        places = [k + 0.1 * (i - (len(methods) - 1) / 2) for k in range(len(names))]
        differences = [PERCENT * number_of(row, "balanced_difference") for row in of_method]
        widths = [PERCENT * number_of(row, "balanced_half_width") for row in of_method]
        colour = colour_of(method)
        cut = sum(not isinstance(factor, str) for factor in groups)  # no line leads to what is no factor
        axis.plot(places[:cut], differences[:cut], color=colour, linewidth=1, label=method)
        for place, difference, width, row in zip(places, differences, widths, of_method, strict=True):
            found = row["balanced_verdict"] in ("better", "worse")
            face = colour if found else "white"
            bar = None if width != width else width
            axis.errorbar(place, difference, yerr=bar, fmt="o", color=colour, markersize=5, markerfacecolor=face)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("imbalance factor; below it, training texts of the largest and of the rarest class")
    axis.set_ylabel(f"balanced accuracy: difference in points to {CONTROL}")
    axis.grid(axis="y", linewidth=0.3)


def _draw_by_classes(axis: Any, speed: Sequence[Row], column: str, label: str) -> None:
    implementations: dict[Any, list[Any]] = {}
    for row in speed:
        names = implementations.setdefault(row["loss"], [])
        if row["implementation"] not in names:
            names.append(row["implementation"])
    for loss, names in implementations.items():
        for i, name in enumerate(names):
            found = [row for row in speed if (row["loss"], row["implementation"]) == (loss, name)]
            axis.plot(
                [number_of(row, "classes") for row in found],
                [number_of(row, column) for row in found],
                DASHED if i == 0 else "-",
                color=colour_of(str(loss)),
                marker="x" if i == 0 else MARKERS[i - 1],
                markersize=5,
                linewidth=2,
                label=f"{_short(found[0])}: {name}",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("classes (log axis)")
    axis.set_ylabel(f"{label} (log axis)")
    axis.grid(linewidth=0.3)
