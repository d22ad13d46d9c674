"""What each rank does in the tests of hierarchical cross-entropy over shared-out classes; run by :mod:`ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cases
import hierarchy_cases
import longtail
from hierarchy_cases import Path, ragged_paths
from longtail import Hierarchy
from rank_cases import close_in_norm, digest, local_range, localised, raised_by
from tolerances import assert_close, assert_same

ALPHA, FEATURES = 0.3, 10
VECTORS = ("weight", "class_bias", "sample_weight")
# Classes of which ranks hold two, three or none share nodes at every level.
SATURATED = ("t/g/x", "o/p/q", "t/g/y", "t/z", "o/p/r", "u", "o/s")
GAPS = (20.0, 100.0, 1e4)


def tree(classes: int, depth: int, ordered: bool) -> tuple[Hierarchy, list[Path]]:
    """With nodes of two classes up to nearly all at every level."""
    names = ragged_paths(classes, depth, ordered, names=2)
    return Hierarchy.from_paths(names), names


def options_of(classes: int, target: Tensor, dtype: torch.dtype, names: tuple[str, ...]) -> cases.Options:
    found = hierarchy_cases.vectors(classes, target.numel(), dtype)
    return {k: x.reshape(target.shape) if k == "sample_weight" else x for k, x in found.items() if k in names}


def reduced(each: Tensor, target: Tensor, reduction: str, options: cases.Options) -> Tensor:
    """As the documentation has it, of the losses of rows."""
    if reduction == "none":
        return each
    counted, normalizer = target != cases.IGNORE, options.get("normalizer")
    if reduction == "sum":
        return each.sum()
    if normalizer is None:
        weight = options.get("weight")
        normalizer = counted.sum() if weight is None else weight.double()[target[counted]].sum()
    return each.sum() / (counted.sum() if isinstance(normalizer, str) else normalizer)


def truth_of(
    logits: Tensor, target: Tensor, names: list[Path], reduction: str, options: cases.Options, dtype: torch.dtype
) -> Tensor:
    """The loss of the whole by the paper's formula, with its graph, in the dtype of the logits."""
    vectors = {k: x.to(dtype).flatten() for k, x in options.items() if k in VECTORS}
    each = logits.sum(1)
    if len(target):
        each = hierarchy_cases.losses(logits, target, names, ALPHA, **vectors)
    return reduced(each, target, reduction, options)


def upstream(loss: Tensor) -> Tensor:
    return torch.randn(loss.shape, generator=cases.generator(11), dtype=torch.float64)


def logits_case(
    group: Any,
    sizes: list[int],
    depth: int = 3,
    ordered: bool = False,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    own: bool = False,
    gradient: str = "backward",
    rows: int = 7,
    order: list[int] | None = None,
    one_owner: int | None = None,
    ignore_index: int = cases.IGNORE,
    vectors: tuple[str, ...] = VECTORS,
    extra: cases.Options | None = None,
) -> str:
    """Loss and gradient of one call against the paper's formula; returns a digest of the loss."""
    classes = sum(sizes)
    hierarchy, names = tree(classes, depth, ordered)
    assert hierarchy.depth == depth
    assert (hierarchy.tables().position is None) == (ordered or depth == 1)
    logits, target = cases.random_case(rows, classes, dtype, seed=rows)
    target = target.masked_fill(target == ignore_index, cases.IGNORE)
    logits = cases.poison_ignored(logits, target)
    if one_owner is not None:
        target = target.where(target == cases.IGNORE, sum(sizes[:one_owner]) + target % sizes[one_owner])
    options = options_of(classes, target, dtype, vectors) | (extra or {})
    found = []
    for wide in (torch.float64, cases.vector_dtype(dtype)):
        x = logits.to(wide).requires_grad_()
        loss = truth_of(x, target, names, reduction, options, wide)
        up = upstream(loss)
        found += [loss.detach(), *torch.autograd.grad(loss, x, up.to(wide))]
    truth, true_grad, eager, eager_grad = found
    begin, end = local_range(group, sizes, order)
    local = logits[:, begin:end].clone().requires_grad_()
    got = longtail.vocab_parallel_hierarchical_cross_entropy(
        local * 1.0, target.masked_fill(target == cases.IGNORE, ignore_index), hierarchy, ALPHA, group=group,
        class_start=None if order is None else begin, ignore_index=ignore_index, reduction=reduction,
        gradient=gradient, **(localised(options, begin, end) if own else options),
    )  # fmt: skip
    assert got.dtype == cases.vector_dtype(dtype)
    assert_close(got, truth, eager, what="loss", factor=4)
    (grad,) = torch.autograd.grad(got, local, up.to(got.dtype))
    assert grad.dtype == dtype
    cut = true_grad[:, begin:end], eager_grad[:, begin:end]
    assert_close(grad, *cut, what="gradient", factor=4 if dtype.itemsize >= 4 else 6)
    ignored = target == cases.IGNORE
    assert_same(grad[ignored], torch.zeros_like(grad[ignored]), "gradient of ignored rows")
    return digest(got)


def saturated_rows() -> tuple[Tensor, Tensor]:
    """Logits, float64, and targets: rings of classes far above and far below those that they surround.

    One level at a time, and neighbouring ones against each other.
    """
    paths = [tuple(path.split("/")) for path in SATURATED]
    logits, targets = [], []
    for g, path in enumerate(paths):
        common = [sum(a == b for a, b in zip(path, other, strict=False)) for other in paths]  # of the class itself, all
        rings = torch.tensor([-1 if j == g else k for j, k in enumerate(common)])
        for k in range(len(path)):
            for gap in GAPS:
                for sign, above in ((1.0, 0.0), (-1.0, 0.0), (1.0, -gap), (-1.0, gap)):
                    row = torch.randn(len(paths), generator=cases.generator(len(logits)), dtype=torch.float64)
                    row[rings == k] += sign * gap
                    row[rings == k - 1] += above
                    logits.append(row.float().double())  # so that float32 can begin with the same
                    targets.append(g)
    return torch.stack(logits), torch.tensor(targets)


def saturated_case(group: Any, sizes: list[int], dtype: torch.dtype, gradient: str) -> str:
    """Every loss and every gradient to its own digits, as one process has them in float64."""
    hierarchy = Hierarchy.from_paths(SATURATED)
    logits, target = saturated_rows()
    x = logits.clone().requires_grad_()
    truth = longtail.hierarchical_cross_entropy(x, target, hierarchy, ALPHA, reduction="none")
    (true_grad,) = torch.autograd.grad(truth.sum(), x)
    begin, end = local_range(group, sizes)
    local = logits[:, begin:end].to(dtype).requires_grad_()
    got = longtail.vocab_parallel_hierarchical_cross_entropy(
        local * 1.0, target, hierarchy, ALPHA, group=group, reduction="sum", gradient=gradient
    )
    (grad,) = torch.autograd.grad(got, local)
    each = longtail.vocab_parallel_hierarchical_cross_entropy(
        local.detach(), target, hierarchy, ALPHA, group=group, reduction="none"
    )
    allowed, smallest = (1e-12, 1e-300) if dtype == torch.float64 else (4e-6, 1e-36)
    for found, want, slack in ((each, truth, 1.0), (grad, true_grad[:, begin:end], 8.0)):
        error = (found.double() - want).abs()
        assert (error <= slack * allowed * want.abs() + smallest).all(), (error / want.abs()).nan_to_num().max()
    return digest(each, got)


def infinite_case(group: Any, sizes: list[int], gradient: str) -> str:
    """Targets, ranks, rings and rows without mass, and undefined logits: not finite where one process is not."""
    classes, hierarchy = len(SATURATED), Hierarchy.from_paths(SATURATED)
    logits, target = torch.randn(8, classes, generator=cases.generator(1)), torch.tensor([0, 5, 4, 0, 6, 1, 2, 3])
    logits[0, [1, 4, 5, 6]] = -torch.inf  # all but those below the target's topmost node
    logits[1, target[1]] = logits[2, target[2]] = -torch.inf
    logits[3, sizes[0] :] = logits[4, : sizes[0]] = -torch.inf
    logits[5] = -torch.inf
    logits[6, 0] = torch.nan  # of a sibling of the target's
    logits[7, target[7]] = torch.nan
    x = logits.double().requires_grad_()
    truth = longtail.hierarchical_cross_entropy(x, target, hierarchy, ALPHA, reduction="none")
    (true_grad,) = torch.autograd.grad(truth, x, torch.ones_like(truth))
    begin, end = local_range(group, sizes)
    local = logits[:, begin:end].clone().requires_grad_()
    kept = gradient != "backward"
    got = longtail.vocab_parallel_hierarchical_cross_entropy(
        local * 1.0, target, hierarchy, ALPHA, group=group, reduction="sum" if kept else "none", gradient=gradient
    )
    assert_close(got.detach(), truth.detach().sum() if kept else truth.detach(), what="loss", factor=2)
    (grad,) = torch.autograd.grad(got, local, torch.ones_like(got))
    assert_close(grad[:6], true_grad[:6, begin:end], what="gradient", factor=4)
    parts = [torch.empty(0)] * dist.get_world_size(group)
    dist.all_gather_object(parts, grad[6:], group=group)
    assert torch.cat(parts, 1).isnan().any(1).all()
    return digest(got)


def linear_case(
    group: Any,
    sizes: list[int],
    depth: int = 3,
    ordered: bool = False,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    own: bool = False,
    gradient: str = "auto",
    leading: tuple[int, ...] = (24,),
    shift: bool = False,
    sequence_parallel: bool = False,
    chunk_size: int | None = 7,
    ignore_index: int = cases.IGNORE,
    trains: str = "iwb",
    bias: bool = True,
    vectors: tuple[str, ...] = VECTORS,
) -> str:
    """Loss and gradients of one call against the paper's formula; returns a digest of the loss."""
    classes, world, rank = sum(sizes), dist.get_world_size(group), dist.get_rank(group)
    hierarchy, names = tree(classes, depth, ordered)
    g = cases.generator(21)
    shapes = [(*leading, FEATURES), (classes, FEATURES), (classes,)][: 2 + bias]
    whole = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    target = torch.randint(classes, leading, generator=g)
    target[(torch.rand(leading, generator=g) < 0.2) | (target == ignore_index)] = cases.IGNORE
    options = options_of(classes, target, dtype, vectors)
    moved = {k: next_one(x, 0) if shift and k == "sample_weight" else x for k, x in options.items()}
    effective = next_one(target, cases.IGNORE) if shift else target
    wide = [x.clone().double().requires_grad_() for x in whole]
    logits = torch.nn.functional.linear(*wide).flatten(0, -2)
    loss = truth_of(logits, effective.flatten(), names, reduction, moved, torch.float64)
    loss = loss.reshape(leading) if reduction == "none" else loss
    up = upstream(loss)
    truth = list(torch.autograd.grad(loss, wide, up))
    mine = whole[0].masked_fill((effective == cases.IGNORE)[..., None], torch.nan)
    begin, end = local_range(group, sizes)
    if sequence_parallel:
        mine, truth[0] = (x.tensor_split(world)[rank] for x in (mine, truth[0]))
    held = mine, *(x[begin:end] for x in whole[1:])
    parts = [x.clone().requires_grad_(i in trains) for i, x in zip("iwb", held, strict=False)]
    got = longtail.vocab_parallel_linear_hierarchical_cross_entropy(
        parts[0], parts[1], target.masked_fill(target == cases.IGNORE, ignore_index), hierarchy, ALPHA,
        linear_bias=parts[2] if bias else None, group=group, sequence_parallel=sequence_parallel,
        ignore_index=ignore_index, shift=shift, chunk_size=chunk_size, reduction=reduction, gradient=gradient,
        **(localised(options, begin, end) if own else options),
    )  # fmt: skip
    assert got.dtype == cases.vector_dtype(dtype)
    close_in_norm(got.detach(), loss.detach(), dtype, "loss")
    wanted = [i for i, x in enumerate(parts) if x.requires_grad]
    assert got.requires_grad == bool(wanted)
    if wanted:
        grads = torch.autograd.grad(got, [parts[i] for i in wanted], up.to(got.dtype))
        for i, grad in zip(wanted, grads, strict=True):
            assert grad.dtype == dtype
            close_in_norm(grad, truth[i] if i == 0 else truth[i][begin:end], dtype, f"gradient of {'iwb'[i]}")
        if 0 in wanted:
            assert (grads[0][mine.isnan().any(-1)] == 0).all(), "gradient of ignored rows"
    return digest(got)


def next_one(x: Tensor, last: int) -> Tensor:
    """What stands one further on in each sequence."""
    found = torch.full_like(x, last)
    found[..., :-1] = x[..., 1:]
    return found


def several_losses(group: Any, sizes: list[int], gradient: str) -> None:
    """Of trees of several depths, over other hidden states, before one backward."""
    classes, (begin, end) = sum(sizes), local_range(group, sizes)
    g = cases.generator(3)
    w = torch.randn(classes, FEATURES, generator=g, dtype=torch.float64)
    local, whole, total, true_total = w[begin:end].clone().requires_grad_(), w.requires_grad_(), 0.0, 0.0
    for depth in (8, 1, 3):
        hierarchy, names = tree(classes, depth, ordered=False)
        x = torch.randn(5, FEATURES, generator=g, dtype=torch.float64)
        target = torch.randint(classes, (5,), generator=g)
        given = {"group": group, "gradient": gradient, "chunk_size": 2}
        loss = longtail.vocab_parallel_linear_hierarchical_cross_entropy(x, local, target, hierarchy, ALPHA, **given)
        total = total + depth * loss
        true_total = true_total + depth * hierarchy_cases.losses(x @ whole.T, target, names, ALPHA).mean()
    (grad,), (truth,) = torch.autograd.grad(total, local), torch.autograd.grad(true_total, whole)
    close_in_norm(grad, truth[begin:end], torch.float64, "gradient")


def layer_that_is_shared_out(group: Any, sizes: list[int]) -> None:
    """Of a classifier before the loss: each rank's part of the gradient of what it was given adds up to the whole."""
    classes, (begin, end) = sum(sizes), local_range(group, sizes)
    hierarchy, names = tree(classes, 3, ordered=False)
    g = cases.generator(3)
    x, w = (torch.randn(n, FEATURES, generator=g, dtype=torch.float64, requires_grad=True) for n in (5, classes))
    target = torch.randint(classes, (5,), generator=g)
    truth = torch.autograd.grad(hierarchy_cases.losses(x @ w.T, target, names, ALPHA).mean(), (x, w))
    own = w.detach()[begin:end].requires_grad_()
    loss = longtail.vocab_parallel_hierarchical_cross_entropy(x @ own.T, target, hierarchy, ALPHA, group=group)
    part, grad = torch.autograd.grad(loss, (x, own))
    dist.all_reduce(part, group=group)
    close_in_norm(part, truth[0], torch.float64, "gradient of x")
    close_in_norm(grad, truth[1][begin:end], torch.float64, "gradient of w")


PATHS = ("a/b/0", "a/b/1", "a/2", "a/3", "c/4", "c/5", "c/6", "7")


def disagreeing(group: Any, kind: str, odd: dict[str, Any], rank: int | None = 1) -> tuple[str, str]:
    """``rank`` passes other arguments than the others, or all of them do: (type, text) of what this one raises."""
    given: dict[str, Any] = {"alpha": ALPHA, "paths": PATHS, "shape": (6, 4), "target": torch.arange(6) % 4}
    if kind == "linear":
        given |= {"linear_weight": torch.randn(4, 3), "shape": (6, 3)}
    if rank is None or dist.get_rank(group) == rank:
        given |= odd
    paths, data = given.pop("paths"), torch.randn(given.pop("shape"))
    given.setdefault("hierarchy", paths and Hierarchy.from_paths(paths))
    name = "vocab_parallel_" + ("linear_" if kind == "linear" else "") + "hierarchical_cross_entropy"
    return raised_by(lambda: getattr(longtail, name)(data, group=group, **given))


def calls_after_a_mistake(group: Any, kind: str) -> None:
    """A mistake that every rank makes leaves the group in order."""
    for wrong in ({"alpha": -1.0}, {"hierarchy": None}, {"paths": PATHS[:7]}, {"paths": (*PATHS, "9")}):
        assert disagreeing(group, kind, wrong, None)[0]
        assert disagreeing(group, kind, {}) == ("", "nothing was raised")
