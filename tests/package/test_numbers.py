"""Promise: the figures in the tables of numbers.md and evidence.md are those of the committed rows, rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from documents import ROOT

results = pytest.importorskip("bench.results")
MODES = ("backward", "forward", "inplace")
LOSSES = {
    "sigmoid focal, class indices": ("sigmoid", "sigmoid_focal"),
    "sigmoid focal, a target for each element": ("sigmoid", "dense_focal"),
    "softmax focal": ("images", "focal"),
}
LINEAR = {
    "three bare matrix products": "three GEMMs",
    "F.linear_cross_entropy": "F.linear_cross_entropy",
    "F.linear_cross_entropy, chunked": "F.linear_cross_entropy chunked",
    "longtail.linear_cross_entropy": "longtail",
    'longtail.linear_cross_entropy, reduction="none"': 'longtail reduction="none"',
    "the same with complement + focal": "longtail complement + focal",
    "longtail.linear_row_statistics": "longtail linear_row_statistics",
}
STEPS = {
    "plain PyTorch": "plain PyTorch",
    'fused loss, gradient="inplace"': "fused loss",
    "fused linear loss": "fused linear loss",
}


def cells(page: str, start: str, after: str = "") -> Iterator[tuple[str, list[str]]]:
    """What each row of a table is about, and its cells; of the first such table after some text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = text[text.index(after) :]
    lines = text[text.index(start) :].split("\n\n")[0].splitlines()[2:]
    assert len(lines) > 2
    for line in lines:
        name, *rest = (cell.strip() for cell in line.split("|")[1:-1])
        yield re.sub("[`*]", "", name), rest


def table(page: str, start: str, after: str = "") -> Iterator[tuple[str, list[float]]]:
    """What each row of a table is about, and the numbers in it; of the first such table after some text."""
    for name, rest in cells(page, start, after):
        yield name, [float(number) for cell in rest for number in re.findall(r"[\d.]+", cell.replace(",", ""))]


def row(file: str, **wanted: Any) -> dict[str, str]:
    """The one row of a file with these values."""
    found = [
        row
        for row in results.read(results.FOLDER / f"{file}.csv")
        if all(row[column] == str(value) for column, value in wanted.items())
    ]
    assert len(found) == 1, (file, wanted, len(found))
    return found[0]


def check(name: str, stated: list[float], measured: list[Any]) -> None:
    assert stated == pytest.approx([float(value) for value in measured], rel=6e-3, abs=5e-3), name


def check_times(name: str, stated: list[float], loss: str, modes: tuple[str, ...] = MODES, **where: Any) -> None:
    contenders = [("eager", ""), ("compiled", ""), *(("longtail", mode) for mode in modes), ("copy", "")]
    for number, (contender, mode) in zip(stated, contenders, strict=True):
        found = row("cpu", contender=contender, gradient=mode, loss="" if contender == "copy" else loss, **where)
        time = float(found["median_ms"])
        assert number == float(f"{time:.3g}" if time >= 100 else f"{time:.2g}"), (name, contender, mode)


def test_times_of_the_softmax_family() -> None:
    for name, stated in table("numbers.md", "| loss, logits | eager |"):
        loss, shape, dtype = name.split(", ")
        rows, classes = shape.split(" x ")
        check_times(name, stated, loss, section="cpu", N=rows, C=classes, dtype=dtype)


def test_times_of_sigmoid_focal_and_images() -> None:
    text = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    start = text[text.index("## Sigmoid focal") :]
    for name, stated in table("numbers.md", start[start.index("| loss, logits |") :]):
        shape = re.search(r", (\d+) x (\d+) x (\d+) x (\d+)$", name)
        section, loss = LOSSES[name[: shape.start()] if shape else name]
        n, c = (int(shape[1]) * int(shape[3]) * int(shape[4]), shape[2]) if shape else (4096, 8192)
        check_times(name, stated, loss, section=section, N=n, C=c, dtype="float32")


def test_times_of_row_statistics() -> None:
    losses = {"cross-entropy": "plain", "log-probability and entropy": "statistics"}
    for name, stated in table("numbers.md", "| loss, dtype | eager |"):
        loss, dtype = name.split(", ")
        where = {"section": "statistics", "N": 2048, "C": 32768, "dtype": dtype}
        check_times(name, stated, losses[loss], ("backward", "inplace"), **where)


def test_times_of_losses_for_long_tails() -> None:
    losses = {"cross-entropy": "plain", "vector scaling": "vector_scaling", "IMMAX": "immax", "Seesaw": "seesaw"}
    losses |= {"hierarchical": "hierarchical", "hierarchical over shuffled classes": "hierarchical_shuffled"}
    for name, stated in table("numbers.md", "| loss of the tail, dtype | eager |"):
        loss, dtype = name.split(", ")
        check_times(name, stated, losses[loss], section="tail", N=2048, C=32768, dtype=dtype)


def test_times_of_losses_of_several_labels() -> None:
    losses = {"sigmoid focal": "multi_label_focal", "asymmetric": "asymmetric"}
    losses |= {"distribution-balanced": "distribution_balanced", "ZLPR": "zlpr", "two-way": "two_way"}
    for name, stated in table("numbers.md", "| loss of several labels, dtype | eager |"):
        loss, dtype = name.split(", ")
        check_times(name, stated, losses[loss], section="multi_label", N=4096, C=8192, dtype=dtype)


def test_times_of_class_probabilities() -> None:
    for name, stated in table("numbers.md", "| logits, dtype | `F.cross_entropy` |"):
        shape, dtype = name.split(", ")
        rows, classes = shape.split(" x ")
        check_times(name, stated, "soft", ("backward",), section="soft", N=rows, C=classes, dtype=dtype)


@pytest.mark.parametrize(
    ("start", "cpu"),
    [
        ("| | ms | of the three bare products |", "Intel(R) Xeon(R) Processor"),
        ("| from hidden states | ms |", "AMD EPYC"),
    ],
)
def test_times_and_memory_of_the_fused_linear_loss(start: str, cpu: str) -> None:
    for name, stated in table("numbers.md", start):
        found = row("linear", contender=LINEAR[name], dtype="float32", N=2048, D=512, cpu=cpu)
        check(name, stated, [found[column] for column in ("median_ms", "time_of_gemms", "peak_of_logits")])


def test_a_training_step() -> None:
    for name, stated in table("numbers.md", "| | ms a step | peak memory above"):
        found = row("step", contender=STEPS[name])
        check(name, stated, [found[column] for column in ("median_ms", "peak_extra_MB", "largest_batch")])


def score(found: dict[str, str], metric: str, spread: bool = False) -> str:
    """A cell of a table of scores: in percent, bold where it differs from the control."""
    ends = ["mean", "std"] if spread else ["mean"]
    numbers = [found[f"{metric}_{end}"] for end in ends]
    shown = " ± ".join(f"{100 * float(number):.1f}" for number in numbers if number) or "-"
    return f"**{shown}**" if found.get(f"{metric}_verdict") in ("better", "worse") else shown


def test_accuracies_of_the_digits() -> None:
    for name, stated in cells("evidence.md", "| method | factor 10 | factor 50 |"):
        at = {factor: row("experiment_digits", method=name, imbalance_factor=factor) for factor in (10, 50)}
        measured = [
            score(at[f], metric, spread=True) for f, metric in ((10, "balanced"), (50, "balanced"), (50, "few"))
        ]
        assert stated == measured, name


@pytest.mark.parametrize(("name", "classes"), [("icd", "1,918"), ("places", "3,875")])
def test_accuracies_of_the_texts(name: str, classes: str) -> None:
    shown = cells("evidence.md", "| method | balanced | few-shot classes |", after=f": {classes} classes")
    check_texts(name, list(shown), ("balanced", "few"), ("many", "overall", "calibration_error"))


def test_precisions_of_the_tags() -> None:
    shown, tested = cells("evidence.md", "| method | mAP |"), ("mean_average_precision", "few")
    check_texts("debtags", list(shown), tested, ("many", "f1", "macro_f1", "calibration_error"))


def check_texts(
    name: str, shown: list[tuple[str, list[str]]], tested: tuple[str, ...], others: tuple[str, ...]
) -> None:
    rows = results.read(results.FOLDER / f"experiment_{name}.csv")
    for (method, stated), found in zip(shown, rows, strict=True):
        assert method == found["method"]
        assert stated == [*(score(found, m, spread=True) for m in tested), *(score(found, m) for m in others)], method


@pytest.mark.parametrize(
    ("metric", "start"), [("balanced", "| balanced accuracy |"), ("rarest_third", "| rarest third |")]
)
def test_accuracies_by_imbalance(metric: str, start: str) -> None:
    factors = (*(1, 3, 10, 30, 100), "as it is")
    for name, stated in cells("evidence.md", start):
        found = [row("experiment_growth", part="quality", method=name, imbalance_factor=factor) for factor in factors]
        assert stated == [score(of, metric) for of in found], name


def test_steps_by_number_of_classes() -> None:
    plain = {"cross-entropy": "F.cross_entropy", "combined": "PyTorch operations"}
    for name, stated in table("evidence.md", "| loss, classes |"):
        loss, classes = name.split(", ")
        where = {"part": "speed", "loss": loss, "classes": classes.replace(",", "")}
        implementations = (plain[loss], "longtail.cross_entropy, in place", "longtail.linear_cross_entropy")
        found = [row("experiment_growth", implementation=ours, **where) for ours in implementations]
        times = [float(of[column]) for column in ("step_ms", "kept_step_ms") for of in found]
        check(name, stated, [*times, *(round(float(of["peak_extra_MB"])) for of in found)])


def test_perplexities_of_the_tokens() -> None:
    rows = results.read(results.FOLDER / "experiment_tokens.csv")
    shown = [r for i, r in enumerate(rows) if not i or r["objective"] != "cross-entropy"]
    for (name, stated), measured in zip(table("evidence.md", "| objective | overall |"), shown, strict=True):
        assert name == measured["objective"] or "log-priors" in name + measured["evaluated"]
        check(name, stated, [measured[f"perplexity_{group}"] for group in ("overall", "head", "mid", "tail")])
