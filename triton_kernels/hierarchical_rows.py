"""The parts of a row: what the kernel of the hierarchical cross-entropy loads, accumulates and stores around its math.

A ring's classes lie at its node's positions but for those of the node that follows on the path: at most two stretches.
Ring 0, beyond A_1, is swept in the order of memory with A_1 masked out; the others are gathered, one after the other.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hierarchical_math import Ring, accumulate_ring, combine_ring_lanes, combine_rings, empty_ring
from .loss_math import exp_cut
from .softmax_rows import edges


class Tree(NamedTuple):
    """Where the classes of a hierarchy lie: those of a node side by side, from position node_begin to node_end.

    order, position: class at a position, position of a class; None where they are the same.
    """

    path: Any  # [G, depth] of all classes, nodes from the top down to the class itself, which also fills the rest
    node_begin: Any
    node_end: Any
    node_weight: Any
    order: Any
    position: Any


class Path(NamedTuple):
    """Of A_(k+1) at level k, [LEVELS], but for the last; 0 beyond the tree's depth and in rows that do not count."""

    begin: Any
    end: Any
    weight: Any
    weight_above: Any  # of A_k
    column: Any  # of the target; -1 in rows that do not count, and where another shard has it


class Vectors(NamedTuple):
    """Optional constants, float32: weight [G], class_bias [C], sample_weight [N]."""

    weight: Any
    class_bias: Any
    sample_weight: Any


@triton.jit
def of_level(x, k, LEVELS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LEVELS) == k, x, 0), 0)


@triton.jit
def load_path(g, counted, classes, tree_classes, nodes, depth, tree, LEVELS: tl.constexpr):
    """The target's path. Nodes out of bounds, or not within each other, trap, and a path that ends elsewhere."""
    level = tl.arange(0, LEVELS)
    real = level < tl.where(counted, depth, 0)
    below = real & (level > 0)
    place = tree.path + g.to(tl.int64) * depth + level
    node, above = tl.load(place, mask=real, other=0), tl.load(place - 1, mask=below, other=0)
    known = (node >= 0) & (node < nodes) & (above >= 0) & (above < nodes)
    tl.device_assert(known, "longtail: path is out of bounds")
    begin = tl.load(tree.node_begin + node, mask=real & known, other=0)
    end = tl.load(tree.node_end + node, mask=real & known, other=0)
    outer_begin = tl.load(tree.node_begin + above, mask=below & known, other=0)
    outer_end = tl.load(tree.node_end + above, mask=below & known, other=classes)
    tl.device_assert((begin >= outer_begin) & (end <= outer_end) & (begin <= end), "longtail: nodes do not nest")
    weight = tl.load(tree.node_weight + node, mask=real & known, other=0.0)
    weight_above = tl.load(tree.node_weight + above, mask=below & known, other=0.0)
    place, count = of_level(begin, depth - 1, LEVELS), of_level(end - begin, depth - 1, LEVELS)
    column = load_target_column(g, counted, place, count, classes, tree_classes, tree)
    return Path(begin, end, weight, weight_above, column)


@triton.jit
def load_target_column(g, counted, place, count, classes, tree_classes, tree):
    """Where the target's path ends, at `count` classes from a place on: which has to be its own, or none in a shard."""
    column = place
    here = counted & (count == 1)
    if tree.order is not None:
        column = tl.load(tree.order + place, mask=here, other=0)
        inside = here & (column >= 0) & (column < classes)
        tl.device_assert(inside == here, "longtail: order is out of bounds")
        found = tl.load(tree.position + column, mask=inside, other=0)
        tl.device_assert((found == place) | (here == 0), "longtail: order and position differ")
    alone = tl.where(classes < tree_classes, count <= 1, (count == 1) & (column == g))
    tl.device_assert(alone | (counted == 0), "longtail: the last node of path is not its class alone")
    return tl.where(here, column, -1)


@triton.jit
def load_logits(z, classes, mask, bias, EVICT: tl.constexpr):
    """Logits as they are, and effective ones in float32, -inf where the mask is off."""
    raw = tl.load(z, mask=mask, other=float("-inf"), eviction_policy=EVICT)
    u = raw.to(tl.float32)
    if bias is not None:
        u += tl.load(bias + classes, mask=mask, other=0.0)
    return raw, u


@triton.jit
def in_node(cols, mask, first, last, tree):
    """Which classes lie at positions from first to last."""
    places = cols
    if tree.position is not None:
        places = tl.load(tree.position + cols, mask=mask, other=-1)
    return (places >= first) & (places < last)


@triton.jit
def load_beyond(z, cols, mask, first, last, tree, bias):
    """Effective logits of a block, -inf where a class lies in the node."""
    _, u = load_logits(z, cols, mask, bias, "")
    return tl.where(in_node(cols, mask, first, last, tree), float("-inf"), u)


@triton.jit
def sweep_beyond(
    z_row, z_body, head, body, counted, classes, first, last, tree, bias,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The stats of ring 0, all classes beyond A_1; every lane keeps its own until the end."""
    s = empty_ring(LANES)
    stop = tl.where(counted, body, 0)
    for start in range(0, stop, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        u = load_beyond(z_body + cols, head + cols, cols < stop, first, last, tree, bias)
        s = accumulate_ring(s, u.reshape(BLOCK // (LANES * VEC), LANES, VEC))
    s = combine_ring_lanes(s)
    if EDGES:
        edge = edges(head, body, classes, VEC)
        u = load_beyond(z_row + edge, edge, edge < tl.where(counted, classes, 0), first, last, tree, bias)
        s = combine_rings(s, combine_ring_lanes(accumulate_ring(empty_ring(1), u.reshape(1, 1, 2 * VEC))))
    return s


@triton.jit
def ring_block(start, begin, inner_begin, inner_end, end, classes, tree, RING: tl.constexpr):
    """Classes of a ring, at positions from begin to end but for those from inner_begin to inner_end, and a mask."""
    i = start + tl.arange(0, RING)
    mask = i < inner_begin - begin + end - inner_end
    places = tl.where(i < inner_begin - begin, begin + i, inner_end + i - (inner_begin - begin))
    if tree.order is not None:
        places = tl.load(tree.order + places, mask=mask, other=0)
        tl.device_assert((places >= 0) & (places < classes), "longtail: order is out of bounds")
    return places, mask


@triton.jit
def add_rings(outer, z_row, path, classes, depth, tree, bias, LEVELS: tl.constexpr, LANES: tl.constexpr):
    """The stats of all rings [LEVELS]: ring 0 given, the others from memory."""
    RING: tl.constexpr = 4 * LANES
    at = tl.arange(0, LEVELS)
    m, d = tl.where(at == 0, outer.m, float("-inf")), tl.where(at == 0, outer.d, 0.0)
    a, b = of_level(path.begin, 0, LEVELS), of_level(path.end, 0, LEVELS)
    for k in range(1, depth):
        inner_a, inner_b = of_level(path.begin, k, LEVELS), of_level(path.end, k, LEVELS)
        count = inner_a - a + b - inner_b
        if count > 0:
            s = empty_ring(LANES)
            for start in range(0, count, RING):
                cols, mask = ring_block(start, a, inner_a, inner_b, b, classes, tree, RING)
                _, u = load_logits(z_row + cols, cols, mask, bias, "")
                s = accumulate_ring(s, u.reshape(4, LANES, 1))
            s = combine_ring_lanes(s)
            m, d = tl.where(at == k, s.m, m), tl.where(at == k, s.d, d)
        a, b = inner_a, inner_b
    return Ring(tl.where(d == d, m, d), d)  # a maximum passes over NaN, a sum does not


@triton.jit
def store_rings(grad_row, z_row, grads, path, classes, depth, tree, bias,
                LEVELS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Writes the gradient of A_1's classes."""
    tl.store(grad_row + path.column, grads.target.to(grad_row.dtype.element_ty), mask=path.column >= 0)
    RING: tl.constexpr = 4 * LANES
    a, b = of_level(path.begin, 0, LEVELS), of_level(path.end, 0, LEVELS)
    for k in range(1, depth):
        inner_a, inner_b = of_level(path.begin, k, LEVELS), of_level(path.end, k, LEVELS)
        m, c = of_level(grads.m, k, LEVELS), of_level(grads.c, k, LEVELS)
        for start in range(0, inner_a - a + b - inner_b, RING):
            cols, mask = ring_block(start, a, inner_a, inner_b, b, classes, tree, RING)
            _, u = load_logits(z_row + cols, cols, mask, bias, "")
            e, _ = exp_cut(u - m)
            tl.store(grad_row + cols, (e * c).to(grad_row.dtype.element_ty), mask=mask)
        a, b = inner_a, inner_b


@triton.jit
def store_beyond(grad, z, cols, loaded, written, m, c, first, last, tree, bias, KEEP: tl.constexpr):
    raw, u = load_logits(z, cols, loaded, bias, "evict_first")
    e, _ = exp_cut(u - m)
    du = (e * c).to(grad.dtype.element_ty)
    if KEEP:
        du = tl.where(in_node(cols, loaded, first, last, tree), raw, du)
    tl.store(grad, du, mask=written)


@triton.jit
def sweep_grad(
    grad_row, grad_body, z_row, z_body, m, c, head, body, counted, classes, first, last, tree, bias,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of ring 0, last block first, and whatever over A_1, which stays as it is with KEEP."""
    end = tl.where(counted, body, 0)
    last_block = (tl.cdiv(body, BLOCK) - 1) * BLOCK
    for done in range(0, body, BLOCK):
        cols = last_block - done + tl.arange(0, BLOCK)
        store_beyond(
            grad_body + cols, z_body + cols, head + cols, cols < end, cols < body, m, c, first, last, tree, bias, KEEP
        )
    if EDGES:
        edge = edges(head, body, classes, VEC)
        loaded = edge < tl.where(counted, classes, 0)
        store_beyond(
            grad_row + edge, z_row + edge, edge, loaded, edge < classes, m, c, first, last, tree, bias, KEEP
        )  # fmt: skip
