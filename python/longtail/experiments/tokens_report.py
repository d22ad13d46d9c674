"""The tokens experiment's tables and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import tokens, tokens_model
from .output import Row, origin, plotting, print_notes, print_table, save_figure
from .palette import colour_of

DIFFERENCES = ("loss_difference", "gradient_difference", "early_loss_difference", "any_loss_difference")
GROUPS = ("overall", "head", "mid", "tail")


def print_report(rows: Sequence[Row]) -> None:
    """One table of speed and memory, one of quality, and what they mean."""
    first = rows[0]
    speed = [row for row in rows if row["step_ms"] is not None]
    print_table(
        f"One objective, cross-entropy over {first['vocabulary']} tokens, three ways; whole training steps of "
        f"{first['tokens_per_step']} tokens",
        (
            ("loss",),
            ("ms", "tokens/s", "over plain", "peak MB"),
            ("loss off", "gradient off", "early loss off", "any loss off"),
        ),
        (_speed_cells(row, speed[0]) for row in speed),
    )
    print()
    print_table(
        f"Perplexity and accuracy in % on held-out text after {first['steps']} steps",
        (("objective, evaluated by",), [f"ppl {g}" for g in GROUPS], [f"acc {g}" for g in GROUPS]),
        map(_quality_cells, rows),
    )
    print()
    print_notes(notes(rows))


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float)), name
    return float(value)


def _speed_cells(row: Row, plain: Row) -> list[str]:
    peak = row["peak_extra_MB"]
    return [
        str(row["implementation"]),
        f"{_number(row, 'step_ms'):.0f}",
        f"{_number(row, 'tokens_per_second'):.0f}",
        f"{_number(plain, 'step_ms') / _number(row, 'step_ms'):.2f}",
        "" if peak is None else f"{peak:.0f}",
        *(f"{_number(row, name):.1e}" for name in DIFFERENCES),
    ]


def label(row: Row) -> str:
    """A model and how it is evaluated."""
    name = str(row["objective"])
    if row["step_ms"] is not None:
        name += f" ({row['implementation']})"
    return f"{name}, log-priors added" if "log-priors" in str(row["evaluated"]) else name


def _quality_cells(row: Row) -> list[str]:
    perplexities = (f"{_number(row, f'perplexity_{group}'):.4g}" for group in GROUPS)
    accuracies = (f"{100 * _number(row, f'accuracy_{group}'):.2f}" for group in GROUPS)
    return [label(row), *(cell.replace("nan", "-") for cell in (*perplexities, *accuracies))]


def notes(rows: Sequence[Row]) -> list[str]:
    """How the figures were made."""
    first = rows[0]
    known = 100 * _number(first, "held_out_coverage")
    return [
        f"Text: the standard library of Python {first['python']} without its tests ({first['train_tokens']} tokens for "
        f"training; whole files held out). The vocabulary knows {100 * _number(first, 'train_coverage'):.2f} % of the "
        f"training and {known:.2f} % of the held-out tokens; the others are context, but not scored.",
        f"head: ranks 1 to {tokens.HEAD_RANK} of the training text ({first['held_out_head']} held-out tokens scored); "
        f"mid: to {tokens.MID_RANK} ({first['held_out_mid']}); tail: the rest ({first['held_out_tail']}).",
        "Perplexity is that of the softmax of the model's own logits. Objectives that re-weight or shift the classes "
        "do not model the text's frequencies with it, and pay in overall perplexity; logit adjustment does once the "
        "log-priors of its training are added back, so it is shown both ways. Accuracy: largest of the same logits.",
        "ms and tokens/s: medians of steps that took turns in one process; over plain: F.cross_entropy's time over "
        "this one's. Peak: of one step beyond parameters and optimizer state.",
        f"off: largest relative difference to F.cross_entropy. Loss and gradient: at the same weights, every "
        f"{tokens.CHECK_EVERY} steps (beyond {tokens.LOSS_TOLERANCE:g}, {tokens.GRADIENT_TOLERANCE:g} the run stops); "
        f"early loss: each model at its own weights, first {tokens.EARLY_STEPS} steps (beyond "
        f"{tokens.EARLY_TOLERANCE:g} it stops); any loss: over all steps, where training amplifies the last digit.",
        f"Model: GRU of width {tokens_model.WIDTH} between tied embeddings, no output bias, Adam, learning rate "
        f"{tokens.LEARNING_RATE:g}, epsilon {tokens.EPSILON:g} (warm-up, then linear to 0): chosen for cross-entropy "
        "alone. Every model has the same start and reads the same tokens. One seed: small differences mean nothing.",
        "With the log-priors added, logit adjustment starts from the frequencies of the text, which the others first "
        "have to learn: in a training this short that helps by itself.",
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Perplexity and accuracy by frequency group, and speed and memory of plain PyTorch and fused; a PNG."""
    figure, axes = plotting().subplots(1, 4, figsize=(17, 5.6), layout="constrained", width_ratios=(5, 5, 2, 2))
    shown = [row for i, row in enumerate(rows) if row["step_ms"] is None or i == 0]
    step, drawn = 0.7 / len(shown), set()
    for i, row in enumerate(shown):
        left = [g + (i - (len(shown) - 1) / 2) * step for g in range(len(GROUPS))]
        perplexities = [_number(row, f"perplexity_{group}") for group in GROUPS]
        accuracies = [100 * _number(row, f"accuracy_{group}") for group in GROUPS]
        colour = colour_of(str(row["objective"]))
        filled = colour not in drawn  # else of a method that has its dots: other hyperparameters or evaluation
        drawn.add(colour)
        look = {"color": colour, "markerfacecolor": colour if filled else "white", "markersize": 7}
        axes[0].plot(left, perplexities, "o", label=label(row), **look)
        axes[1].plot(left, accuracies, "o", **look)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("held-out perplexity (log axis; lower is better)")
    axes[1].set_ylabel("held-out accuracy in %")
    for axis in axes[:2]:
        axis.set_xticks(range(len(GROUPS)), _group_names(rows[0]))
        axis.grid(axis="y", linewidth=0.3)
        for g in range(len(GROUPS) - 1):
            axis.axvline(g + 0.5, color="lightgrey", linewidth=0.8)
    _draw_speed(axes[2], axes[3], [row for row in rows if row["step_ms"] is not None])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(
        f"Language model over {rows[0]['vocabulary']} tokens of the Python standard library, {rows[0]['steps']} steps, "
        "one seed. Perplexity: exp of the mean negative log-likelihood. beta: of the class-balanced weights; gamma: of "
        "the focal factor; tau: times the log-priors\nLog-priors: logarithms of the tokens' frequencies in the "
        "training text, which logit adjustment adds to the logits in training; hollow dots add them in the test too, "
        f"or are a second beta\n{origin(rows[0])}, {rows[0]['threads']} threads",
        fontsize=9,
    )
    save_figure(figure, path, 110)


def _group_names(row: Row) -> list[str]:
    """The groups and what they are, by rank in the training text."""
    ranks = ("all tokens", f"rank 1 to {tokens.HEAD_RANK}", f"to {tokens.MID_RANK}", "the rest")
    return [f"{group}\n({what}:\n{row[f'held_out_{group}']} tested)" for group, what in zip(GROUPS, ranks, strict=True)]


def _draw_speed(speed: Any, memory: Any, rows: Sequence[Row]) -> None:
    names = [str(row["implementation"]) for row in rows]
    columns = (
        (speed, "tokens_per_second", "cross-entropy three ways:\ntokens per second"),
        (memory, "peak_extra_MB", "cross-entropy three ways:\npeak memory of a step, MB"),
    )
    for axis, column, title in columns:
        values = [0.0 if row[column] is None else _number(row, column) for row in rows]
        bars = axis.bar(range(len(rows)), values, color=[colour_of(str(row["objective"])) for row in rows])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(rows)), names, rotation=25, fontsize=8, ha="right")
        axis.set_title(title, fontsize=9)
