"""The operators on :mod:`longtail.reference`: what runs where no kernel does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SIGMOID_VECTORS, SigmoidOptions, SoftmaxOptions
from ..reference import sigmoid, softmax
from ..reference.effective import Effective, TargetTerms
from ..reference.softmax_dense import DenseRows, refuse_class_options
from ..reference.softmax_rows import Rows
from ..reference.softmax_rows import mean_denominator as plain_mean_denominator


def check_target(target: Tensor, counted: Tensor, num_classes: int, ignore_index: int | None, lowest: int = 0) -> None:
    bad = counted & ((target < lowest) | (target >= num_classes))
    if target.device.type == "cpu" and bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise RuntimeError(
            f"longtail: target {int(target[row])} in row {row} is out of bounds: expected {lowest} <= target < "
            f"{num_classes}" + ("" if ignore_index is None else f" or ignore_index {ignore_index}")
        )


def check_shapes(logits: Tensor, target: Tensor, lengths: dict[str, tuple[Tensor | None, int]]) -> None:
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise RuntimeError(
            f"longtail: logits of shape {list(logits.shape)} and target of shape {list(target.shape)}, "
            "expected [N, C] and [N]"
        )
    check_lengths(lengths)


def check_lengths(lengths: dict[str, tuple[Tensor | None, int]]) -> None:
    for name, (vector, length) in lengths.items():
        if vector is not None and vector.shape != (length,):
            raise RuntimeError(f"longtail: {name} has shape {list(vector.shape)}, expected [{length}]")


def _rows(logits: Tensor, target: Tensor, *values: Any) -> Rows:
    options, (n, num_classes) = SoftmaxOptions(*values), (logits.shape[0], logits.shape[-1])
    per_class = {name: (x, num_classes) for name, x in options.vectors.items()}
    check_shapes(logits, target, per_class | {"sample_weight": (options.sample_weight, n)})
    check_target(target, target != options.ignore_index, num_classes, options.ignore_index)
    return Rows.of(logits, target, options)


def _loss(rows: Rows) -> tuple[Tensor, Tensor]:
    u = rows.effective.u
    if u.numel() == 0:  # no rows, or no classes and therefore ignored rows alone
        return u.new_zeros(rows.g.shape), u.new_zeros((*rows.g.shape, 5))
    stats = rows.stats()
    return rows.losses(stats), stats.masked_fill(~rows.counted[:, None], 0.0)


def _grad(rows: Rows, stats: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    u = rows.effective.u
    return (u if u.numel() == 0 else rows.grad(stats, grad_loss)).to(dtype)


def is_dense(target: Tensor) -> bool:
    """Whether the target of a softmax operator is a probability for each class, not a class for each row."""
    return target.is_floating_point()


def check_dense(logits: Tensor, target: Tensor, options: SoftmaxOptions) -> None:
    """What takes a probability for each class: logits [N, C], and no option that needs one class."""
    if logits.dim() != 2 or target.shape != logits.shape:
        raise RuntimeError(
            f"longtail: logits of shape {list(logits.shape)} and {target.dtype} target of shape {list(target.shape)}, "
            "expected [N, C] and floating point [N, C]"
        )
    wide = arithmetic_dtype(logits.dtype)
    if target.dtype not in (logits.dtype, wide):
        raise RuntimeError(f"longtail: target has dtype {target.dtype}, expected {wide}")
    refuse_class_options(options)


def _dense_rows(logits: Tensor, target: Tensor, *values: Any) -> DenseRows | None:
    """None: of no logits."""
    options = SoftmaxOptions(*values)
    check_dense(logits, target, options)
    n, c = logits.shape
    lengths = {"weight": c, "class_bias": c, "class_scale": c, "sample_weight": n}
    check_lengths({name: (getattr(options, name), length) for name, length in lengths.items()})
    return DenseRows.of(logits, target, options) if logits.numel() else None


def _dense_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    rows = _dense_rows(logits, target, *options)
    if rows is None:
        none = logits.new_zeros(logits.shape[:1], dtype=arithmetic_dtype(logits.dtype))
        return none, none.new_zeros((*none.shape, 5))
    return rows.losses(), rows.stats()


def softmax_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _dense_loss(logits, target, *options) if is_dense(target) else _loss(_rows(logits, target, *options))


def softmax_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *options: Any) -> Tensor:
    if is_dense(target):
        dense = _dense_rows(logits, target, *options)
        return torch.zeros_like(logits) if dense is None else dense.grad(stats, grad_loss).to(logits.dtype)
    return _grad(_rows(logits, target, *options), stats, grad_loss, logits.dtype)


def softmax_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(logits, target, *options)
    loss, stats = _loss(rows)
    return loss, stats, _grad(rows, stats, grad_loss, logits.dtype)


def softmax_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, stats, grad = softmax_loss_and_grad(grad_loss, logits, target, *options)
    logits.copy_(grad)
    return loss, stats


class _Shard(NamedTuple):
    effective: Effective
    target: Tensor  # -1: in another shard, or ignored
    counted: Tensor


def _shard(
    logits: Tensor, target: Tensor, target_terms: Tensor | None, ignore_index: int, options: SoftmaxOptions
) -> _Shard:
    n, num_classes = logits.shape[0], logits.shape[-1]
    check_shapes(logits, target, {name: (vector, num_classes) for name, vector in options.vectors.items()})
    if target_terms is not None and target_terms.shape != (n, 3):
        raise RuntimeError(f"longtail: target_terms has shape {list(target_terms.shape)}, expected [{n}, 3]")
    counted = target != ignore_index
    check_target(target, counted, num_classes, ignore_index, lowest=-1)
    local = target.masked_fill(~counted, -1)
    z = logits.to(arithmetic_dtype(logits.dtype)).masked_fill(~counted[:, None], 0.0)
    terms = None if target_terms is None else TargetTerms(*target_terms.unbind(1))
    return _Shard(Effective.of(z, local, options, terms), local, counted)


def softmax_loss_accumulate(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    class_scale: Tensor | None,
    target_scale: Tensor | None,
    class_mitigation: Tensor | None,
    target_terms: Tensor | None,
    ignore_index: int,
    label_smoothing: bool,
    scale: float,
    softcap: float,
    compensation: float,
) -> Tensor:
    vectors = (weight, class_bias, class_margin, class_scale, target_scale, class_mitigation)
    options = SoftmaxOptions(*vectors, scale=scale, softcap=softcap, compensation=compensation)
    shard = _shard(logits, target, target_terms, ignore_index, options)
    stats = softmax.accumulate(shard.effective.u, shard.target, weight, label_smoothing)
    return stats.masked_fill(~shard.counted[:, None], 0.0)


def softmax_loss_apply(
    logits: Tensor,
    target: Tensor,
    row_grad: Tensor,
    weight: Tensor | None,
    class_bias: Tensor | None,
    class_scale: Tensor | None,
    target_scale: Tensor | None,
    class_mitigation: Tensor | None,
    target_terms: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    compensation: float,
) -> Tensor:
    vectors = (weight, class_bias, None, class_scale, target_scale, class_mitigation)
    options = SoftmaxOptions(*vectors, scale=scale, softcap=softcap, compensation=compensation)
    shard = _shard(logits, target, target_terms, ignore_index, options)
    if row_grad.shape != (logits.shape[0], 5):
        raise RuntimeError(f"longtail: row_grad has shape {list(row_grad.shape)}, expected [{logits.shape[0]}, 5]")
    grads = softmax.RowGrad(*row_grad.unbind(1))
    du = softmax.apply(grads, shard.effective.u, shard.target, weight, smoothing=True)
    grad = shard.effective.gradient(du)
    return grad.masked_fill(~shard.counted[:, None], 0.0).to(logits.dtype)


def softmax_loss_apply_(logits: Tensor, *rest: Any) -> None:
    logits.copy_(softmax_loss_apply(logits, *rest))


def scale_grad_(grad: Tensor, grad_loss: Tensor, target: Tensor | None, ignore_index: int) -> None:
    if target is not None:  # 0 times an infinite upstream gradient is NaN
        grad_loss = grad_loss.masked_fill(target == ignore_index, 1.0)
    grad.mul_(grad_loss[:, None].to(grad.dtype) if grad.dtype == torch.float64 else grad_loss[:, None])


def mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int, num_classes: int) -> Tensor:
    check_target(target, target != ignore_index, num_classes, ignore_index)
    return plain_mean_denominator(target, weight, ignore_index)


def check_mean(loss: Tensor, denominator: Tensor) -> None:
    if loss.dim() != 1 or denominator.dim() != 0:
        got = f"loss of shape {list(loss.shape)} and denominator of shape {list(denominator.shape)}"
        raise RuntimeError(f"longtail: {got}, expected [N] and []")
    if loss.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"longtail: loss has dtype {loss.dtype}, expected float32 or float64")


def mean_loss(loss: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    check_mean(loss, denominator)
    divisor = denominator.to(loss.dtype)
    return loss.sum() / divisor, divisor.masked_fill(divisor == 0, torch.inf)


def _sigmoid_elements(logits: Tensor, target: Tensor, *values: Any) -> sigmoid.Element:
    options, one_class = SigmoidOptions(*values), target.dtype == torch.int64
    if logits.dim() != 2 or target.shape != (logits.shape[:1] if one_class else logits.shape):
        raise RuntimeError(
            f"longtail: logits of shape {list(logits.shape)} and {target.dtype} target of shape {list(target.shape)}, "
            "expected [N, C] and int64 [N] or floating point [N, C]"
        )
    n, num_classes = logits.shape
    lengths = {name: n if name == "sample_weight" else num_classes for name in SIGMOID_VECTORS}
    check_lengths({name: (getattr(options, name), length) for name, length in lengths.items()})
    if options.class_weight_by_target and not (one_class and options.weight is not None):
        raise RuntimeError("longtail: class_weight_by_target needs class indices and weight")
    if one_class:
        ignored = options.ignore_index
        counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        check_target(target, counted, num_classes, ignored)
    return sigmoid.option_elements(logits, target, options)


def _sigmoid_grad(slope: Tensor, grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any) -> Tensor:
    ignore_index, rows = SigmoidOptions(*values).ignore_index, grad_loss.dim() == 1
    if grad_loss.shape != (logits.shape[:1] if rows else logits.shape):
        raise RuntimeError(f"longtail: grad_loss has shape {list(grad_loss.shape)}, expected [N] or [N, C]")
    grad = (slope * (grad_loss[:, None] if rows else grad_loss)).to(logits.dtype)
    if ignore_index is None:
        return grad
    # An infinite upstream gradient must not turn the 0 of what does not count into NaN.
    ignored = target == ignore_index
    return grad.masked_fill(ignored if target.dim() == 2 else ignored[:, None], 0.0)


def sigmoid_loss(logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    *values, elementwise = options
    loss = _sigmoid_elements(logits, target, *values).loss
    return loss if elementwise else loss.sum(1)


def sigmoid_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    slope = _sigmoid_elements(logits, target, *options).slope
    return _sigmoid_grad(slope, grad_loss, logits, target, *options)


def sigmoid_loss_and_grad(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *values, elementwise = options
    loss, slope = _sigmoid_elements(logits, target, *values)
    grad = _sigmoid_grad(slope, grad_loss, logits, target, *values)
    return loss if elementwise else loss.sum(1), grad


def sigmoid_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    loss, grad = sigmoid_loss_and_grad(grad_loss, logits, target, *options)
    logits.copy_(grad)
    return loss
