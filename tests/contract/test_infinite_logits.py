"""Promise: what nothing counts may be infinite or NaN: padded classes, ignored rows, elements that are surely right."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

BACKENDS = ("cpu", "reference")
C, PADDED = 5, 2  # the last two classes are padding


def soft_targets(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Logits and probabilities in which the padded classes have none; the dimension of the classes."""
    dim = 0 if len(shape) == 1 else 1
    g = cases.generator(3)
    logits, raw = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    y = torch.cat([raw.narrow(dim, 0, C - PADDED).softmax(dim), torch.zeros_like(raw.narrow(dim, 0, PADDED))], dim)
    return logits, y, dim


# A capped logit is finite.
PADDINGS: list[tuple[str, tuple[str, ...]]] = [(w, of) for w in ("logits", "class_bias") for of in ((), ("weight",))]
PADDINGS += [("logits", ("z_loss", "scale")), ("class_bias", ("z_loss", "scale", "softcap"))]


@pytest.mark.parametrize(("where", "options"), PADDINGS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("shape", [(C,), (4, C), (2, C, 3)], ids=str)
def test_padded_classes_of_soft_targets(
    options: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> None:
    logits, y, dim = soft_targets(shape, dtype)
    given: dict[str, Any] = {"weight": torch.rand(C) + 0.5, "z_loss": 0.1, "softcap": 3.0, "scale": 1.5}
    given = {k: given[k] for k in options}
    bias = torch.zeros(C)
    bias[-PADDED:] = -torch.inf
    short = given | ({"weight": given["weight"][:-PADDED].double()} if "weight" in given else {})
    for reduction in ("none", "sum", "mean"):
        x = logits.clone()
        if where == "logits":
            x.narrow(dim, C - PADDED, PADDED).fill_(-torch.inf)
        else:
            given["class_bias"] = bias
        x, truth = x.requires_grad_(), logits.double().narrow(dim, 0, C - PADDED).clone().requires_grad_()
        loss = longtail.cross_entropy(x, y, reduction=reduction, **given)
        exact = longtail.cross_entropy(truth, y.double().narrow(dim, 0, C - PADDED), reduction=reduction, **short)
        up = torch.randn(loss.shape, generator=cases.generator(4), dtype=torch.float64)
        (grad,), (true_grad,) = torch.autograd.grad(loss, x, up.to(loss.dtype)), torch.autograd.grad(exact, truth, up)
        assert_close(loss.detach(), exact.detach(), what="loss", factor=4)
        assert_close(grad.narrow(dim, 0, C - PADDED), true_grad, what="gradient", factor=8)
        assert not grad.narrow(dim, C - PADDED, PADDED).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_that_hope_for_an_impossible_class(smoothing: float) -> None:
    """The loss is inf, as for indices and as in torch, and the gradient softmax - y."""
    logits, y, _ = soft_targets((4, C), torch.float64)
    logits[:, -1] = -torch.inf
    if not smoothing:
        y[:, -1] = 0.25
    x, z = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = longtail.cross_entropy(x, y, reduction="none", label_smoothing=smoothing)
    torchs = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
    assert_same(loss.detach(), torch.full((4,), torch.inf, dtype=torch.float64))
    assert_same(loss.detach(), torchs.detach())
    up = torch.rand(4, generator=cases.generator(1), dtype=torch.float64)
    (grad,), (true_grad,) = torch.autograd.grad(loss, x, up), torch.autograd.grad(torchs, z, up)
    assert grad.isfinite().all()
    assert_close(grad, true_grad, what="gradient")


def test_soft_targets_differentiate_as_torchs() -> None:
    """In the logits, in the targets where they are 0 too, and twice."""
    logits, y, _ = soft_targets((4, C), torch.float64)
    derivatives = []
    for function in (longtail.cross_entropy, F.cross_entropy):
        x, p = logits.clone().requires_grad_(), y.clone().requires_grad_()
        first = torch.autograd.grad(function(x, p, label_smoothing=0.1), (x, p), create_graph=True)
        derivatives.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, p))])
    for ours, torchs in zip(*derivatives, strict=True):
        assert torchs.abs().sum() > 0
        assert_close(ours.detach(), torchs.detach())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("gradient", ["auto", *cases.MODES])
@pytest.mark.parametrize("shape", [(C, 3), (C, 2, 2), (C, 1)], ids=str)
def test_ignored_rows_of_k_dimensional_targets(
    shape: tuple[int, ...], gradient: str, dtype: torch.dtype, autocast: bool
) -> None:
    g = cases.generator(6)
    x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((6, 4), (*shape, 4), shape))
    target = torch.randint(C, (6, *shape[1:]), generator=g)
    target[1::2] = cases.IGNORE
    target[0].view(-1)[:1] = cases.IGNORE  # where there is more than one, this row counts
    scope = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for reduction in ("none", "sum", "mean"):
        results = []
        for value in (0.0, torch.nan, torch.inf, -torch.inf):
            rows = x.clone()
            rows[1::2] = value
            leaves = [p.clone().requires_grad_() for p in (rows, w, b)]
            with scope:
                loss = longtail.linear_cross_entropy(
                    *leaves[:2], target, linear_bias=leaves[2], gradient=gradient, reduction=reduction
                )
            up = torch.randn(loss.shape, generator=cases.generator(7)).to(loss.dtype)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves, up)])
        assert results[0][2].abs().sum() > 0
        for other in results[1:]:
            for one, same in zip(results[0], other, strict=True):
                assert_same(one, same)


# logit, target, loss (None: finite and positive)
ELEMENTS = [
    (torch.inf, 1.0, 0.0), (-torch.inf, 0.0, 0.0), (torch.inf, 0.0, torch.inf), (-torch.inf, 1.0, torch.inf),
    (torch.inf, 0.3, torch.inf), (-torch.inf, 0.3, torch.inf), (1.0, 1.0, None), (0.0, 0.0, None),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2), (8, 1), (2, 2, 2, 1)], ids=str)
def test_infinite_logits_of_elements(shape: tuple[int, ...], mode: str, backend: str) -> None:
    """Surely right: nothing. Surely wrong: inf, with a finite gradient."""
    logits, target = (torch.tensor([e[i] for e in ELEMENTS], dtype=torch.float64).reshape(shape) for i in range(2))
    for dtype in cases.DTYPES:
        for gamma, alpha in ((0.0, None), (0.5, None), (2.0, 0.25)):
            x = logits.to(dtype).requires_grad_()
            with longtail.use_backend(backend):
                loss = longtail.sigmoid_focal_loss(x * 1, target, alpha=alpha, gamma=gamma, gradient=mode)
                (grad,) = torch.autograd.grad(loss.sum(), x)
            for got, (_, _, expected) in zip(loss.flatten().tolist(), ELEMENTS, strict=True):
                assert (0 < got < torch.inf) if expected is None else got == expected
            assert grad.isfinite().all()
            assert not grad.flatten()[:2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_infinite_logits_of_classes(mode: str, backend: str) -> None:
    logits = torch.tensor([[torch.inf, -torch.inf, -torch.inf], [0.0, torch.inf, 0.0], [-torch.inf, 1.0, -torch.inf]])
    for shape in ((3, 3), (3, 3, 1, 1)):
        x, target = logits.reshape(shape).clone().requires_grad_(), torch.tensor([0, 0, 0]).reshape(3, *shape[2:])
        with longtail.use_backend(backend):
            loss = longtail.sigmoid_focal_loss(x * 1, target, reduction="rows", gradient=mode)
            (grad,) = torch.autograd.grad(loss.sum(), x)
        assert loss.flatten().tolist() == [0.0, torch.inf, torch.inf]
        assert grad.isfinite().all()
        assert not grad[0].any()
