"""One pass of a family over tensors, as a launch of the emulated kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longtail.ops.layout import row_count
from longtail.options import SIGMOID_VECTORS, HierarchicalOptions, SigmoidOptions, SoftmaxOptions, TwoWayOptions

from .harness import HIERARCHICAL, SIGMOID, STORAGES, TWO_WAY, Launch, Plan

SIGMOID_AS_THEY_ARE = (
    "class_weight_by_target",
    "gamma",
    "clip",
    "detach",
    "negative_scale",
    "label_smoothing",
    "rebalance_alpha",
    "rebalance_beta",
    "rebalance_mu",
)


def softmax_launch(
    pass_: int,
    plan: Plan,
    logits: Tensor,
    target: Tensor,
    options: tuple[Any, ...],
    *,
    loss: Tensor | None = None,
    stats: Tensor | None = None,
    grad: Tensor | None = None,
    up: Tensor | None = None,
    row_grad: Tensor | None = None,
    target_terms: Tensor | None = None,
) -> Launch:
    """options: those of the operators (cases.operator_options), in schema order."""
    fields = SoftmaxOptions(*options)._asdict()
    weight = fields["weight"]
    fields.update(
        storage=STORAGES.index(logits.dtype),
        rows=len(target),
        num_classes=logits.shape[1],
        logits=logits,
        logits_stride=logits.stride(0),
        weight_sum=weight.sum() if weight is not None and fields["label_smoothing"] else None,
        grad_loss=up,
        grad_loss_stride=0 if up is None else up.stride(0),
        loss=loss,
        stats=stats,
        grad=grad,
        grad_stride=0 if grad is None else grad.stride(0),
        row_grad=row_grad,
        target_terms=target_terms,
    )
    if target.is_floating_point():
        wide = target.dtype != logits.dtype
        fields.update(dense=True, dense_target=target, dense_stride=target.stride(0), dense_is_wide=wide)
    else:
        fields.update(target=target, target_stride=target.stride(0))
    if logits.dim() == 3:
        fields.update(
            pixels=logits.shape[2],
            logits_class_stride=logits.stride(1),
            grad_class_stride=0 if grad is None else grad.stride(1),
        )
    if stats is not None:
        fields.update(stats_stride=stats.stride(0), stats_column_stride=stats.stride(1))
    return Launch(fields, pass_, plan)


def sigmoid_launch(
    pass_: int,
    plan: Plan,
    logits: Tensor,
    target: Tensor,
    options: tuple[Any, ...],
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    up: Tensor | None = None,
) -> Launch:
    """options: those of the operators (sigmoid_cases.operator_options), in schema order."""
    o = SigmoidOptions(*options)
    dense = target.is_floating_point()
    fields = {
        "storage": STORAGES.index(logits.dtype),
        "rows": row_count(logits),
        "num_classes": logits.shape[1],
        "pixels": logits.shape[2] if logits.dim() == 3 else 0,
        "logits": logits,
        "logits_stride": logits.stride(0),
        "logits_class_stride": logits.stride(1),
        "dense_target" if dense else "target": target,
        "dense_stride" if dense else "target_stride": target.stride(0),
        "dense_class_stride": target.stride(1) if dense else 0,
        **{name: getattr(o, name) for name in (*SIGMOID_VECTORS, *SIGMOID_AS_THEY_ARE)},
        "grad_loss": up,
        "grad_loss_stride": up.stride(0) if up is not None and up.dim() == 1 else 0,
        "ignore_index": o.ignore_index or 0,
        "alpha_positive": 1.0 if o.alpha is None else o.alpha,
        "alpha_negative": 1.0 if o.alpha is None else 1.0 - o.alpha,
        "gamma_negative": o.gamma if o.gamma_negative is None else o.gamma_negative,
        "same_gamma": o.gamma_negative is None,
        "plain": o.is_plain,
        "dense_is_wide": dense and target.dtype != logits.dtype,
        "ignoring": o.ignore_index is not None,
        "elementwise_loss": loss is not None and loss.dim() == logits.dim(),
        "elementwise_upstream": up is not None and up.dim() == logits.dim(),
        "loss": loss,
        "grad": grad,
        "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_class_stride": 0 if grad is None else grad.stride(1),
    }
    return Launch(fields, pass_, plan, kind=SIGMOID)


def hierarchical_launch(
    pass_: int,
    plan: Plan,
    logits: Tensor,
    target: Tensor,
    options: list[Any],
    *,
    loss: Tensor | None = None,
    stats: Tensor | None = None,
    grad: Tensor | None = None,
    up: Tensor | None = None,
) -> Launch:
    """options: those of the operators (hierarchical_batches.operator_options), in schema order."""
    o = HierarchicalOptions(*options)
    fields = {
        **o._asdict(),
        "storage": STORAGES.index(logits.dtype),
        "rows": len(target),
        "num_classes": logits.shape[1],
        "tree_classes": len(o.path),
        "logits": logits,
        "logits_stride": logits.stride(0),
        "target": target,
        "target_stride": target.stride(0),
        "nodes": len(o.node_begin),
        "depth": o.path.shape[1],
        "grad_loss": up,
        "grad_loss_stride": 0 if up is None else up.stride(0),
        "loss": loss,
        "stats": stats,
        "grad": grad,
        "grad_stride": 0 if grad is None else grad.stride(0),
    }
    return Launch(fields, pass_, plan, kind=HIERARCHICAL)


def two_way_launch(
    pass_: int,
    plan: Plan,
    logits: Tensor,
    target: Tensor,
    options: list[Any],
    *,
    loss: Tensor | None = None,
    stats: Tensor | None = None,
    grad: Tensor | None = None,
    up: Tensor | None = None,
) -> Launch:
    """options: those of the operators (two_way_cases.operator_options), in schema order."""
    o, dense = TwoWayOptions(*options), target.is_floating_point()
    fields = {
        **o._asdict(),
        "ignore_index": o.ignore_index or 0,
        "ignoring": o.ignore_index is not None,
        "storage": STORAGES.index(logits.dtype),
        "rows": row_count(logits),
        "num_classes": logits.shape[1],
        "pixels": logits.shape[2] if logits.dim() == 3 else 0,
        "logits": logits,
        "logits_stride": logits.stride(0),
        "logits_class_stride": logits.stride(1),
        "dense_target" if dense else "target": target,
        "dense_stride" if dense else "target_stride": target.stride(0),
        "dense_class_stride": target.stride(1) if dense else 0,
        "dense_is_wide": dense and target.dtype != logits.dtype,
        "grad_loss": up,
        "grad_loss_stride": 0 if up is None else up.stride(0),
        "loss": loss,
        "stats": stats,
        "stats_stride": 0 if stats is None else stats.stride(0),
        "stats_column_stride": 0 if stats is None else stats.stride(1),
        "grad": grad,
        "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_class_stride": 0 if grad is None else grad.stride(1),
    }
    return Launch(fields, pass_, plan, kind=TWO_WAY)
