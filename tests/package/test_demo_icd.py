"""The demo on diagnoses: what it measures, trains, prints, draws and says; on a small corpus but for one run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from longtail.__main__ import main
from longtail.experiments import demo_icd, demo_icd_cost, demo_icd_picture, demo_icd_report, methods
from longtail.experiments.demo_parts import LossTime
from longtail.experiments.texts import corpus, training
from longtail.experiments.texts.features import NGrams
from longtail.training import LongTailScores

LETTERS = "abcdef"
SIZES = (40, 30, 12, 6, 3, 1)


def small_corpus() -> corpus.Corpus:
    """Classes of a first letter, in two branches."""
    each = [(letter, i) for letter, size in zip(LETTERS, SIZES, strict=True) for i in range(size)]
    labelled = ((f"{letter}word number{i}", letter, f"{letter}{i}") for letter, i in each)
    return corpus.one_label(labelled, "made up", lambda label: ("early" if label < "c" else "late",))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small corpus, trained in this process."""
    setting = training.SETTINGS["icd"]._replace(load=small_corpus, ngrams=(NGrams("word", 1, 1, 64),), batch_size=16)
    monkeypatch.setitem(training.SETTINGS, "icd", setting)
    monkeypatch.setattr(demo_icd, "JOBS", 1)
    monkeypatch.setattr(demo_icd_cost, "TIMED_ROUNDS", 2)
    training.load.cache_clear()
    yield
    training.load.cache_clear()


@pytest.mark.usefixtures("small")
def test_the_demo_reports_draws_and_says_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    main(["demo", "--seeds", "2", "--epochs", "1", "--output", str(tmp_path / "a.png")])
    printed = capsys.readouterr()
    assert "100%" in printed.err
    rows = [line for line in printed.out.splitlines() if len(re.findall(r"\d±\d", line)) >= 3]
    assert len(rows) == len(demo_icd.LOSSES)
    for row, method in zip(rows, demo_icd.LOSSES.values(), strict=True):
        assert row.split("  ")[0].strip() == method.family
    assert "2 seeds, ± is the standard deviation" in printed.out
    assert "many: the 0 categories with more than 100" in printed.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    end = " ".join(printed.out[printed.out.index("Picture: ") :].split())
    assert "balanced accuracy" in end
    assert end.endswith("times as fast as plain PyTorch.")


def test_the_real_data_have_as_many_categories_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("simple_icd_10_cm")
    texts = demo_icd.load(demo_icd.Plan(["cross-entropy"], seeds=1))
    assert len(texts.corpus.classes) == 1918
    assert int(texts.counts[0].min()) >= 1
    assert int(texts.counts[0].sum() + texts.tested[0].sum()) == len(texts.corpus.texts)
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "1,918 categories" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("loss", demo_icd.LOSSES)
def test_fused_and_plain_loss_agree(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_icd_cost, "TIMED_ROUNDS", 2)
    found, counts = small_corpus(), torch.tensor(SIZES)
    cost = demo_icd_cost.measure(demo_icd.LOSSES[loss], found.paths, counts, found.target)
    assert min(cost.time) > 0
    assert cost.fused_bytes is cost.plain_bytes is None  # too few logits


def test_the_largest_tensors_alone_are_measured() -> None:
    """A gradient is a page fault for each of its pages, at least."""
    logits, target = torch.randn(1024, 512), torch.zeros(1024, dtype=torch.int64)
    loss = demo_icd_cost.plain_loss(demo_icd.LOSSES["cross-entropy"], None, torch.ones(512))
    found = demo_icd_cost.peak_bytes(loss, logits, target)
    assert found is None or found >= logits.nbytes  # None: not Linux
    assert demo_icd_cost.peak_bytes(loss, logits[:8].detach().clone(), target[:8]) is None


def test_a_fused_loss_that_differs_stops_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_icd_cost, "plain_loss", lambda *_: lambda logits, target: logits[:, target[0]].mean())
    with pytest.raises(AssertionError):
        demo_icd_cost.measure(demo_icd.LOSSES["cross-entropy"], None, torch.tensor(SIZES), torch.arange(6))


def test_a_method_without_a_plain_form_is_no_cross_entropy() -> None:
    for method in (methods.SEESAW, methods.POLY, methods.softmax_focal(1.0)):
        with pytest.raises(ValueError, match=f"no plain form of {method.name} is known"):
            demo_icd_cost.plain_loss(method, None, torch.ones(3))


def test_a_tree_of_unequal_paths_has_no_plain_form() -> None:
    with pytest.raises(ValueError, match="got paths of lengths 2 to 3, expected one length"):
        demo_icd_cost.plain_loss(methods.HIERARCHICAL, [("a", "b"), ("a", "c", "d")], torch.ones(2))


@pytest.mark.parametrize(("epochs", "said"), [(1, "without weights"), (2, "without weights"), (5, "after 4 epochs;")])
def test_the_legend_says_when_ldam_is_re_weighted(epochs: int, said: str) -> None:
    assert said in demo_icd_report.hyperparameters(epochs)
    schedule = methods.drw_start(epochs)
    assert (schedule < epochs) == ("after" in said)


def test_a_process_that_the_system_ends_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> None:
        raise ChildProcessError("the system has ended a process")

    monkeypatch.setattr(demo_icd_report, "run_with_progress", run)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--output", str(tmp_path / "a.png")])
    assert left.value.code == 2
    assert capsys.readouterr().err == "longtail demo: error: the system has ended a process\n"
    assert not list(tmp_path.iterdir())


def stopped(after: float, done: float, _: str) -> None:
    if done >= after:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("small")
def test_an_interrupt_keeps_the_seeds_that_every_loss_has_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = demo_icd.Plan(["cross-entropy", "ldam-drw"], seeds=3, epochs=1)
    texts = demo_icd.load(plan)
    whole = demo_icd.run(plan, texts, lambda *_: None)
    found = demo_icd.run(plan, texts, functools.partial(stopped, 2 + 5))
    assert [len(result.scores) for result in found] == [2, 2]
    for result, other in zip(found, whole, strict=True):
        assert [s.overall for s in result.scores] == [s.overall for s in other.scores[:2]]
    with pytest.raises(KeyboardInterrupt):
        demo_icd.run(plan, texts, functools.partial(stopped, 2 + 1))
    monkeypatch.setattr(demo_icd_report, "run_with_progress", lambda *_: found)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--seeds", "3", "--loss", *plan.losses, "--output", str(tmp_path / "a.png")])
    assert left.value.code == 130
    printed = capsys.readouterr()
    assert "; 2 seeds, ± is the standard deviation" in printed.out
    assert "times as fast" in " ".join(printed.out.split())
    assert printed.err == "longtail demo: interrupted: the table is of 2 of 3 seeds, no picture drawn\n"
    assert not list(tmp_path.iterdir())


def result(loss: str, *scores: tuple[float, float], ratio: float = 2.0) -> demo_icd.Result:
    """Of (balanced, few) accuracies, one a seed."""
    of_seeds: list[Any] = [SimpleNamespace(balanced=balanced, few=few) for balanced, few in scores]
    return demo_icd.Result(loss, of_seeds, demo_icd_cost.Cost(LossTime(1.0, ratio), None, None))


NAN = float("nan")


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            [result("cross-entropy", (0.7, 0.6), (0.72, 0.6)), result("ldam-drw", (0.74, 0.605), (0.74, 0.605))],
            "The highest balanced accuracy was that of LDAM-DRW (74.0 %), 3.0 points above cross-entropy, more than "
            "the spread over the seeds (1.4). The highest few-shot accuracy was that of LDAM-DRW (60.5 %), 0.5 points "
            "above cross-entropy, more than the spread over the seeds (0.0). The fused losses were 2.0 times as fast",
        ),
        (
            [result("cross-entropy", (0.7, 0.6), (0.74, 0.7)), result("ldam-drw", (0.73, 0.6), (0.73, 0.6), ratio=0.9)],
            "The highest balanced accuracy was that of LDAM-DRW (73.0 %), 1.0 points above cross-entropy, not more "
            "than the spread over the seeds (2.8). No loss had a higher few-shot accuracy than cross-entropy (65.0 %). "
            "The fused losses were 0.9 to 2.0 times as fast",
        ),
        (
            [result("cross-entropy", (0.7, NAN)), result("ldam-drw", (0.74, NAN))],
            "The highest balanced accuracy was that of LDAM-DRW (74.0 %), 4.0 points above cross-entropy, in a single "
            "seed. The fused losses",
        ),
        (
            [result("logit-adjustment", (0.7, 0.6)), result("ldam-drw", (0.6, 0.7))],
            "The highest balanced accuracy was that of logit adjustment (70.0 %). The highest few-shot accuracy was "
            "that of LDAM-DRW (70.0 %). The fused losses",
        ),
        ([result("ldam-drw", (0.7, 0.6))], "The fused loss was 2.0 times as fast as plain PyTorch."),
    ],
)
def test_the_closing_words_follow_from_the_figures(results: list[demo_icd.Result], said: str) -> None:
    assert demo_icd_report.in_words(results).startswith(said)


def test_curves_are_means_of_classes_nearby() -> None:
    counts, octaves = torch.tensor([1, 1, 1024, 1024, 8]), torch.tensor([0.0, 10.0])
    mean, error = demo_icd_picture.smoothed(torch.tensor([0.2, 0.6, 1.0, 1.0, NAN]), counts, octaves)
    torch.testing.assert_close(mean, torch.tensor([0.4, 1.0], dtype=torch.float64))
    torch.testing.assert_close(error, torch.tensor([0.2 * 0.5**0.5, 0.0], dtype=torch.float64))
    even = torch.arange(1, 65)
    mean, _ = demo_icd_picture.smoothed(even.log2() / 6, even, torch.tensor([3.0]))
    assert 0.45 < mean < 0.55


def test_bands_are_the_spread_over_the_seeds_or_the_error_of_one() -> None:
    counts, octaves = [torch.ones(2, dtype=torch.int64)] * 2, torch.zeros(1)
    seeds = [LongTailScores(0, 0, torch.tensor(x), 0, 0, 0) for x in ([0.2, 0.6], [0.5, 0.7])]
    cost = demo_icd_cost.Cost(LossTime(1.0, 1.0), None, None)
    mean, half = demo_icd_picture.curve(demo_icd.Result("ldam-drw", seeds, cost), counts, octaves)
    assert (mean.item(), half.item()) == pytest.approx((50.0, 200**0.5))
    mean, half = demo_icd_picture.curve(demo_icd.Result("ldam-drw", seeds[:1], cost), counts[:1], octaves)
    assert (mean.item(), half.item()) == pytest.approx((40.0, 20 * 0.5**0.5))
