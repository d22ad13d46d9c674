"""The demo's progress bar, table and picture; needs rich and matplotlib."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from torch import Tensor

from . import demo
from .output import plotting, print_table, progress_bar, save_figure


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
    print_table(title, groups, lines, _legend(plan, splits[0].counts(), backend))


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds; NaN for a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def mean_and_spread(shares: list[float]) -> str:
    """Percentages as "mean±spread", without the latter for a single seed; "-" for a group without classes."""
    if any(math.isnan(share) for share in shares):
        return "-"
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean}±{100 * spread(shares):.1f}" if len(shares) > 1 else mean


def _legend(plan: demo.Plan, counts: Tensor, backend: str) -> list[str]:
    many, few = demo.group_thresholds(counts)
    each = ", ".join(str(n) for n in counts.tolist())
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, ± is the standard deviation over them"
    return [
        f"Data: training images of the digits 0 to 9: {each} (imbalance factor {plan.imbalance_factor:g}, in whole "
        f"images); test images: {demo.TEST_PER_CLASS} of each, so that overall = balanced.",
        f"Groups: many: digits with more than {many} training images; few: with fewer than {few}; medium: the "
        "others (thirds of the classes; - where a group is empty).",
        f"Training: {plan.epochs} epoch(s); {seeds}. Class-balanced: beta {demo.BETA:g}; focal: gamma "
        f"{demo.FOCAL_GAMMA:g}; complement: gamma {demo.COMPLEMENT_GAMMA:g}; not tuned.",
        f"Time: forward + backward of the loss alone on {demo.BATCH_SIZE} x {demo.NUM_CLASSES} logits, one thread, "
        f"median of {demo.TIMED_ROUNDS} alternating runs, results compared; at this size mostly the cost of a call.",
        f"Fused: longtail, {backend}. Plain: F.cross_entropy where torch has the loss, else longtail.reference. "
        "Ratio: plain / fused.",
    ]


def draw(plan: demo.Plan, splits: list[demo.Split], results: list[demo.Result], path: Path) -> None:
    """Bars of the accuracy per class, mean over the seeds, the spread as whiskers; a PNG at ``path``."""
    counts = splits[0].counts().tolist()
    figure, axes = plotting().subplots(figsize=(12, 5), layout="constrained")
    width = 0.85 / len(results)
    for i, result in enumerate(results):
        percent = [[100 * share for share in scores.per_class.tolist()] for scores in result.scores]
        seeds = [list(of_class) for of_class in zip(*percent, strict=True)]
        left = [c + (i - (len(results) - 1) / 2) * width for c in range(len(counts))]
        axes.bar(
            *(left, [statistics.mean(s) for s in seeds], width),
            yerr=[spread(s) for s in seeds] if plan.seeds > 1 else None,
            error_kw={"linewidth": 0.8},
            label=demo.LOSSES[result.loss],
        )
    axes.set_xticks(range(len(counts)), [f"{c}\n{n} images" for c, n in enumerate(counts)])
    axes.set_xlabel("digit, and its training images")
    axes.set_ylabel("test accuracy in %")
    axes.set_ylim(0, 105)
    axes.set_title(f"Long-tailed digits: mean and standard deviation over {plan.seeds} seed(s)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path, 120)
