"""The CIFAR experiment's table and picture, with the papers' figures beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cifar import FEW, MANY, METHODS
from .output import Row, origin, plotting, print_table, save_figure
from .palette import colour_of

PUBLISHED_EPOCHS, TEST_IMAGES = 200, 10000


def print_report(rows: Sequence[Row]) -> None:
    """Test error of every loss, measured and published."""
    first = rows[0]
    print_table(
        f"{first['dataset']}, imbalance factor {first['imbalance_factor']:g}, {first['train_images']} training images, "
        f"{first['epochs']} epochs: test error in %",
        (
            ("loss",),
            ("last epoch", "best epoch", "published"),
            ("acc many", "acc medium", "acc few"),
            ("published in",),
        ),
        map(_cells, rows),
        notes(rows),
    )


def _cells(row: Row) -> list[str]:
    def percent(name: str, factor: float = 1) -> str:
        value = row[name]
        return f"{factor * value:.2f}" if isinstance(value, (int, float)) and value == value else "-"

    errors = (percent(name) for name in ("test_error", "best_test_error", "published_error"))
    accuracies = (percent(f"accuracy_{group}", 100) for group in ("many", "medium", "few"))
    return [str(row["loss"]), *errors, *accuracies, str(row["published_in"] or "")]


def notes(rows: Sequence[Row]) -> list[str]:
    """What the columns mean, and whether they may be compared with the papers."""
    first = rows[0]
    lines = [
        f"acc: accuracy in % over the classes with more than {MANY} training images (many), fewer than {FEW} (few), or "
        "neither (medium), at the last epoch. best epoch: chosen on the test images, as some papers do.",
        "Losses have beta 0.9999 and gamma 1; the published class-balanced figure is the best of the paper's grid.",
    ]
    if first["epochs"] != PUBLISHED_EPOCHS:
        lines.append(f"Not comparable with the papers: {first['epochs']} epochs instead of {PUBLISHED_EPOCHS}.")
    if first["test_images"] != TEST_IMAGES:
        lines.append(f"Not comparable with the papers: {first['test_images']} test images instead of {TEST_IMAGES}.")
    if first["incomplete_files"]:
        lines.append(f"Not comparable with the papers: not the published files: {first['incomplete_files']}.")
    return lines


def _label(row: Row) -> str:
    return METHODS[str(row["loss"])].name


def draw(rows: Sequence[Row], path: Path) -> None:
    """Test error by epoch, the published error as a dashed line of the same colour; a PNG."""
    figure, axis = plotting().subplots(figsize=(10, 6), layout="constrained")
    for row in rows:
        colour = colour_of(METHODS[str(row["loss"])].family)
        errors = [float(error) for error in str(row["test_error_by_epoch"]).split()]
        axis.plot(range(1, len(errors) + 1), errors, marker=".", markersize=3, color=colour, label=_label(row))
        if row["published_error"] is not None:
            axis.axhline(row["published_error"], color=colour, linestyle="--", linewidth=0.8)
    axis.set_xlabel("epoch")
    axis.set_ylabel("test error in % (dashed: published)")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(
        f"{rows[0]['dataset']}, imbalance factor (largest over smallest class) {rows[0]['imbalance_factor']:g}, "
        f"ResNet-32, one seed\nbeta: of the class-balanced weights; gamma: of the focal factor\n{origin(rows[0])}",
        fontsize=9,
    )
    save_figure(figure, path, 110)
