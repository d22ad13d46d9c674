"""The hierarchical cross-entropy in Triton: one kernel, a program per row, and its launchers.

What the kernel computes follows from its outputs: `loss` asks for losses and statistics, `grad` for the gradient, both
for the two in one launch. An argument that is None is compiled out; numbers are read at run time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtail.options import HierarchicalOptions

from . import tuning
from .checks import check_hierarchical_loss
from .hierarchical_math import Ring, finish_path, scale_path_grad
from .hierarchical_rows import (
    Tree,
    Vectors,
    add_rings,
    load_logits,
    load_path,
    of_level,
    store_rings,
    sweep_beyond,
    sweep_grad,
)
from .launching import COMPILE, aligned, on
from .softmax_rows import load_target

INTEGERS = ["stride", "grad_stride", "target_stride", "grad_loss_stride", "rows", "classes", "tree_classes",
            "nodes", "depth", "ignore_index"]  # fmt: skip
UNALIGNED = ["target", "grad_loss", "loss", "stats"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def hierarchical_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, grad_stride, target_stride, grad_loss_stride,
    rows, classes, tree_classes, nodes, depth, ignore_index, tree, x,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, LEVELS: tl.constexpr,
    INPLACE: tl.constexpr,
):  # fmt: skip
    """Rows of any length, in blocks of BLOCK classes.

    grid: N programs of one row. Sweeps: one for `loss`; one for `grad`, in reverse, so that what the first sweep read
      last is read from cache. The classes of A_1, the target's branch, are read once more in each, ring by ring.
    reads: logits [N, C] once per sweep, ignored rows never; target; per row its path and nodes, the target's logit,
      weight and bias, the sample weight, the upstream gradient (with `grad`), the stats [N, 2 depth + 1] (without
      `loss`); class_bias, order and position [C] per row, from cache.
    writes: loss [N] and stats [N, 2 depth + 1] (with `loss`); grad [N, C] (with `grad`), A_1 twice.
    bytes: one pass over the logits per sweep, one over the gradient, those of A_1 from cache.
    INPLACE: grad is the logits' own memory; A_1 is written before the sweep, which leaves it alone, else after it.
    Body and edges of a row, VEC: as softmax_loss.sweep_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    if loss is None:
        row = rows - 1 - row  # the rows that the forward pass read last may still be in the L2 cache
    z_row = logits + row * stride
    g, counted = load_target(target + row * target_stride, row < rows, tree_classes, ignore_index)
    level = tl.arange(0, LEVELS)
    real = level < tl.where(counted, depth, 0)
    path = load_path(g, counted, classes, tree_classes, nodes, depth, tree, LEVELS)
    first, last = of_level(path.begin, 0, LEVELS), of_level(path.end, 0, LEVELS)
    head = 0
    if EDGES:
        head = ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_body = logits + (row * stride + head) // VEC * VEC
    at = stats + row * (2 * depth + 1)
    if loss is not None:
        _, u_g = load_logits(z_row + path.column, path.column, path.column >= 0, x.class_bias, "")
        outer = sweep_beyond(z_row, z_body, head, body, counted, classes, first, last, tree, x.class_bias,
                             BLOCK, LANES, VEC, EDGES)  # fmt: skip
        rings = add_rings(outer, z_row, path, classes, depth, tree, x.class_bias, LEVELS, LANES)
    else:
        u_g = tl.load(at + 2 * depth, mask=counted, other=0.0)
        rings = Ring(
            tl.load(at + 2 * level, mask=real, other=float("-inf")),
            tl.load(at + 2 * level + 1, mask=real, other=0.0),
        )
    factor = 1.0
    if x.weight is not None:
        factor *= tl.load(x.weight + g, mask=counted, other=0.0)
    if x.sample_weight is not None:
        factor *= tl.load(x.sample_weight + row, mask=counted, other=0.0)
    value, grads = finish_path(rings, u_g, path.weight, path.weight_above, factor, LEVELS)
    if loss is not None:
        tl.store(loss + row, tl.where(counted, value, 0.0))
        tl.store(at + 2 * level, tl.where(counted, rings.m, 0.0), mask=level < depth)
        tl.store(at + 2 * level + 1, tl.where(counted, rings.d, 0.0), mask=level < depth)
        tl.store(at + 2 * depth, tl.where(counted, u_g, 0.0))
    if grad is not None:
        grads = scale_path_grad(grads, tl.load(grad_loss + row * grad_loss_stride, mask=counted, other=0.0))
        m, c = of_level(grads.m, 0, LEVELS), tl.where(counted, of_level(grads.c, 0, LEVELS), 0.0)
        grad_row = grad + row * grad_stride
        grad_body = grad + (row * grad_stride + head) // VEC * VEC
        if INPLACE:
            tl.debug_barrier()  # everything of A_1 has been read
            store_rings(grad_row, z_row, grads, path, classes, depth, tree, x.class_bias, LEVELS, LANES)
            tl.debug_barrier()
        sweep_grad(grad_row, grad_body, z_row, z_body, m, c, head, body, counted, classes, first, last, tree,
                   x.class_bias, BLOCK, VEC, EDGES, INPLACE)  # fmt: skip
        if not INPLACE:
            tl.debug_barrier()
            store_rings(grad_row, z_row, grads, path, classes, depth, tree, x.class_bias, LEVELS, LANES)


def _launch(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, loss: Tensor | None, stats: Tensor,
    grad: Tensor | None, options: HierarchicalOptions,
) -> None:  # fmt: skip
    check_hierarchical_loss(logits, target, grad_loss, stats, options)
    n, c = logits.shape
    if n == 0:
        return
    o = options
    tree = Tree(o.path, o.node_begin, o.node_end, o.node_weight, o.order, o.position)
    strides = (logits.stride(0),) if grad is None else (logits.stride(0), grad.stride(0))
    twice, heavy = loss is not None and grad is not None, o.class_bias is not None or o.order is not None
    with on(logits.device):
        cache = tuning.cache_per_processor(logits.device)
        s = tuning.hierarchical(c, logits.itemsize, strides, aligned(logits, grad), twice, heavy, cache)
        hierarchical_kernel[(n,)](
            *(logits, target, grad_loss, loss, stats, grad, strides[0], strides[-1], target.stride(0)),
            *(0 if grad_loss is None else grad_loss.stride(0), n, c, len(o.path), len(o.node_begin), o.path.shape[1]),
            *(o.ignore_index, tree, Vectors(o.weight, o.class_bias, o.sample_weight)),
            BLOCK=s.block, LANES=s.lanes, VEC=s.vec, EDGES=s.edges,
            LEVELS=triton.next_power_of_2(o.path.shape[1]), INPLACE=grad is logits, num_warps=s.warps, **COMPILE,
        )  # fmt: skip


def _new_loss(logits: Tensor, options: HierarchicalOptions) -> tuple[Tensor, Tensor]:
    rows, depth = logits.shape[0], options.path.shape[1]
    loss = logits.new_empty((rows,), dtype=torch.float32)
    return loss, loss.new_empty((rows, 2 * depth + 1))


def hierarchical_loss(logits: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    options = HierarchicalOptions(*values)
    loss, stats = _new_loss(logits, options)
    _launch(logits, target, None, loss, stats, None, options)
    return loss, stats


def hierarchical_loss_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *values: Any
) -> Tensor:  # fmt: skip
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, None, stats.contiguous(), grad, HierarchicalOptions(*values))
    return grad


def hierarchical_loss_backward_(
    grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *values: Any
) -> None:  # fmt: skip
    _launch(logits, target, grad_loss, None, stats.contiguous(), logits, HierarchicalOptions(*values))


def hierarchical_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = HierarchicalOptions(*values)
    loss, stats = _new_loss(logits, options)
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, loss, stats, grad, options)
    return loss, stats, grad


def hierarchical_loss_and_grad_(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = HierarchicalOptions(*values)
    loss, stats = _new_loss(logits, options)
    _launch(logits, target, grad_loss, loss, stats, logits, options)
    return loss, stats
