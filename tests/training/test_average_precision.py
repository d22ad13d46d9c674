"""Mean average precision by class frequency is its definition; with and without torchmetrics it is one and the same."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longtail
from accuracies import without_torchmetrics
from longtail.training import LongTailAveragePrecisions
from longtail.training import average_precision as module

SAMPLES = [500, 101, 100, 20, 19, 1]
NAME = "LongTailMeanAveragePrecision"

pytestmark = pytest.mark.filterwarnings("ignore:.*was called before the ``update`` method")


@pytest.fixture(params=["torchmetrics", "plain"])
def metric_class(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "plain":
        with without_torchmetrics(name=NAME) as made:
            yield made
        return
    torchmetrics = pytest.importorskip("torchmetrics")
    assert issubclass(longtail.training.LongTailMeanAveragePrecision, torchmetrics.Metric)
    yield longtail.training.LongTailMeanAveragePrecision


def data(rows: int = 90, kept: int = 6) -> tuple[Tensor, Tensor]:
    """Logits, of which many are equal, and multi-hot targets, positive in the first ``kept`` classes alone."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(rows, 6, generator=generator) < torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    target[:, kept:] = False
    logits = torch.randn(rows, 6, generator=generator) + target
    return (4 * logits).round() / 4, target


def defined(scores: list[float], target: list[int]) -> float:
    """sum (R_n - R_(n-1)) P_n over the distinct scores; NaN without positives."""
    positives, total, recall = sum(t == 1 for t in target), 0.0, 0.0
    if positives == 0:
        return math.nan
    for threshold in sorted(set(scores), reverse=True):
        predicted = [t for score, t in zip(scores, target, strict=True) if score >= threshold]
        hits = sum(t == 1 for t in predicted)
        total += (hits / positives - recall) * hits / len(predicted)
        recall = hits / positives
    return total


def expected(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> LongTailAveragePrecisions:
    per_class = []
    for scores, labels in zip(logits.T.tolist(), target.T.tolist(), strict=True):
        pairs = [(s, int(t)) for s, t in zip(scores, labels, strict=True) if ignore_index is None or t != ignore_index]
        per_class.append(defined(*map(list, zip(*pairs, strict=True))) if pairs else math.nan)
    known = torch.tensor(per_class, dtype=torch.float64)
    parts = (known, known[:2], known[2:4], known[4:])
    mean, *groups = (part[~part.isnan()].mean().item() for part in parts)
    return LongTailAveragePrecisions(mean, known, *groups)


def assert_scores(actual: Any, wanted: LongTailAveragePrecisions) -> None:
    assert isinstance(actual, LongTailAveragePrecisions)
    for name, one in actual._asdict().items():
        got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (one, getattr(wanted, name)))
        torch.testing.assert_close(
            got, want, rtol=1e-12, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("kept", [6, 4, 0])
def test_the_definition_in_batches(metric_class: Any, kept: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metric_class.compute.__globals__, "CHUNK", chunk)
    logits, target = data(kept=kept)
    assert len(logits.unique()) < 30
    metric = metric_class(SAMPLES)
    for batch in zip(logits.split(40), target.split(40), strict=True):
        metric.update(*batch)
    assert_scores(metric.compute(), expected(logits, target))
    assert_scores(metric.compute(reduce=False), expected(logits, target))
    metric.reset()
    assert all(math.isnan(x) for x in (metric.compute().mean, metric.compute().few))
    metric.update(logits[:20], target[:20])
    assert_scores(metric.compute(), expected(logits[:20], target[:20]))


def test_torchmetrics_and_scikit_learn() -> None:
    logits, target = data()
    scores = longtail.training.LongTailMeanAveragePrecision(SAMPLES)(logits.sigmoid(), target)
    theirs = pytest.importorskip("torchmetrics").classification.MultilabelAveragePrecision(6, average=None)
    torch.testing.assert_close(scores.per_class, theirs(logits.sigmoid(), target.int()).double(), rtol=1e-5, atol=0)
    metrics = pytest.importorskip("sklearn.metrics")
    of_sklearn = metrics.average_precision_score(target.numpy(), logits.numpy(), average=None)
    torch.testing.assert_close(scores.per_class, torch.from_numpy(of_sklearn), rtol=1e-12, atol=0)
    assert scores.mean == pytest.approx(metrics.average_precision_score(target.numpy(), logits.numpy()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_targets(metric_class: Any, dtype: torch.dtype) -> None:
    logits, target = data()
    assert_scores(metric_class(SAMPLES)(logits, target.to(dtype)), expected(logits, target))
    if dtype in (torch.bool, torch.uint8):
        return
    known = target.to(dtype)
    known[::3, 1], known[40:, 4], known[:, 5] = -7, -7, -7
    logits[0, 1] = math.nan  # of an element that does not count
    scores = metric_class(SAMPLES, ignore_index=-7)(logits, known)
    assert_scores(scores, expected(logits, known, -7))
    assert scores.per_class.isnan().tolist() == [False] * 5 + [True]


def test_extreme_scores(metric_class: Any) -> None:
    inf = math.inf
    scores = torch.tensor([[inf, -inf, 0.0], [inf, -inf, -0.0], [1e30, -inf, 0.0], [-inf, -1e30, -0.0]])
    target = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]])
    assert metric_class([200, 50, 3])(scores, target).per_class.tolist() == [0.5 * 0.5 + 0.5 * 0.5, 0.5, 0.5]
    assert metric_class([5])(torch.tensor([[0.1]]), torch.tensor([[1]])).per_class.tolist() == [1.0]
    empty = metric_class([5, 5])(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool))
    assert empty.per_class.isnan().all()


def test_scores_are_kept_in_a_dtype(metric_class: Any) -> None:
    """Numbers that it rounds to the same are equal."""
    close = torch.tensor([[1.0], [1.0 + 2**-40], [0.0]], dtype=torch.float64)
    target = torch.tensor([[False], [True], [False]])
    for dtype, value in ((torch.float64, 1.0), (torch.float32, 0.5), (torch.float16, 0.5), (torch.bfloat16, 0.5)):
        metric = metric_class([5], dtype=dtype)
        assert metric(close, target).mean == value
        assert {x.dtype for x in metric.preds} == {dtype}
    logits, target = data()
    rounded = logits.to(torch.float16)[:, ::2]
    of_strides = metric_class([5, 5, 5])(rounded, target[:, ::2]).per_class
    torch.testing.assert_close(of_strides, expected(logits, target).per_class[::2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mean", "many", "medium", "few"])
def test_one_score(metric_class: Any, name: str) -> None:
    metric, batch = metric_class(SAMPLES, score=name), data()
    assert metric(*batch).shape == ()
    for found in (metric.compute(), metric.compute(reduce=True)):
        assert found.item() == pytest.approx(getattr(expected(*batch), name), rel=1e-6)


def test_calls_return_the_scores_of_their_batch(metric_class: Any) -> None:
    logits, target = data()
    logits.requires_grad_()
    metric = metric_class(SAMPLES)
    for batch in zip(logits.split(45), target.split(45), strict=True):
        assert_scores(metric(*batch), expected(*batch))
    assert_scores(metric.compute(), expected(logits, target))
    assert not metric.preds[0].requires_grad


def test_state_dict_copies_and_devices(metric_class: Any) -> None:
    logits, target = data()
    model, other = (nn.ModuleDict({"head": nn.Linear(2, 6), NAME: metric_class(SAMPLES)}) for _ in range(2))
    metric = model[NAME]
    metric.update(logits[:50], target[:50])
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    metric.persistent(True)
    saved = model.state_dict()
    assert set(saved) == {"head.weight", "head.bias", f"{NAME}.preds", f"{NAME}.target"}
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    other[NAME].update(logits[50:], target[50:])
    assert_scores(other[NAME].compute(), expected(logits, target))
    assert len(saved[f"{NAME}.preds"]) == len(before[f"{NAME}.preds"]) == 1
    for again in (copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        again.update(logits[50:], target[50:])
        assert_scores(again.compute(), expected(logits, target))
        assert_scores(metric.compute(), expected(logits[:50], target[:50]))
    assert list(metric.buffers()) == []
    model.half()
    assert (metric.preds[0].dtype, metric.target[0].dtype) == (torch.float32, torch.int8)
    model.to("meta")
    assert {metric.device.type, metric.preds[0].device.type, metric.target[0].device.type} == {"meta"}


@pytest.mark.parametrize(
    ("preds", "target", "exception", "message"),
    [
        ([[0.5, 0.5]], torch.ones(1, 2), TypeError, "preds is a list, expected a Tensor"),
        (torch.ones(1, 3), torch.ones(1, 3), ValueError, r"preds has shape \[1, 3\], expected \[N, 2\]"),
        (torch.ones(2), torch.ones(2), ValueError, r"preds has shape \[2\], expected \[N, 2\]"),
        (torch.ones(2, 2), torch.tensor([0, 1]), ValueError, r"target has shape \[2\], expected \[N, 2\]"),
        (torch.ones(2, 2), torch.ones(1, 2), ValueError, r"target has shape \[1, 2\], expected \[2, 2\] as preds"),
        (torch.ones(1, 2).int(), torch.ones(1, 2), TypeError, r"preds has dtype torch\.int32, expected floating point"),
        (torch.ones(1, 2), torch.ones(1, 2) * 1j, TypeError, r"target has dtype torch\.complex64, expected bool"),
        (torch.ones(1, 2), torch.tensor([[1, 2]]), ValueError, r"target\[0, 1\] is 2, expected 0, 1 or ignore_"),
        (torch.ones(1, 2), torch.tensor([[0.5, 0]]), ValueError, r"target\[0, 0\] is 0\.5, expected 0, 1 or"),
        (torch.ones(1, 2), torch.tensor([[math.nan, 0]]), ValueError, r"target\[0, 0\] is nan, expected 0, 1 or"),
        (torch.tensor([[1.0, math.nan]]), torch.ones(1, 2), ValueError, r"preds\[0, 1\] is nan, expected a number"),
        (torch.ones(1, 2, device="meta"), torch.ones(1, 2), ValueError, "preds is on meta, expected cpu as the target"),
    ],
)  # fmt: skip
def test_wrong_batches(metric_class: Any, preds: Any, target: Any, exception: Any, message: str) -> None:
    metric = metric_class([5, 5], ignore_index=-1)
    with pytest.raises(exception, match=message):
        metric.update(preds, target)
    assert metric.preds == metric.target == []


def test_wrong_arguments(metric_class: Any) -> None:
    with pytest.raises(ValueError, match="score is 'overall', expected one of 'mean', 'many', 'medium', 'few'"):
        metric_class([5, 5], score="overall")
    with pytest.raises(ValueError, match=r"dtype is torch\.int64, expected one of torch\.float32, "):
        metric_class([5, 5], dtype=torch.int64)
    with pytest.raises(ValueError, match="few is 6, expected at most many = 5"):
        metric_class([5, 5], many=5, few=6)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is -1, expected 0 or 1$"):
        metric_class([5]).update(torch.ones(1, 1), torch.tensor([[-1]]))


def test_collections_share_one_state() -> None:
    collection = pytest.importorskip("torchmetrics").MetricCollection
    metrics = collection(
        {name: longtail.training.LongTailMeanAveragePrecision(SAMPLES, score=name) for name in ("mean", "few")}
    )
    logits, target = data()
    for batch in zip(logits.split(30), target.split(30), strict=True):
        metrics.update(*batch)
    assert len(metrics.compute_groups) == 1
    wanted = {name: getattr(expected(logits, target), name) for name in ("mean", "few")}
    assert {name: x.item() for name, x in metrics.compute().items()} == pytest.approx(wanted)
    metrics.reset()
    assert math.isnan(metrics["few"].compute().item())


def test_a_rank_without_rows_takes_part_in_torchmetrics_synchronisation() -> None:
    pytest.importorskip("torchmetrics")
    logits, target = data()
    others = {torch.float16: logits.half(), torch.int8: target.to(torch.int8)}

    def gather(state: Tensor, group: Any) -> list[Tensor]:  # noqa: ARG001
        assert state.shape[1:] == (6,)
        return [state, others[state.dtype]]

    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    metric = longtail.training.LongTailMeanAveragePrecision(SAMPLES, dtype=torch.float16, **options)
    assert_scores(metric.compute(), expected(logits, target))
    assert metric.preds == []
    metric.sync(dist_sync_fn=gather)
    with pytest.raises(RuntimeError, match=r"expected unsync\(\) before reduce="):
        metric.compute(reduce=True)


def test_memory_is_the_promised(metric_class: Any) -> None:
    metric = metric_class(SAMPLES)
    metric.update(*data())
    kept = [*metric.preds, *metric.target]
    assert sum(x.untyped_storage().nbytes() for x in kept) == 5 * 90 * 6
    assert module.CHUNK == 1 << 20
