"""The progress bar, table and picture of ``demo --data digits``; needs rich and matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..files import one_line
from . import demo_digits as demo
from .demo_parts import mean_and_spread, over_seeds, spread
from .output import origin, plotting, print_table, progress_bar, save_figure, with_provenance
from .palette import colour_of


def run_with_progress(plan: demo.Plan, splits: list[demo.Split]) -> list[demo.Result]:
    """``demo.run`` under a progress bar on stderr."""
    with progress_bar(len(plan.losses) * plan.seeds * plan.epochs) as advance:
        return demo.run(plan, splits, advance)


def print_report(plan: demo.Plan, splits: list[demo.Split], results: list[demo.Result], backend: str) -> None:
    """The table, and below it what its columns mean."""
    accuracies, lines = ("overall", "balanced", "many", "medium", "few"), []
    for result in results:
        cells = (mean_and_spread([getattr(s, group) for s in result.scores]) for group in accuracies)
        fused, plain = result.time
        times = (f"{fused * 1e6:.0f}", f"{plain * 1e6:.0f}", f"{plain / fused:.1f}")
        lines.append((demo.LOSSES[result.loss], *cells, *times))
    title = "Long-tailed digits: test accuracy in %, and time of the loss per step in µs"
    groups = (("loss",), accuracies, ("fused", "plain", "ratio"))
    print_table(title, groups, lines, _legend(plan, splits[0].counts(), len(results[0].scores), backend))


def print_end(_plan: demo.Plan, _results: list[demo.Result], picture: Path | None) -> None:
    """Where the picture is."""
    if picture:
        print(one_line(f"Picture: accuracy per class in {picture}"))


def _legend(plan: demo.Plan, counts: Tensor, seeds: int, backend: str) -> list[str]:
    many, few = demo.group_thresholds(counts)
    each = ", ".join(str(n) for n in counts.tolist())
    return [
        f"Data: training images of the digits 0 to 9: {each} (imbalance factor {plan.imbalance_factor:g}, in whole "
        f"images); test images: {demo.TEST_PER_CLASS} of each, so that overall = balanced.",
        f"Groups: many: digits with more than {many} training images; few: with fewer than {few}; medium: the "
        "others (thirds of the classes; - where a group is empty).",
        f"Training: {plan.epochs} epoch(s); {over_seeds(seeds)}. {HYPERPARAMETERS}.",
        f"Time: forward + backward of the loss alone on {demo.BATCH_SIZE} x {demo.NUM_CLASSES} logits, one thread, "
        f"median of {demo.TIMED_ROUNDS} alternating runs, results compared; at this size mostly the cost of a call.",
        f"Fused: longtail, {backend}. Plain: F.cross_entropy and, where torch has no such loss, tensor "
        "operations. Ratio: plain / fused.",
    ]


HYPERPARAMETERS = (
    f"Class-balanced: beta {demo.BETA:g}; focal: gamma {demo.FOCAL_GAMMA:g}; complement: gamma "
    f"{demo.COMPLEMENT_GAMMA:g}; logit adjustment: tau {demo.TAU:g}; not tuned"
)


def draw(plan: demo.Plan, splits: list[demo.Split], results: list[demo.Result], path: Path) -> None:
    """The accuracy per class, mean over the seeds, and the spread within 0 to 100 as whiskers; a PNG at ``path``."""
    counts = splits[0].counts().tolist()
    figure, axis = plotting().subplots(figsize=(12, 5.5), layout="constrained")
    step = 0.7 / len(results)
    for i, result in enumerate(results):
        percent = [[100 * share for share in scores.per_class.tolist()] for scores in result.scores]
        seeds = [list(of_class) for of_class in zip(*percent, strict=True)]
        name = demo.LOSSES[result.loss]
        axis.errorbar(
            [c + (i - (len(results) - 1) / 2) * step for c in range(len(counts))],
            [statistics.mean(s) for s in seeds],
            whiskers(seeds) if plan.seeds > 1 else None,
            fmt="o",
            color=colour_of(name),
            markersize=6,
            linewidth=1.5,
            label=name,
            markeredgecolor="black",
            markeredgewidth=0.5,
        )
    for c in range(len(counts) - 1):
        axis.axvline(c + 0.5, color="lightgrey", linewidth=0.8)
    axis.set_xticks(range(len(counts)), [f"{c}\n{n} images" for c, n in enumerate(counts)])
    axis.set_xlim(-0.5, len(counts) - 0.5)
    axis.set_xlabel("digit, and its training images")
    axis.set_ylabel("test accuracy in %")
    axis.set_ylim(-2, 102)
    axis.grid(axis="y", linewidth=0.3)
    spread_shown = ", whiskers: one standard deviation, within 0 to 100" if plan.seeds > 1 else ""
    axis.set_title(
        f"Long-tailed digits (imbalance factor, largest over smallest class: {plan.imbalance_factor:g}), "
        f"{plan.epochs} epoch(s)\nDots: mean accuracy on the {demo.TEST_PER_CLASS} test images of a digit over "
        f"{plan.seeds} seed(s){spread_shown}\n{HYPERPARAMETERS}\n{origin(with_provenance({}))}",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path, 120)


def whiskers(seeds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Below and above each mean of percentages: their standard deviation, cut off at 0 and at 100."""
    below, above = [], []
    for values in seeds:
        mean = statistics.mean(values)
        below.append(min(spread(values), mean))
        above.append(min(spread(values), 100 - mean))
    return below, above
