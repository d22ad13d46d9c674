"""Checks at the boundary of the operators, as csrc/checks.h: a wrong argument is an exception, never a wild access."""

from __future__ import annotations

import torch
from torch import Tensor

from longtail.arguments import arithmetic_dtype
from longtail.ops import fallback, layout
from longtail.options import (
    HIERARCHY_DEPTH,
    SIGMOID_VECTORS,
    TWO_WAY_VECTORS,
    HierarchicalOptions,
    SigmoidOptions,
    SoftmaxOptions,
    TwoWayOptions,
)


def _check(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if t.shape != shape or t.dtype != dtype or t.device != device:
        got = f"shape {list(t.shape)} and dtype {t.dtype} on {t.device}"
        raise RuntimeError(f"longtail: {name} has {got}, expected {list(shape)} and {dtype} on {device}")


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise RuntimeError(f"longtail: {name} has strides {list(t.stride())}, expected a contiguous tensor")


def check_layout(name: str, t: Tensor) -> None:
    """[N, C] with contiguous classes, or [N, C, P] with contiguous pixels; nothing overlaps."""
    n, c, last = t.shape[0], t.shape[1], t.shape[-1]
    row = last if t.dim() == 2 else (c - 1) * t.stride(1) + last
    apart = (n <= 1 or t.stride(0) >= row) and (t.dim() == 2 or c <= 1 or t.stride(1) >= last)
    if t.dim() not in (2, 3) or (last > 1 and t.stride(-1) != 1) or not apart:
        got = f"shape {list(t.shape)} and strides {list(t.stride())}"
        raise RuntimeError(f"longtail: {name} has {got}, expected [N, C] or [N, C, P] with a last stride of 1, apart")


def check_factor(name: str, t: Tensor | None, like: Tensor) -> None:
    """One float32 per row of ``like``, of any stride."""
    if t is not None:
        _check(name, t, (layout.row_count(like),), torch.float32, like.device)


def _check_vectors(logits: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """float32 constants, one per row for ``sample_weight``, else one per class."""
    for name, vector in vectors.items():
        if vector is not None:
            length = layout.row_count(logits) if name == "sample_weight" else logits.shape[1]
            _check(name, vector, (length,), torch.float32, logits.device)
            _check_contiguous(name, vector)


def check_target(target: Tensor, like: Tensor) -> None:
    """One class per row of ``like``, of any stride."""
    _check("target", target, (layout.row_count(like),), torch.int64, like.device)


def _check_classes(logits: Tensor, target: Tensor, ignore_index: int | None, num_classes: int | None = None) -> None:
    check_target(target, logits)
    if logits.device.type == "cpu":  # Triton's interpreter has no assertions
        counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        expected = logits.shape[1] if num_classes is None else num_classes
        fallback.check_target(target, counted, expected, ignore_index)


def check_loss(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, stats: Tensor, options: SoftmaxOptions
) -> None:
    """The tensors of a softmax loss or its backward."""
    _check_softmax(logits, grad_loss, stats, options)
    _check_classes(logits, target, options.ignore_index)


def _check_softmax(logits: Tensor, grad_loss: Tensor | None, stats: Tensor, options: SoftmaxOptions) -> None:
    check_layout("logits", logits)
    check_factor("grad_loss", grad_loss, logits)
    _check("stats", stats, (layout.row_count(logits), 5), torch.float32, logits.device)
    _check_vectors(logits, options.vectors)


def check_dense_loss(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, stats: Tensor, options: SoftmaxOptions
) -> None:
    """The tensors and options of a softmax loss of class probabilities, logits [N, C], or its backward."""
    if logits.dim() != 2:
        raise RuntimeError(f"longtail: logits have shape {list(logits.shape)}, expected [N, C] with dense targets")
    _check_softmax(logits, grad_loss, stats, options)
    _check_dense(target, logits)
    for name in options.of_one_class():
        raise RuntimeError(f"longtail: {name} needs class indices, got dense targets")


def _check_dense(target: Tensor, logits: Tensor) -> None:
    """One number per logit, of their dtype or that of the arithmetic, in rows or images of any distance."""
    dtype = logits.dtype if target.dtype == logits.dtype else arithmetic_dtype(logits.dtype)
    _check("target", target, tuple(logits.shape), dtype, logits.device)
    check_layout("target", target)


def check_shard(
    logits: Tensor, target: Tensor, target_terms: Tensor | None, row_grad: Tensor | None, options: SoftmaxOptions
) -> None:
    """The tensors of one shard of the classes, logits [N, C]; targets may be -1."""
    check_layout("logits", logits)
    if logits.dim() != 2:
        raise RuntimeError(f"longtail: logits have shape {list(logits.shape)}, expected [N, C]")
    _check_vectors(logits, options.vectors)
    if target_terms is not None:
        _check("target_terms", target_terms, (logits.shape[0], 3), torch.float32, logits.device)
        _check_contiguous("target_terms", target_terms)
    if row_grad is not None:
        _check("row_grad", row_grad, (logits.shape[0], 5), torch.float32, logits.device)
    _check("target", target, logits.shape[:1], torch.int64, logits.device)
    if logits.device.type == "cpu":
        counted = (target != options.ignore_index) & (target != -1)
        fallback.check_target(target, counted, logits.shape[1], options.ignore_index)


def check_mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int, num_classes: int) -> None:
    """The tensors of what a mean divides by; targets of any stride."""
    _check("target", target, (target.numel(),), torch.int64, target.device)
    if weight is not None:
        if weight.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"longtail: weight has dtype {weight.dtype}, expected float32 or float64")
        _check("weight", weight, (num_classes,), weight.dtype, target.device)
        _check_contiguous("weight", weight)
    if target.device.type == "cpu":
        fallback.check_target(target, target != ignore_index, num_classes, ignore_index)


def check_mean(loss: Tensor, denominator: Tensor) -> None:
    """The losses of all rows, and what their sum is divided by."""
    fallback.check_mean(loss, denominator)
    _check("denominator", denominator, (), denominator.dtype, loss.device)
    _check_contiguous("loss", loss)


def check_sigmoid_loss(logits: Tensor, target: Tensor, grad_loss: Tensor | None, options: SigmoidOptions) -> None:
    """The tensors of a sigmoid loss or its backward."""
    check_layout("logits", logits)
    vectors, _ = options.parted()
    _check_vectors(logits, dict(zip(SIGMOID_VECTORS, vectors, strict=True)))
    dense = target.is_floating_point()
    if dense:
        _check_dense(target, logits)
    else:
        _check_classes(logits, target, options.ignore_index)
    if options.class_weight_by_target and (dense or options.weight is None):
        raise RuntimeError("longtail: class_weight_by_target needs class indices and weight")
    if grad_loss is not None and grad_loss.dim() == logits.dim():
        _check("grad_loss", grad_loss, tuple(logits.shape), torch.float32, logits.device)
        _check_contiguous("grad_loss", grad_loss)
    else:
        check_factor("grad_loss", grad_loss, logits)


def check_two_way_loss(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, stats: Tensor, options: TwoWayOptions
) -> None:
    """The tensors of ZLPR or of a two-way loss, or of its backward."""
    check_layout("logits", logits)
    check_factor("grad_loss", grad_loss, logits)
    _check("stats", stats, (layout.row_count(logits), 4), torch.float32, logits.device)
    vectors, _ = options.parted()
    _check_vectors(logits, dict(zip(TWO_WAY_VECTORS, vectors, strict=True)))
    if target.is_floating_point():
        _check_dense(target, logits)
    else:
        _check_classes(logits, target, options.ignore_index)


def check_hierarchical_loss(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, stats: Tensor, options: HierarchicalOptions
) -> None:
    """The tensors of a hierarchical loss of logits [N, C] or its backward, and those of its tree."""
    if logits.dim() != 2:
        raise RuntimeError(f"longtail: logits have shape {list(logits.shape)}, expected [N, C]")
    check_layout("logits", logits)
    check_factor("grad_loss", grad_loss, logits)
    n, c = logits.shape
    path, nodes = options.path, options.node_begin.shape[:1]
    if path.dim() != 2 or path.shape[0] < c or not 1 <= path.shape[1] <= HIERARCHY_DEPTH:
        raise RuntimeError(
            f"longtail: path has shape {list(path.shape)}, expected [at least {c}, 1 to {HIERARCHY_DEPTH}]"
        )
    if (options.order is None) != (options.position is None):
        raise RuntimeError("longtail: one of order and position is None, expected both or none")
    tree_classes, depth = path.shape
    _check("stats", stats, (n, 2 * depth + 1), torch.float32, logits.device)
    tables = {"path": path.shape, "node_begin": nodes, "node_end": nodes, "order": (c,), "position": (c,)}
    vectors = {"node_weight": nodes, "weight": (tree_classes,), "class_bias": (c,), "sample_weight": (n,)}
    for name, shape in (tables | vectors).items():
        given = getattr(options, name)
        if given is not None:
            _check(name, given, tuple(shape), torch.int32 if name in tables else torch.float32, logits.device)
            _check_contiguous(name, given)
    _check_classes(logits, target, options.ignore_index, tree_classes)
