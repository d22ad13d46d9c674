"""Accuracy by class frequency equals a plain count; with and without torchmetrics it is one and the same thing."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longtail
from accuracies import without_torchmetrics
from longtail.training import LongTailScores

SAMPLES = [500, 101, 100, 20, 19, 1]

pytestmark = pytest.mark.filterwarnings("ignore:.*was called before the ``update`` method")


@pytest.fixture(params=["torchmetrics", "plain"])
def accuracy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The class."""
    if request.param == "plain":
        with without_torchmetrics() as made:
            yield made
        return
    torchmetrics = pytest.importorskip("torchmetrics")
    assert issubclass(longtail.training.LongTailAccuracy, torchmetrics.Metric)
    yield longtail.training.LongTailAccuracy


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets; some rows do not count."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(6, (300,), generator=generator)
    target[::17] = -100
    logits = torch.randn(300, 6, generator=generator) + 2 * nn.functional.one_hot(target.clamp(min=0), 6)
    yield from zip(logits.split(128), target.split(128), strict=True)


def counted(logits: Tensor, target: Tensor) -> LongTailScores:
    """The scores, counted one by one."""
    hits: dict[int, list[bool]] = {}
    for row, g in zip(logits, target.tolist(), strict=True):
        if g != -100:
            hits.setdefault(g, []).append(row.tolist().index(max(row.tolist())) == g)
    share = [sum(hits[c]) / len(hits[c]) for c in range(6)]
    flat = [hit for of_class in hits.values() for hit in of_class]
    groups = [sum(part) / 2 for part in (share[:2], share[2:4], share[4:])]
    return LongTailScores(sum(flat) / len(flat), sum(share) / 6, torch.tensor(share, dtype=torch.float64), *groups)


def assert_scores(actual: Any, expected: LongTailScores) -> None:
    assert isinstance(actual, LongTailScores)
    for name, one in actual._asdict().items():
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(getattr(expected, name)), equal_nan=True)


KINDS = {
    "logits": lambda logits, _: logits,
    "labels": lambda logits, _: logits.argmax(1),
    "correct": lambda logits, target: logits.argmax(1) == target,
    "statistics": lambda logits, target: longtail.cross_entropy(logits, target, return_stats=True)[1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_plain_count(accuracy: Any, kind: str) -> None:
    metric = accuracy(SAMPLES)
    for logits, target in batches():
        metric.update(KINDS[kind](logits, target), target)
    logits, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert_scores(metric.compute(), counted(logits, target))
    assert 0.2 < metric.compute().overall < 0.95


def test_images_and_single_samples(accuracy: Any) -> None:
    logits, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    pixels, expected = accuracy(SAMPLES), counted(logits, target)
    pixels.update(logits.view(3, 10, 10, 6).permute(0, 3, 1, 2), target.view(3, 10, 10))
    assert_scores(pixels.compute(), expected)
    one_by_one = accuracy(SAMPLES)
    for row, g in zip(logits[:20], target[:20], strict=True):
        one_by_one.update(row, g)
    assert one_by_one.compute().overall == accuracy(SAMPLES)(logits[:20], target[:20]).overall


def test_a_call_returns_the_scores_of_its_batch(accuracy: Any) -> None:
    metric = accuracy(SAMPLES)
    for logits, target in batches():
        assert metric(logits, target).overall == counted_share(logits, target)
    logits, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert_scores(metric.compute(), counted(logits, target))
    metric.reset()
    assert math.isnan(metric.compute().overall)


def counted_share(logits: Tensor, target: Tensor) -> float:
    kept = target != -100
    return (logits.argmax(1) == target)[kept].double().mean().item()


def test_logits_without_a_largest_predict_nothing(accuracy: Any) -> None:
    metric = accuracy([5, 5])
    metric.update(torch.tensor([[0.0, math.nan], [math.nan, 0.0], [1.0, 1.0], [1.0, 1.0]]), torch.tensor([1, 0, 0, 1]))
    assert metric.compute().per_class.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("name", ["overall", "balanced", "many", "medium", "few"])
def test_one_score(accuracy: Any, name: str) -> None:
    whole, metric = accuracy(SAMPLES), accuracy(SAMPLES, score=name)
    for logits, target in batches():
        whole.update(logits, target)
        assert metric(logits, target).shape == ()
    assert metric.compute().item() == pytest.approx(getattr(whole.compute(), name), rel=1e-6)
    assert metric.compute(reduce=True).item() == metric.compute().item()


def test_empty_groups_and_unseen_classes_are_nan(accuracy: Any) -> None:
    metric = accuracy([50, 50, 50])
    assert all(math.isnan(metric.compute()[i]) for i in (0, 1, 3, 4, 5))
    metric.update(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
    scores = metric.compute()
    assert scores.balanced == scores.medium == 0.75
    assert math.isnan(scores.many)
    assert math.isnan(scores.few)
    assert math.isnan(scores.per_class[1])
    assert math.isnan(accuracy([50], score="few")(torch.tensor([True]), torch.tensor([0])))
    assert accuracy([50])(torch.tensor([True]), torch.tensor([0])).per_class.tolist() == [1.0]


def test_ignored_rows(accuracy: Any) -> None:
    metric = accuracy([5, 5])
    metric.update(torch.tensor([[True, False], [False, True]]), torch.tensor([[0, -100], [1, 1]]))
    assert metric.compute().overall == pytest.approx(2 / 3)
    strict = accuracy([5, 5], ignore_index=None)
    with pytest.raises(IndexError, match=r"targets\[0\] = -100 is out of range"):
        strict.update(torch.tensor([False]), torch.tensor([-100]))
    assert math.isnan(strict.compute().overall)


def test_thresholds(accuracy: Any) -> None:
    metric = accuracy([9, 5, 1], many=5, few=5)
    metric.update(torch.tensor([True, False, True]), torch.tensor([0, 1, 2]))
    assert metric.compute()[3:] == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="few is 6, expected at most many = 5"):
        accuracy([9, 5, 1], many=5, few=6)


def test_state_dict(accuracy: Any) -> None:
    """Holds the states where that is asked for, also within a model; what it does not hold is not missed."""
    model, other = (nn.ModuleDict({"head": nn.Linear(2, 6), "accuracy": accuracy(SAMPLES)}) for _ in range(2))
    for logits, target in batches():
        model["accuracy"].update(logits, target)
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    other.load_state_dict(model.state_dict())
    assert math.isnan(other["accuracy"].compute().overall)
    model["accuracy"].persistent(True)
    saved = model.state_dict()
    assert saved["accuracy.seen"].dtype == torch.int64
    model["accuracy"].update(*next(batches()))
    other.load_state_dict(saved)
    assert set(saved) == {"head.weight", "head.bias", "accuracy.seen", "accuracy.correct"}
    logits, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert_scores(other["accuracy"].compute(), counted(logits, target))


def test_copies_and_devices(accuracy: Any) -> None:
    metric = accuracy(SAMPLES, many=50, score="balanced")
    metric.update(*next(batches()))
    for again in (copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert again.compute() == metric.compute()
        before = metric.compute()
        again.update(*next(batches()))
        assert metric.compute() == before
        assert again.seen.sum() == 2 * metric.seen.sum()
    assert list(metric.buffers()) == []  # which DistributedDataParallel would make rank 0's on every rank
    model = nn.Sequential(metric).half()
    assert (metric.seen.dtype, metric.device.type) == (torch.int64, "cpu")
    model.to("meta")
    assert (metric.seen.device.type, metric.correct.device.type, metric.device.type) == ("meta",) * 3


def test_wrong_arguments(accuracy: Any) -> None:
    with pytest.raises(ValueError, match=r"samples_per_class\[0\] is -1"):
        accuracy([-1])
    for value, message in ((10**400, "an int of 1329 bits"), ("a", "a str")):
        with pytest.raises((TypeError, ValueError), match=f"ignore_index is {message}, expected an int or None"):
            accuracy([5, 5], ignore_index=value)
    with pytest.raises(ValueError, match="score is 'per_class', expected one of 'overall', 'balanced', 'many'"):
        accuracy([5, 5], score="per_class")
    with pytest.raises((TypeError, ValueError), match="thresholds"):
        accuracy([5, 5], thresholds=(20, 100))
    with pytest.raises((TypeError, ValueError), match="sync_on_compute"):
        accuracy([5, 5], sync_on_compute="always")


@pytest.mark.parametrize(
    ("preds", "target", "exception", "message"),
    [
        ([True, False], torch.tensor([0, 1]), TypeError, "preds is a list, expected a Tensor"),
        (torch.ones(2), torch.tensor([0, 1]), ValueError, r"preds are logits of shape \[2\], expected \[2, 2\] for"),
        (torch.ones(1, 3), torch.tensor([0]), ValueError, r"preds are logits of shape \[1, 3\], expected \[1, 2\] for"),
        (torch.ones(1, dtype=torch.complex64), torch.tensor([0]), TypeError, "complex64, expected logits, labels or"),
        (torch.tensor([True, True]), torch.tensor([0]), ValueError, r"preds has shape \[2\] and .*, expected \[1\]"),
        (torch.tensor([True]), torch.tensor([2]), IndexError, r"targets\[0\] = 2 is out of range, expected 0 to 1"),
        (torch.tensor([0]), torch.ones(1, 2), TypeError, r"torch\.float32, expected integers: update\(preds, target\)"),
        (torch.ones(1, 2, device="meta"), torch.tensor([0]), ValueError, "preds is on meta, expected cpu as the"),
    ],
)
def test_wrong_batches(accuracy: Any, preds: Any, target: Tensor, exception: Any, message: str) -> None:
    metric = accuracy([5, 5])
    with pytest.raises(exception, match=message):
        metric.update(preds, target)
    assert (metric.seen.sum(), metric.correct.sum()) == (0, 0)


def test_collections_share_one_state() -> None:
    collection = pytest.importorskip("torchmetrics").MetricCollection
    names = ("overall", "balanced", "few")
    metrics = collection({name: longtail.training.LongTailAccuracy(SAMPLES, score=name) for name in names}, prefix="v_")
    whole = longtail.training.LongTailAccuracy(SAMPLES)
    for logits, target in batches():
        metrics.update(logits, target)
        whole.update(logits, target)
    assert len(metrics.compute_groups) == 1
    expected = {f"v_{name}": getattr(whole.compute(), name) for name in names}
    assert {name: score.item() for name, score in metrics.compute().items()} == pytest.approx(expected)


def test_synchronised_states_are_not_added_up_again() -> None:
    pytest.importorskip("torchmetrics")

    def gather(state: Tensor, group: Any) -> list[Tensor]:  # noqa: ARG001
        return [state, 2 * state]

    metric = longtail.training.LongTailAccuracy(SAMPLES, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(*next(batches()))
    own = metric.seen.sum()
    metric.sync(dist_sync_fn=gather)
    assert metric.seen.sum() == 3 * own
    for reduce in (True, False):
        with pytest.raises(RuntimeError, match=r"expected unsync\(\) before reduce="):
            metric.compute(reduce=reduce)
    metric.unsync()
    assert metric.compute(reduce=True).overall == metric.compute().overall
    assert metric.seen.sum() == own


def test_a_broken_torchmetrics_warns() -> None:
    with pytest.warns(UserWarning, match=r"are no torchmetrics.Metric here: torchmetrics raised AttributeError"):  # noqa: SIM117
        with without_torchmetrics(ModuleType("torchmetrics")) as made:
            assert made([5, 5])(torch.tensor([True]), torch.tensor([0])).overall == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_torchmetrics():
            pass
