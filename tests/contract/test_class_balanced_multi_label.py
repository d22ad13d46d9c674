"""Promise: class-balanced losses of several labels a row, by column or by row, are those of their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from allocations import peak_while
from longtail.class_balance import row_weights as chunked
from tolerances import assert_same

SAMPLES = [900, 250, 60, 12, 3]
BETA = 0.99
MODES = ("column", "row_mean", "row_max")
SHAPES = [(12, 5), (3, 5, 2, 4)]


def case(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which the first row has no label, the second one with weight alone."""
    g = cases.generator(seed)
    y = torch.rand(shape, generator=g, dtype=torch.float64)
    if kind == "hard":
        y = (y < 0.4).double()
    y[0], y[1, 2:] = 0, 0
    y[1, 0] = 1
    return 3 * torch.randn(shape, generator=g, dtype=torch.float64), y


def weights_by_hand(y: Tensor, mode: str, w: list[float]) -> Tensor:
    """Weights of the elements [N, C] of targets [N, C], row by row; NaN is no label."""
    found = []
    for row in y.tolist():
        labels = [(t, c) for t, c in zip(row, w, strict=True) if t > 0]
        each = [min(w)] * len(w)
        if mode == "column":
            each = w
        elif labels and mode == "row_mean":
            each = [sum(t * c for t, c in labels) / sum(t for t, _ in labels)] * len(w)
        elif labels:
            each = [max(t * c for t, c in labels) / max(t for t, _ in labels)] * len(w)
        found.append(each)
    return torch.tensor(found, dtype=torch.float64)


def by_hand(z: Tensor, y: Tensor, mode: str, gamma: float, ignored: Tensor) -> Tensor:
    """Row losses [N] of logits and targets [N, C]."""
    n = torch.tensor(SAMPLES, dtype=torch.float64)
    w = (1 - BETA) / (1 - BETA**n)
    w = w * len(SAMPLES) / w.sum()
    y, z = y.masked_fill(ignored, 0), z.masked_fill(ignored, 0)
    p = torch.sigmoid(z)
    miss = y * (1 - p) + (1 - y) * p
    loss = miss**gamma * -(y * p.log() + (1 - y) * (1 - p).log())
    return (weights_by_hand(y, mode, w.tolist()) * loss).masked_fill(ignored, 0).sum(1)


def flat(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], mode: str, kind: str) -> None:
    z, y = case(shape, kind)
    y[2, 1], y[3 % len(y), :] = -1, -1
    z[2, 1] = torch.nan  # ignored, as all of a row is
    rows = y[:, 0].numel()
    v = torch.rand(y[:, 0].shape, generator=cases.generator(2), dtype=torch.float64)
    for loss, gamma in (("sigmoid", 0.0), ("focal", 1.5)):
        for reduction, up in (("none", torch.randn(rows, dtype=torch.float64)), ("mean", torch.tensor(0.7).double())):
            x, truth_x = (z.clone().requires_grad_() for _ in range(2))
            actual = longtail.class_balanced_loss(
                *(x, y, SAMPLES, BETA, loss, gamma), multi_label=mode, reduction=reduction, ignore_index=-1,
                sample_weight=v,
            )  # fmt: skip
            truth = by_hand(flat(truth_x), flat(y), mode, gamma, flat(y) == -1) * v.flatten()
            truth = truth if reduction == "none" else truth.sum() / rows
            torch.testing.assert_close(actual.flatten(), truth.reshape(-1), rtol=1e-6, atol=1e-7)  # weights: float32
            grads = [
                torch.autograd.grad(one, of, up.reshape(one.shape))[0] for one, of in ((actual, x), (truth, truth_x))
            ]
            torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    up = torch.ones(()).double().expand(actual.shape)
    (grad,) = torch.autograd.grad(
        longtail.class_balanced_loss(x, y, SAMPLES, BETA, multi_label=mode, loss="sigmoid", ignore_index=-1), x, up
    )
    assert (grad[y == -1] == 0).all()


@pytest.mark.parametrize("loss", ["sigmoid", "focal"])
def test_one_label_a_row_is_the_papers_loss(loss: str) -> None:
    """Class indices, and rows with one label weighted by it."""
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    z = torch.randn(6, 5, generator=cases.generator(1))
    y = torch.nn.functional.one_hot(target, 5)
    for gradient in ("backward", "forward"):
        x = [z.clone().requires_grad_() for _ in range(3)]
        found = [
            longtail.class_balanced_loss(x[0], target, SAMPLES, BETA, loss, gradient=gradient),
            longtail.class_balanced_loss(x[1], y, SAMPLES, BETA, loss, multi_label="row_mean", gradient=gradient),
            longtail.class_balanced_loss(x[2], y.bool(), SAMPLES, BETA, loss, multi_label="row_max", gradient=gradient),
        ]
        grads = [torch.autograd.grad(3 * one, of)[0] for one, of in zip(found, x, strict=True)]
        for one, grad in zip(found[1:], grads[1:], strict=True):
            torch.testing.assert_close(one, found[0])
            torch.testing.assert_close(grad, grads[0])
    for mode in MODES:
        named = longtail.class_balanced_loss(z, target, SAMPLES, BETA, loss, multi_label=mode)
        assert_same(named, longtail.class_balanced_loss(z, target, SAMPLES, BETA, loss))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_beta_zero_is_the_unweighted_loss(dtype: torch.dtype, mode: str) -> None:
    """Bit for bit, of rows without labels, of infinite logits and large margins too."""
    z, y = case((12, 5), "soft")
    y[2:8] = (y[2:8] > 0.5).double()
    z[3], z[4], z[5, 0] = 1e4, -100.0, -torch.inf
    z, y = z.to(dtype), y.to(dtype)
    actual = longtail.class_balanced_loss(z, y, SAMPLES, 0.0, "focal", multi_label=mode, reduction="none")
    assert_same(actual, longtail.sigmoid_focal_loss(z, y, None, 2.0, "rows"))
    assert longtail.class_balanced_loss(z[:0], y[:0], SAMPLES, 0.9, "focal", multi_label=mode).item() == 0.0
    one = longtail.class_balanced_loss(z[:, 0], y[:, 0], [7], 0.9, "focal", multi_label=mode, reduction="none")
    assert_same(one, longtail.sigmoid_focal_loss(z[:, 0], y[:, 0], None, 2.0, "rows"))


@pytest.mark.parametrize("mode", MODES)
def test_the_module(mode: str) -> None:
    z, y = (x.float() for x in case((12, 5), "hard"))
    module = longtail.ClassBalancedLoss(SAMPLES, BETA, "focal", multi_label=mode)
    expected = longtail.class_balanced_loss(z, y, SAMPLES, BETA, "focal", multi_label=mode)
    assert_same(module(z, y), expected)
    assert_same(longtail.ClassBalancedLoss(SAMPLES, BETA, "focal")(z, y, multi_label=mode), expected)
    if mode != "column":
        with pytest.raises(TypeError, match="multi_label"):
            module.loss = "softmax"
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, y), expected)


@pytest.mark.parametrize("mode", ["row_mean", "row_max"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 4)], ids=str)
def test_chunks_change_nothing(shape: tuple[int, ...], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, y = case(shape, "soft")
    y[1, 3] = -0.0004  # a rounding of 0
    weight = torch.tensor([0.1, 0.5, 0.0, 3.0, 2.0], dtype=torch.float64)
    truth = chunked.row_weights(y, weight, mode)
    assert (truth[0] == 0.1).all(), "the least positive weight"
    assert (truth[1] < 0.6).all()
    for chunk in (1, 6, 30, 100):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        torch.testing.assert_close(chunked.row_weights(y, weight, mode), truth, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(4000, 500), (2, 20, 20_000)], ids=str)
def test_row_weights_in_memory_of_the_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 10_000)
    y = torch.zeros(shape, dtype=torch.bool)
    rows = 4 * y[:, 0].numel()
    peak, _ = peak_while(lambda: chunked.row_weights(y, torch.ones(shape[1]), "row_max", -1))
    assert peak < 300_000 + 8 * rows


def wrong(**options: Any) -> Tensor:
    arguments = {"input": torch.zeros(2, 5), "target": torch.zeros(2, 5), "samples_per_class": SAMPLES, "beta": 0.9}
    return longtail.class_balanced_loss(**{**arguments, "loss": "focal", "multi_label": "row_max", **options})


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"multi_label": "rows"}, ValueError, "multi_label is 'rows', expected one of 'column', 'row_mean', 'row_max'"),
        ({"loss": "softmax"}, TypeError, r"class_balanced_loss\(\) got an .* 'multi_label' with loss='softmax'"),
        ({"loss": "softmax_focal", "multi_label": "column"}, ValueError, 'several labels a row, loss="sigmoid" or'),
        ({"samples_per_class": [1, 2]}, ValueError, r"weight has shape \[2\], expected \[5\]"),
        ({"sample_weight": torch.ones(1)}, ValueError, r"sample_weight has shape \[1\], expected \[2\]"),
        ({"sample_weight": torch.ones(2, requires_grad=True)}, ValueError, "sample_weight requires grad"),
        ({"target": torch.zeros(2, 5, requires_grad=True)}, ValueError, "target requires grad"),
        ({"target": torch.zeros(2, 5, dtype=torch.complex64)}, TypeError, r"target has dtype torch\.complex64"),
        ({"target": torch.full((2, 5), 255)}, ValueError, r"target 255 at index \[0, 0\] is out of bounds"),
        ({"ignore_index": "none"}, TypeError, "ignore_index is a str, expected an int or None"),
        ({"reduction": "rows"}, ValueError, "reduction is 'rows', expected one of"),
    ],
)
def test_what_is_refused(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        wrong(**options)
