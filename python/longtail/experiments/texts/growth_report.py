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
from . import growth, growth_speed, growth_step
from .report import PERCENT
from .settings import SETTINGS

NAMES = {"balanced": "balanced accuracy", "rarest_third": "rarest third"}
CONTROL = CROSS_ENTROPY.name
COLOURS = {"cross-entropy": "#000000", "combined": "#D55E00"}
STYLES = (("--", "x"), ("-", "o"), (":", "s"))
"""Lines and marks of plain PyTorch, the loss fused, projection and loss fused."""


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
    times = ("range", "plain / it")
    groups = [
        *(("loss",), ("classes", "implementation"), ("ms", *times), ("ms, kept", *times)),
        *(("peak MB", "plain / it"), ("off",)),
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
        f"Diagnoses, {name}: {row['train_texts']} training texts of {row['classes']} classes in seed 0, the largest "
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


def _speed_cells(row: Row, plain: Row) -> list[str]:
    return [
        str(row["loss"]),
        str(row["classes"]),
        str(row["implementation"]),
        *_time_cells(row, plain, "step_ms"),
        *_time_cells(row, plain, "kept_step_ms"),
        _shown(number_of(row, "peak_extra_MB"), ".0f"),
        _ratio(row, plain, "peak_extra_MB"),
        f"{max(number_of(row, 'loss_difference'), number_of(row, 'gradient_difference')):.1e}",
    ]


def _time_cells(row: Row, plain: Row, name: str) -> list[str]:
    middle, lowest, highest = (_milliseconds(number_of(row, f"{name}{end}")) for end in ("", "_lowest", "_highest"))
    return [middle, f"{lowest} to {highest}", _ratio(row, plain, name)]


def _milliseconds(time: float) -> str:
    return f"{time:.3g}" if time < 100 else f"{time:.0f}"


def _ratio(row: Row, plain: Row, name: str) -> str:
    own = number_of(row, name)
    return _shown(number_of(plain, name) / own if own else math.nan, ".2f")


def _shown(number: float, style: str) -> str:
    return "" if math.isnan(number) else f"{number:{style}}"


def speed_notes(speed: Sequence[Row]) -> list[str]:
    """How times and memory were measured."""
    first = speed[0]
    return [
        f"Data: {first['data']}. Up to {first['regions']} classes are contiguous groups of whole regions, with their "
        "tail; more are equal pieces of the places in the order of their regions, without one. Their counts do not "
        f"matter to time and memory. Model: that of the experiment places, width {first['width']}, and a linear layer "
        "with bias.",
        "combined: cross-entropy with class-balanced weights, focal and complement terms (beta "
        f"{growth_step.BETA:g}, gamma {growth_step.FOCAL_GAMMA:g} and {growth_step.COMPLEMENT_GAMMA:g}) and logit "
        "adjustment. Its PyTorch operations hold for confident rows; a form with a single log-softmax, which takes the "
        "target's part off, would not, and be about 1.5 times as fast. in place: the gradient is written over the "
        "logits.",
        "ms: forward, loss and backward of the whole model, without the optimizer, which is the same for all; median "
        f"of {first['processes']} process(es), each the median of steps that took turns on the same weights and "
        "batches (steps in the CSV); range: lowest to highest of the processes. kept: where malloc keeps what is freed "
        f"({' '.join(f'{name}={value}' for name, value in growth_speed.KEPT.items())}). As it comes, glibc's takes "
        "tensors above 32 MB from the system each time, whose pages are then faulted in.",
        "peak: memory that a step takes at most beyond model and optimizer, gradients with it; the bag of n-grams has "
        "its part in time and memory, whatever the loss. plain / it: plain PyTorch's over this one's.",
        "off: largest relative difference, of loss or gradients, to plain PyTorch's at the same weights, before the "
        f"steps and after them; beyond {LOSS_TOLERANCE:g} and {GRADIENT_TOLERANCE:g} the run stops.",
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Differences by imbalance, and time and memory of a step by number of classes; a PNG."""
    quality, speed = parts(rows)
    figure, ((left, memory), times) = plotting().subplots(2, 2, figsize=(14, 12), layout="constrained")
    _draw_quality(left, quality)
    batch = f"of a step of {speed[0]['batch_size']} texts"
    _draw_by_classes(memory, speed, "peak_extra_MB", f"peak MB {batch}, beyond model and optimizer")
    _draw_by_classes(times[0], speed, "step_ms", f"ms {batch}, without optimizer")
    _draw_by_classes(times[1], speed, "kept_step_ms", f"ms {batch}, where malloc keeps what is freed")
    left.legend(fontsize=8, frameon=False)
    memory.legend(fontsize=8, frameon=False)
    first = quality[0]
    cut = [row for row in quality if not isinstance(row["imbalance_factor"], str)]
    totals = [int(number_of(row, "train_texts")) for row in cut]
    figure.suptitle(
        f"Above left: diagnoses (ICD-10-CM), those with at least {growth.LEAST} training texts ({first['classes']} in "
        f"seed 0), cut to an exponential profile ({min(totals)} to {max(totals)} texts; 'as it is': not cut):\nmean "
        f"difference to {CONTROL} over {first['seeds']} seeds and its 95 % interval, filled where it is significant "
        f"({LEVEL:.0%}, paired t-test, Holm's correction).\nThe others: places (GeoNames) to groups of regions, above "
        f"{speed[0]['regions']} classes to equal pieces, {speed[0]['threads']} threads; bars: lowest to highest of "
        f"{speed[0]['processes']} process(es); combined: class-balanced, focal,\ncomplement and logit-adjusted "
        f"cross-entropy\n{first['data']}; {speed[0]['data']}\n{origin(first)}",
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
    """A line for each loss and implementation, with the range over the processes where there is one."""
    for loss, colour in COLOURS.items():
        of_loss = [row for row in speed if row["loss"] == loss]
        names = dict.fromkeys(str(row["implementation"]) for row in of_loss)
        for name, (line, marker) in zip(names, STYLES, strict=True):
            found = [row for row in of_loss if row["implementation"] == name]
            values = [number_of(row, column) for row in found]
            ends: list[list[float]] | None = None
            if f"{column}_lowest" in found[0]:
                lowest, highest = (
                    [number_of(row, f"{column}_{end}") for row in found] for end in ("lowest", "highest")
                )
                ends = [
                    [v - low for v, low in zip(values, lowest, strict=True)],
                    [high - v for v, high in zip(values, highest, strict=True)],
                ]
            axis.errorbar(
                [number_of(row, "classes") for row in found],
                values,
                ends,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=5,
                label=f"{loss}: {name}",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("classes (log axis)")
    axis.set_ylabel(f"{label} (log axis)")
    axis.grid(linewidth=0.3)
