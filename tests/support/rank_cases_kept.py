"""Gradients that are made in forward and kept, over real ranks: what each rank does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cases
import hierarchy_cases
import longtail
from rank_cases import local_range
from tolerances import assert_close, assert_same

SIZES = [5, 8]
CLASSES, FEATURES = sum(SIZES), 6
WEIGHT = torch.logspace(0, 5, CLASSES)  # one rank's are of order 1, the other's of 1e5
TARGET = torch.tensor([0, cases.IGNORE, 2, 12, 11, 4, cases.IGNORE, 7])
ROWS = len(TARGET)
KINDS = ("logits", "linear", "sequence_parallel")
TREES = tuple(f"tree_{kind}" for kind in KINDS)  # of hierarchical cross-entropy


class Problem:
    """One loss, over the ranks of ``group`` or of one process that holds everything; what it is differentiated in."""

    def __init__(self, group: Any, kind: str, dtype: torch.dtype) -> None:
        g = cases.generator(5)
        self.group, self.kind = group, kind.removeprefix("tree_")
        self.over = {} if group is None else {"group": group, "num_classes": CLASSES}
        if kind in TREES:
            paths = hierarchy_cases.ragged_paths(CLASSES, 3, ordered=False, names=2)
            self.over = {"group": group} if group else {}
            self.over["hierarchy"] = longtail.Hierarchy.from_paths(paths)
        self.classes = slice(0, CLASSES) if group is None else slice(*local_range(group, SIZES))
        self.rows = slice(0, ROWS)
        if self.kind == "sequence_parallel" and group is not None:
            share = ROWS // len(SIZES)
            self.rows = slice(share * dist.get_rank(group), share * (dist.get_rank(group) + 1))
        self.weight = torch.randn(CLASSES, FEATURES, generator=g).to(dtype)[self.classes].clone()
        width = CLASSES if self.kind == "logits" else FEATURES
        self.x = torch.randn(ROWS, width, generator=g).to(dtype)
        self.x = self.x[:, self.classes] if self.kind == "logits" else self.x[self.rows]
        self.x = self.x.clone().requires_grad_()

    def loss(self, target: Tensor = TARGET, gradient: str = "backward", **options: Any) -> Tensor:
        parts = ["vocab_parallel"] if self.group is not None else []
        parts += ["linear"] if self.kind != "logits" else []
        parts += ["hierarchical"] if "hierarchy" in self.over else []
        call = getattr(longtail, "_".join([*parts, "cross_entropy"]))
        if self.kind == "logits":
            return call(self.x * 1.0, target, gradient=gradient, **self.over, **options)
        if self.kind == "sequence_parallel" and self.group is not None:
            options["sequence_parallel"] = True
        return call(self.x, self.weight, target, gradient=gradient, **self.over, **options)

    def gradient(self, upstream: float = 1.0, **options: Any) -> Tensor:
        value = self.loss(**options)
        return torch.autograd.grad(value, self.x, torch.full_like(value, upstream))[0]


def extreme_weights(group: Any, kind: str, mode: str, local: bool, **options: Any) -> None:
    """float16 against float64 of one process, and the error of float16 in one process."""
    mine = Problem(group, kind, torch.float16)
    truth, eager = (
        Problem(None, kind, dtype).gradient(weight=WEIGHT, **options) for dtype in (torch.float64, torch.float16)
    )
    weight = WEIGHT[mine.classes].clone() if local else WEIGHT
    grad = mine.gradient(gradient=mode, weight=weight, **options)
    place = (slice(None), mine.classes) if mine.kind == "logits" else mine.rows
    assert truth.abs().max() > 1e-2
    assert_close(grad, truth[place].half().double(), eager=eager[place], factor=8)


def extreme_scales(group: Any, kind: str, mode: str, local: bool, name: str) -> None:
    """As :func:`extreme_weights`: one rank's scales are of order 1e-2, the other's of 30."""
    mine = Problem(group, kind, torch.float16)
    scale = torch.where(torch.arange(CLASSES) < SIZES[0], 0.02, 30.0) * torch.linspace(0.5, 1.0, CLASSES)
    truth, eager = (Problem(None, kind, dtype).gradient(**{name: scale}) for dtype in (torch.float64, torch.float16))
    grad = mine.gradient(gradient=mode, **{name: scale[mine.classes].clone() if local else scale})
    place = (slice(None), mine.classes) if kind == "logits" else mine.rows
    assert_close(grad, truth[place].half().double(), eager=eager[place], factor=8)


def upstream_that_is_not_finite(group: Any, kind: str, mode: str, upstream: float) -> None:
    problem = Problem(group, kind, torch.float32)
    grad = problem.gradient(upstream, gradient=mode)
    ignored = (TARGET == cases.IGNORE)[problem.rows]
    assert (grad[ignored] == 0).all()
    assert not grad[~ignored].isfinite().any()


def nothing_counts(group: Any, kind: str, mode: str, dtype: torch.dtype) -> None:
    zeros = torch.zeros(ROWS, dtype=torch.long)
    no_weight = torch.ones(CLASSES)
    no_weight[0] = 0
    ignored = torch.full_like(TARGET, cases.IGNORE)
    for options in (
        {"target": ignored},
        {"target": ignored, "weight": WEIGHT[slice(*local_range(group, SIZES))].clone()},
        {"target": zeros, "weight": no_weight},
        {"target": zeros, "weight": no_weight[slice(*local_range(group, SIZES))].clone()},
        {"normalizer": 0},
    ):
        grad = Problem(group, kind, dtype).gradient(2.5, gradient=mode, **options)
        assert_same(grad, torch.zeros_like(grad), str(list(options)))


def handed_out_once(group: Any, kind: str, mode: str) -> None:
    expected = Problem(group, kind, torch.float32).gradient(3.0)
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        problem = Problem(group, kind, torch.float32)
        with hooks:
            value = problem.loss(gradient=mode)
        (first,) = torch.autograd.grad(value, problem.x, torch.tensor(3.0), retain_graph=True)
        assert_close(first, expected.double(), factor=4)
        kept = first.clone()
        with pytest.raises(RuntimeError, match="run once"):
            torch.autograd.grad(value, problem.x, torch.tensor(3.0))
        assert_same(first, kept)


def inplace_on_a_leaf(group: Any) -> None:
    local = Problem(group, "logits", torch.float32).x
    before = local.detach().clone()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        longtail.vocab_parallel_cross_entropy(local, TARGET, group=group, num_classes=CLASSES, gradient="inplace")
    assert_same(local.detach(), before)
