"""Kernels that the operators dispatch to, and how tests run over them and over those of the emulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from batches import Kernels, ProbabilityBatch, SigmoidBatch, SoftmaxBatch
from emulation.build import COMPILER
from hierarchical_batches import HierarchicalBatch
from interpreted import FACTOR, INTERPRETED, interpreted
from two_way_cases import TwoWayBatch

RowBatch = SoftmaxBatch | HierarchicalBatch | TwoWayBatch


@dataclass(frozen=True)
class Operators:
    """Those of one backend, by dispatch or from a namespace of its own."""

    backend: str
    device: str = "cpu"
    namespace: str = "longtail"
    again = False

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def gradient_factor(self, dtype: torch.dtype) -> float:
        return FACTOR[dtype] if INTERPRETED else 1.0

    def softmax(self, batch: SoftmaxBatch, otherwise: bool = False) -> None:
        self._of_rows("softmax", batch, batch.target, otherwise)

    def hierarchical(self, batch: HierarchicalBatch, otherwise: bool = False) -> None:
        self._of_rows("hierarchical", batch, batch.target, otherwise)
        written = batch.laid(batch.logits)
        with longtail.use_backend(self.backend):
            self.ops.hierarchical_loss_backward_(batch.up, written, batch.target, batch.stats[0], *batch.tail)
        batch.grads.append(written)

    def hierarchical_stats(self, shard: HierarchicalBatch, otherwise: bool = False) -> None:
        assert not otherwise
        ops, z, written, rest = (
            self.ops,
            shard.laid(shard.logits),
            shard.laid(shard.logits),
            (shard.target, *shard.tail),
        )
        with longtail.use_backend(self.backend):
            _, one = ops.hierarchical_loss(z, *rest)
            _, two = ops.hierarchical_loss_and_grad_(shard.up, written, *rest)
        shard.z, shard.stats = z, [one, two]

    def hierarchical_grads(self, shard: HierarchicalBatch, stats: Tensor, otherwise: bool = False) -> None:
        assert not otherwise
        z, written, rest = shard.laid(shard.logits), shard.laid(shard.logits), (shard.target, stats, *shard.tail)
        with longtail.use_backend(self.backend):
            grad = self.ops.hierarchical_loss_backward(shard.up, z, *rest)
            self.ops.hierarchical_loss_backward_(shard.up, written, *rest)
        shard.z, shard.grads = z, [grad, written]

    def two_way(self, batch: TwoWayBatch, otherwise: bool = False) -> None:
        self._of_rows("two_way", batch, batch.y, otherwise)

    def _of_rows(self, family: str, batch: RowBatch, target: Tensor, otherwise: bool) -> None:
        """The operators of a family of statistics."""
        assert not otherwise
        z, written, up, tail = batch.laid(batch.logits), batch.laid(batch.logits), batch.up, batch.tail
        loss, backward, loss_and_grad, loss_and_grad_ = (
            getattr(self.ops, f"{family}_loss{step}") for step in ("", "_backward", "_and_grad", "_and_grad_")
        )
        with longtail.use_backend(self.backend):
            one, one_stats = loss(z, target, *tail)
            one_grad = backward(up, z, target, one_stats, *tail)
            two, two_stats, two_grad = loss_and_grad(up, z, target, *tail)
            three, three_stats = loss_and_grad_(up, written, target, *tail)
        batch.z, batch.losses, batch.stats = z, [one, two, three], [one_stats, two_stats, three_stats]
        batch.grads = [one_grad, two_grad, written]

    def probabilities(self, batch: ProbabilityBatch, otherwise: bool = False) -> None:
        assert not otherwise
        z, y, tail = batch.laid(batch.logits), batch.y, batch.tail
        with longtail.use_backend(self.backend):
            loss, stats = self.ops.softmax_loss(z, y, *tail)
            grad = self.ops.softmax_loss_backward(batch.up, z, y, stats, *tail)
        batch.z, batch.losses, batch.stats, batch.grads = z, [loss], [stats], [grad]

    def sigmoid(self, batch: SigmoidBatch, otherwise: bool = False) -> None:
        assert not otherwise
        z, written = batch.laid(batch.logits), batch.laid(batch.logits)
        ops, up, y, tail, elementwise = self.ops, batch.up, batch.y, batch.tail, batch.elementwise
        with longtail.use_backend(self.backend):
            one = ops.sigmoid_loss(z, y, *tail, elementwise)
            one_grad = ops.sigmoid_loss_backward(up, z, y, *tail)
            two, two_grad = ops.sigmoid_loss_and_grad(up, z, y, *tail, elementwise)
            three = ops.sigmoid_loss_and_grad_(up, written, y, *tail, elementwise)
        batch.z, batch.losses, batch.grads = z, [one, two, three], [one_grad, two_grad, written]

    def scale(self, grad: Tensor, factor: Tensor, target: Tensor | None = None) -> None:
        with longtail.use_backend(self.backend):
            self.ops.scale_grad_(grad, factor, target, cases.IGNORE)


CPU = {"cpu": Operators("cpu"), "reference": Operators("reference")}
TRITON = {"triton": Operators("triton")}
GPU = {"cuda": Operators("cuda", "cuda"), "gpu_triton": Operators("triton", "cuda")}
_MARKS: dict[str, pytest.MarkDecorator] = {
    "triton": interpreted,
    "cuda": pytest.mark.gpu,
    "gpu_triton": pytest.mark.gpu,
    "emulated": pytest.mark.skipif(COMPILER is None, reason="needs g++"),
}


def _label(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return cases.name(value)
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def over(kernels: Mapping[str, Kernels], *axes: Iterable[Any]) -> list[Any]:
    """Parameters: each of the kernels with each combination of the axes' values."""
    found = []
    for (name, chosen), *values in itertools.product(kernels.items(), *axes):
        marks = _MARKS.get(name.split("-")[0], ())
        found.append(pytest.param(chosen, *values, id="-".join([name, *map(_label, values)]), marks=marks))
    return found
