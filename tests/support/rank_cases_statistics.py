"""What each rank does in the tests of row statistics over shared-out classes; run by :mod:`ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import cases
import longtail
from longtail import RowStatistics
from rank_cases import close_in_norm, digest, local_range, localised, raised_by
from rank_cases_dtensor import mesh_of, placements_of
from statistics_cases import weighted
from tolerances import assert_close, assert_same

DIMENSIONS = (4, 6)  # of the leading ones


def leading_case(group: Any, sizes: list[int], sequence_parallel: bool, shift: bool, reduction: str) -> str:
    """Linear loss of states (B, L, D), of which a rank may hold some sequences, against that of one process."""
    g, classes, dtype = cases.generator(4), sum(sizes), torch.float64
    x, w = (torch.randn(*shape, 5, generator=g, dtype=dtype) for shape in (DIMENSIONS, (classes,)))
    target = torch.randint(classes, DIMENSIONS, generator=g)
    target[1, 2] = cases.IGNORE
    v = torch.rand(DIMENSIONS, generator=g, dtype=dtype)
    options = {"shift": shift, "reduction": reduction, "sample_weight": v, "focal_gamma": 1.0}
    begin, end = local_range(group, sizes)
    share = DIMENSIONS[0] // dist.get_world_size(group)
    mine = slice(share * dist.get_rank(group), share * (dist.get_rank(group) + 1)) if sequence_parallel else slice(None)
    whole = x.clone().requires_grad_(), w.clone().requires_grad_()
    want = longtail.linear_cross_entropy(*whole, target, **options)
    up = torch.randn(want.shape, generator=g, dtype=dtype)
    want_grads = torch.autograd.grad(want, whole, up)
    parts = x[mine].clone().requires_grad_(), w[begin:end].clone().requires_grad_()
    got, stats = longtail.vocab_parallel_linear_cross_entropy(
        *parts, target, group=group, num_classes=classes, sequence_parallel=sequence_parallel, chunk_size=7,
        return_stats=True, **options,
    )  # fmt: skip
    assert got.shape == want.shape
    assert stats.lse.shape == DIMENSIONS
    close_in_norm(got.detach(), want.detach(), dtype, "loss")
    grads = torch.autograd.grad(got, parts, up)
    for grad, true in zip(grads, (want_grads[0][mine], want_grads[1][begin:end]), strict=True):
        close_in_norm(grad, true, dtype, "gradient")
    return digest(got, *stats)


def statistics_options(classes: int, tail: bool = False) -> dict[str, Any]:
    """``tail``: with what the target brings to the logits of other classes."""
    g = cases.generator(2)
    names = ("class_bias", "class_margin", *("class_scale", "target_scale", "class_mitigation") * tail)
    vectors = {name: torch.rand(classes, generator=g, dtype=torch.float64) for name in names}
    return {"temperature": 1.7, "scale": 1.3, "softcap": 8.0, "compensation": 0.8 * tail, **vectors}


def assert_statistics(got: RowStatistics, want: RowStatistics) -> None:
    for name, x, y in zip(RowStatistics._fields[:5], got, want, strict=False):
        assert_close(x.detach(), y.detach().double(), what=name, factor=8)
    assert torch.equal(got.correct, want.correct)


def logits_case(
    group: Any,
    sizes: list[int],
    dtype: torch.dtype = torch.float64,
    gradient: str = "backward",
    own_vectors: bool = False,
    order: list[int] | None = None,
    rows: int = 7,
    tail: bool = False,
) -> str:
    """Statistics and gradient of local logits against those of the whole; returns a digest of the statistics."""
    classes = sum(sizes)
    logits, target = cases.random_case(rows, classes, dtype, seed=rows)
    if rows > 2:
        logits[0, target[0]] += 60  # saturated, and at another rank's classes
        logits[2, (target[2] + 1) % classes] = -torch.inf
    options = statistics_options(classes, tail)
    whole = logits.clone().double().requires_grad_()
    want = longtail.row_statistics(whole, target, **options)
    (want_grad,) = torch.autograd.grad(weighted(want), whole)
    begin, end = local_range(group, sizes, order)
    local = cases.poison_ignored(logits, target)[:, begin:end].clone().requires_grad_()
    given = localised(options, begin, end) if own_vectors else options
    found = longtail.vocab_parallel_row_statistics(
        local * 1.0, target, group=group, num_classes=classes, class_start=None if order is None else begin,
        gradient=gradient, **given,
    )  # fmt: skip
    eager = longtail.row_statistics(logits, target, **options)
    assert_statistics(found, want if dtype == torch.float64 else eager)
    (grad,) = torch.autograd.grad(weighted(found), local)
    assert grad.dtype == dtype
    assert_close(grad, want_grad[:, begin:end], what="gradient", factor=8.0)
    ignored = target == cases.IGNORE
    assert_same(grad[ignored], torch.zeros_like(grad[ignored]), "gradient of ignored rows")
    return digest(*found)


def linear_case(
    group: Any,
    sizes: list[int],
    sequence_parallel: bool,
    shift: bool = False,
    dtype: torch.dtype = torch.float64,
    chunk_size: int | None = 7,
    trains: str = "iwb",
    tail: bool = False,
) -> str:
    """Statistics and gradients of hidden states (B, L, D) against those of one process."""
    g, classes = cases.generator(4), sum(sizes)
    shapes = ((*DIMENSIONS, 5), (classes, 5), (classes,))
    x, w, b = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    target = torch.randint(classes, DIMENSIONS, generator=g)
    target[1, 2] = cases.IGNORE
    options: dict[str, Any] = {**statistics_options(classes, tail), "shift": shift}
    begin, end = local_range(group, sizes)
    share = DIMENSIONS[0] // dist.get_world_size(group)
    mine = slice(share * dist.get_rank(group), share * (dist.get_rank(group) + 1)) if sequence_parallel else slice(None)
    whole = [p.clone().double().requires_grad_() for p in (x, w, b)]
    want = longtail.linear_row_statistics(whole[0], whole[1], target, linear_bias=whole[2], **options)
    truth = torch.autograd.grad(weighted(want), whole)
    if not shift:
        x[1, 2] = torch.nan
    parts = [
        p.clone().requires_grad_(letter in trains)
        for p, letter in zip((x[mine], w[begin:end], b[begin:end]), "iwb", strict=True)
    ]
    found = longtail.vocab_parallel_linear_row_statistics(
        parts[0], parts[1], target, linear_bias=parts[2], group=group, num_classes=classes, chunk_size=chunk_size,
        sequence_parallel=sequence_parallel, **options,
    )  # fmt: skip
    assert found.lse.shape == DIMENSIONS
    if dtype == torch.float64:
        assert_statistics(found, want)
    wanted = [p for p in parts if p.requires_grad]
    loss = weighted(found)
    for again in (True, False):
        grads = iter(torch.autograd.grad(loss, wanted, retain_graph=again)) if trains else iter(())
        for part, true in zip(parts, (truth[0][mine], truth[1][begin:end], truth[2][begin:end]), strict=True):
            if part.requires_grad:
                close_in_norm(next(grads), true, dtype, "gradient")
    return digest(*found)


def mistaken(group: Any, linear: bool, **odd: Any) -> tuple[str, str]:
    """The last rank passes other options than the others: (type, text) of what this one raises; calls go on after."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    given = {"group": group, "num_classes": 4 * dist.get_world_size(group)}
    x, w, target = torch.randn(6, 3), torch.randn(4, 3), torch.arange(6) % 4
    data = (x, w, target) if linear else (x @ w.T, target)
    name = "vocab_parallel_linear_row_statistics" if linear else "vocab_parallel_row_statistics"
    result = raised_by(lambda: getattr(longtail, name)(*data, **given, **(odd if last else {})))
    getattr(longtail, name)(*data, **given)
    return result


def assert_global(found: RowStatistics, want: RowStatistics) -> RowStatistics:
    """That DTensors hold the statistics of all rows; these."""
    whole = RowStatistics(*(x.full_tensor().detach() for x in found))
    assert_statistics(whole, want)
    return whole


def loss_of(found: RowStatistics, up: Tensor) -> Tensor:
    """Of DTensors or plain tensors alike."""
    # No mean: torch 2.11 subtracts none of a DTensor from a sum.
    return ((found.log_prob * found.entropy + found.lse) * up - found.complement_entropy / len(up)).sum()


def upstream_of(found: RowStatistics, up: Tensor) -> Tensor:
    """As a DTensor where the statistics are."""
    lse = found.lse
    return distribute_tensor(up, lse.device_mesh, lse.placements) if isinstance(lse, DTensor) else up


def dtensor_case(group: Any, placed: str, plain_target: bool = False) -> str:
    """Statistics and gradient of a DTensor of logits; placements as in :mod:`rank_cases_dtensor`."""
    mesh, placements = mesh_of(group, len(placed)), placements_of(placed)
    logits, target = cases.random_case(9, 13, torch.float64)
    options, up = statistics_options(13, tail=True), torch.rand(9, generator=cases.generator(6), dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    want = longtail.row_statistics(whole, target, **options)
    (want_grad,) = torch.autograd.grad(loss_of(want, up), whole)
    x = distribute_tensor(logits, mesh, placements).requires_grad_()
    rows = [p if p == Shard(0) else Replicate() for p in placements]
    found = longtail.row_statistics(x, target if plain_target else distribute_tensor(target, mesh, rows), **options)
    (grad,) = torch.autograd.grad(loss_of(found, upstream_of(found, up)), x)
    assert tuple(grad.placements) == tuple(placements)
    assert_close(grad.full_tensor(), want_grad, what="gradient", factor=4)
    return digest(*assert_global(found, want))


def dtensor_linear_case(group: Any, input_placed: str, weight_placed: str, shift: bool, plain: bool = False) -> str:
    """The same of hidden states; and the linear loss of them, whose ``shift`` moves targets over ranks."""
    mesh, g = mesh_of(group, len(input_placed)), cases.generator(5)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((12, 6), (13, 6), (13,)))
    _, target = cases.random_case(12, 13, torch.float64)
    v, up = (torch.rand(12, generator=g, dtype=torch.float64) for _ in range(2))
    options: dict[str, Any] = {**statistics_options(13, tail=True), "chunk_size": 5, "shift": shift}
    whole = [p.clone().requires_grad_() for p in (x, w, b)]
    want = longtail.linear_row_statistics(whole[0], whole[1], target, linear_bias=whole[2], **options)
    want_loss = longtail.linear_cross_entropy(*whole[:2], target, sample_weight=v, shift=shift)
    want_grads = torch.autograd.grad(loss_of(want, up) + want_loss, whole)
    placed = [placements_of(text) for text in (input_placed, weight_placed, weight_placed)]
    parts = [distribute_tensor(p, mesh, q).requires_grad_() for p, q in zip((x, w, b), placed, strict=True)]
    rows = [Replicate()] * mesh.ndim if plain else placed[0]
    given, weights = (distribute_tensor(y, mesh, rows) for y in (target, v))
    if plain:
        given, weights = target, v
    found = longtail.linear_row_statistics(parts[0], parts[1], given, linear_bias=parts[2], **options)
    loss = longtail.linear_cross_entropy(*parts[:2], given, sample_weight=weights, shift=shift)
    grads = torch.autograd.grad(loss_of(found, upstream_of(found, up)) + loss, parts)
    assert_close(loss.full_tensor(), want_loss.detach())
    for grad, true, q in zip(grads, want_grads, placed, strict=True):
        assert tuple(grad.placements) == tuple(q)
        close_in_norm(grad.full_tensor(), true, torch.float64, "gradient")
    return digest(*assert_global(found, want))


def dtensor_refused(group: Any, **odd: Any) -> tuple[str, str]:
    """The last rank passes other options than the others: (type, text) of what this one raises."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    x = distribute_tensor(torch.randn(6, 8), mesh_of(group, 1), placements_of("c"))
    return raised_by(lambda: longtail.row_statistics(x, torch.arange(6), **(odd if last else {})))
