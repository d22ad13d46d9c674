"""The progress bar, table and closing words of ``demo --data icd``; needs rich."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..files import one_line
from . import demo_icd as demo
from .demo_icd_cost import BATCH_SIZE, MEMORY_ROWS, TIMED_ROUNDS
from .demo_icd_picture import draw as draw
from .demo_parts import mean_and_spread, over_seeds, spread
from .methods import CROSS_ENTROPY, DRW_BETA, HIERARCHICAL_ALPHA, drw_start
from .output import print_notes, print_table, progress
from .texts.corpus import FEW, MANY
from .texts.settings import SETTINGS


def hyperparameters(epochs: int) -> str:
    start = drw_start(epochs)
    weights = f"beta {DRW_BETA:g} after {start} epochs" if start < epochs else "without weights in so few epochs"
    return (
        "Class-balanced: beta 0.999; focal: gamma 1; complement: gamma -1; logit adjustment: tau 1; LDAM-DRW: "
        f"{weights}; hierarchical: alpha {HIERARCHICAL_ALPHA:g}; not tuned"
    )


def run_with_progress(plan: demo.Plan, texts: demo.Texts) -> list[demo.Result]:
    """``demo.run`` under a progress bar on stderr."""
    with progress(len(plan.losses) * (1 + plan.seeds * plan.epochs)) as tell:
        return demo.run(plan, texts, tell)


def print_report(plan: demo.Plan, texts: demo.Texts, results: list[demo.Result], backend: str) -> None:
    """The table, and below it what its columns mean."""
    accuracies, lines = ("balanced", "many", "medium", "few", "overall"), []
    steps = demo.steps(plan, texts)
    for result in results:
        cells = (mean_and_spread([getattr(s, group) for s in result.scores]) for group in accuracies)
        fused, plain = result.cost.time
        times = (f"{steps * fused:.2f}", f"{steps * plain:.2f}", f"{plain / fused:.1f}")
        memory = (_megabytes(result.cost.fused_bytes), _megabytes(result.cost.plain_bytes))
        lines.append((demo.LOSSES[result.loss].family, *cells, *times, *memory))
    title = (
        f"Diagnoses (ICD-10-CM) to {len(texts.corpus.classes)} categories: test accuracy in %, seconds of one training "
        "in the loss, peak memory of the loss"
    )
    groups = (("loss",), accuracies, ("fused s", "plain s", "ratio"), ("fused MB", "plain MB"))
    print_table(title, groups, lines, _legend(plan, texts, len(results[0].scores), backend))


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def _legend(plan: demo.Plan, texts: demo.Texts, seeds: int, backend: str) -> list[str]:
    counts, setting = texts.counts[0], SETTINGS[demo.NAME]
    in_groups = (int(group.sum()) for group in (counts > MANY, (counts <= MANY) & (counts >= FEW), counts < FEW))
    many, medium, few = in_groups
    shape = f"{MEMORY_ROWS} x {len(texts.corpus.classes)} logits"
    return [
        f"Data: {int(counts.sum())} training and {int(texts.tested[0].sum())} test texts, descriptions and synonyms; "
        f"{int(counts.min())} to {int(counts.max())} training texts a category ({texts.corpus.source}).",
        f"Groups: many: the {many} categories with more than {MANY} training texts; few: the {few} with fewer than "
        f"{FEW}; medium: the other {medium}, all in the first seed; - where a group is empty. balanced: mean over the "
        "categories; overall: over the test texts.",
        f"Training: {plan.epochs} epoch(s); {over_seeds(seeds)}. {hyperparameters(plan.epochs)}. Model: mean of the "
        f"vectors of hashed n-grams, and a linear layer; Adam, learning rate {setting.learning_rate:g}, chosen for "
        "cross-entropy.",
        f"Seconds: forward + backward of the loss alone on {BATCH_SIZE} x {len(texts.corpus.classes)} random logits, "
        f"one thread, median of {TIMED_ROUNDS} alternating runs, results compared, times the {demo.steps(plan, texts)} "
        "steps of a training.",
        f"Memory: peak of forward + backward beyond {shape}, whose gradient is in it; measured in whole pages, so on "
        f"{MEMORY_ROWS // BATCH_SIZE} batches at once; - where there is too little to see.",
        f"Fused: longtail, {backend}. Plain: PyTorch's F.cross_entropy, F.binary_cross_entropy_with_logits and tensor "
        "operations. Ratio: plain / fused.",
    ]


def print_end(_plan: demo.Plan, results: list[demo.Result], picture: Path | None) -> None:
    """Where the picture is, and in words what was seen."""
    if picture:
        print(one_line(f"Picture: accuracy by frequency in {picture}"))
    print_notes([in_words(results)])


def in_words(results: Sequence[demo.Result]) -> str:
    """What the figures say, also where nothing is better than cross-entropy."""
    said = [_of_accuracy(results, "balanced", "balanced accuracy"), _of_accuracy(results, "few", "few-shot accuracy")]
    ratios = [result.cost.time.plain / result.cost.time.fused for result in results]
    ends = dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios)))
    whose = "The fused loss was" if len(ratios) == 1 else "The fused losses were"
    return " ".join([*filter(None, said), f"{whose} {' to '.join(ends)} times as fast as plain PyTorch."])


def _of_accuracy(results: Sequence[demo.Result], group: str, name: str) -> str:
    """Nothing of a single loss or an empty group."""
    shares = {result.loss: [100 * getattr(scores, group) for scores in result.scores] for result in results}
    if len(shares) == 1 or any(math.isnan(share) for of_loss in shares.values() for share in of_loss):
        return ""
    best = max(shares, key=lambda loss: statistics.mean(shares[loss]))
    control = next((loss for loss in shares if demo.LOSSES[loss] == CROSS_ENTROPY), None)
    found = f"{demo.LOSSES[best].family} ({statistics.mean(shares[best]):.1f} %)"
    if control is None:
        return f"The highest {name} was that of {found}."
    if best == control:
        return f"No loss had a higher {name} than {found}."
    points = statistics.mean(shares[best]) - statistics.mean(shares[control])
    return f"The highest {name} was that of {found}, {points:.1f} points above cross-entropy, " + _against_spread(
        points, max(spread(shares[best]), spread(shares[control]))
    )


def _against_spread(points: float, over_the_seeds: float) -> str:
    if math.isnan(over_the_seeds):
        return "in a single seed."
    compared = "more" if points > over_the_seeds else "not more"
    return f"{compared} than the spread over the seeds ({over_the_seeds:.1f})."
