"""The operators of hierarchical cross-entropy in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import HierarchicalOptions
from ..reference import hierarchical
from .fallback import check_shapes, check_target


def _checked(logits: Tensor, target: Tensor, *values: Any) -> HierarchicalOptions:
    options, (n, num_classes) = HierarchicalOptions(*values), (logits.shape[0], logits.shape[-1])
    path, nodes = options.path, options.node_begin.numel()
    if path.dim() != 2 or path.shape[0] < num_classes or path.shape[1] == 0:
        raise RuntimeError(f"longtail: path has shape {list(path.shape)}, expected [at least {num_classes}, L]")
    lengths = dict.fromkeys(("order", "position", "class_bias"), num_classes)
    lengths |= dict.fromkeys(("node_begin", "node_end", "node_weight"), nodes)
    lengths |= {"weight": path.shape[0], "sample_weight": n}
    check_shapes(logits, target, {name: (getattr(options, name), length) for name, length in lengths.items()})
    if (options.order is None) != (options.position is None):
        raise RuntimeError("longtail: one of order and position is None, expected both or none")
    for name in ("path", "node_begin", "node_end", "order", "position"):
        table = getattr(options, name)
        if table is not None and table.dtype != torch.int32:
            raise RuntimeError(f"longtail: {name} has dtype {table.dtype}, expected torch.int32")
    counted = target != options.ignore_index
    check_target(target, counted, path.shape[0], options.ignore_index)
    if logits.is_cpu:
        _check_tree(target[counted], num_classes, options)
    return options


def _check_tree(g: Tensor, num_classes: int, options: HierarchicalOptions) -> None:
    """That the nodes of the paths of classes g nest, and end at g; of a shard, at one class or none."""
    order, nodes = options.order, options.path[g].long()
    if order is not None and bool(((order < 0) | (order >= num_classes)).any()):
        bad = int(order[(order < 0) | (order >= num_classes)][0])
        raise RuntimeError(f"longtail: order holds {bad}, expected classes in [0, {num_classes})")
    fits = ((nodes >= 0) & (nodes < options.node_begin.numel())).all(1)
    if bool(fits.all()):
        root = torch.zeros_like(nodes[:, :1])
        begin = torch.cat([root, options.node_begin[nodes].long()], 1)
        end = torch.cat([root + num_classes, options.node_end[nodes].long()], 1)
        count = end[:, -1] - begin[:, -1]
        place, here = begin[:, -1], count == 1
        column = place.clamp(0, max(num_classes - 1, 0))
        if order is not None and num_classes:
            column = order[column].long()
            here &= options.position[column] == place  # type: ignore[index]
        ends = here | (count == 0) if len(options.path) > num_classes else here & (column == g)
        fits = ((begin.diff() >= 0) & (end.diff() <= 0)).all(1) & ends
    if not bool(fits.all()):
        bad = int(g[~fits][0])
        raise RuntimeError(f"longtail: path, node_begin and node_end of class {bad} do not nest, or do not end at it")


class _Batch(NamedTuple):
    logits: Tensor
    target: Tensor
    options: HierarchicalOptions
    rows: hierarchical.Rows | None
    """None: of no logits, as a shard of no classes has."""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, *values: Any) -> _Batch:
        options = _checked(logits, target, *values)
        return cls(logits, target, options, hierarchical.Rows.of(logits, target, options) if logits.numel() else None)

    def loss(self) -> tuple[Tensor, Tensor]:
        ignored = (self.target == self.options.ignore_index)[:, None]
        if self.rows is None:
            loss = self.logits.new_zeros(self.target.shape, dtype=arithmetic_dtype(self.logits.dtype))
            ring, u_g = loss.new_tensor([-torch.inf, 0.0]), loss.new_tensor([-torch.inf])
            stats = torch.cat([ring.repeat(self.options.path.shape[1]), u_g])
            return loss, stats.repeat(len(loss), 1).masked_fill(ignored, 0.0)
        stats = self.rows.stats()
        return self.rows.losses(stats), stats.masked_fill(ignored, 0.0)

    def grad(self, stats: Tensor, grad_loss: Tensor) -> Tensor:
        if self.rows is None:
            return torch.zeros_like(self.logits)
        return self.rows.grad(stats, grad_loss).to(self.logits.dtype)


def hierarchical_loss(logits: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    return _Batch.of(logits, target, *values).loss()


def hierarchical_loss_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *values: Any
) -> Tensor:
    return _Batch.of(logits, target, *values).grad(stats, grad_loss)


def hierarchical_loss_backward_(grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *values: Any) -> None:
    logits.copy_(hierarchical_loss_backward(grad_loss, logits, target, stats, *values))


def hierarchical_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch = _Batch.of(logits, target, *values)
    loss, stats = batch.loss()
    return loss, stats, batch.grad(stats, grad_loss)


def hierarchical_loss_and_grad_(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any
) -> tuple[Tensor, Tensor]:
    loss, stats, grad = hierarchical_loss_and_grad(grad_loss, logits, target, *values)
    logits.copy_(grad)
    return loss, stats
