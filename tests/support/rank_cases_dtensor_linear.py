"""What each rank does in the tests of the linear loss of DTensors; run by :mod:`ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

import cases
import longtail
from rank_cases import close_in_norm, digest, linear_truth, raised_by
from rank_cases_dtensor import mesh_of, placements_of
from tolerances import assert_close


def linear_case(
    group: Any,
    input_placed: str,
    weight_placed: str,
    option_set: str,
    reduction: str = "mean",
    gradient: str = "auto",
    rows: int = 12,
    classes: int = 13,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> str:
    """Loss and gradients of DTensors against the truth; placements: 'r' is Shard(0), 'f' Replicate()."""
    mesh = mesh_of(group, len(input_placed))
    _, target = cases.random_case(rows, classes, torch.float64, seed=rows)
    g = cases.generator(5)
    x, w = (torch.randn(n, 6, generator=g, dtype=torch.float64).to(dtype) for n in (rows, classes))
    b = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype) if bias else None
    options = cases.options(option_set, classes, target, dtype)
    loss, up, truth = linear_truth([x, w, b], target, reduction, options)
    placed = [placements_of(text) for text in (input_placed, weight_placed, weight_placed)]
    parts = [
        None if p is None else distribute_tensor(p, mesh, q).requires_grad_()
        for p, q in zip((x, w, b), placed, strict=True)
    ]
    got, stats = longtail.linear_cross_entropy(
        parts[0], parts[1], target, linear_bias=parts[2], reduction=reduction, gradient=gradient, chunk_size=5,
        return_stats=True, **options,
    )  # fmt: skip
    close_in_norm(got.full_tensor(), loss, dtype, "loss")
    upstream = distribute_tensor(up.to(got.dtype), mesh, got.placements)
    grads = torch.autograd.grad(got, [p for p in parts if p is not None], upstream)
    for grad, true, q in zip(grads, truth, placed, strict=False):
        assert tuple(grad.placements) == tuple(q)
        close_in_norm(grad.full_tensor(), true, dtype, "gradient")
    return digest(got.full_tensor(), stats.lse.full_tensor())


def linear_refused(group: Any, input_placed: str, weight_placed: str, **changes: Any) -> str:
    """The text of the error."""
    mesh = mesh_of(group, len(input_placed))
    x = distribute_tensor(torch.randn(changes.pop("rows", 8), 6), mesh, placements_of(input_placed))
    w = torch.randn(10, 6)
    weight = distribute_tensor(w, mesh, placements_of(weight_placed)) if weight_placed else w
    try:
        longtail.linear_cross_entropy(x, weight, torch.zeros(x.shape[0], dtype=torch.int64), **changes)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def backward_in_two_orders(group: Any) -> list[tuple[str, str]]:
    """Two losses of sharded rows, whose backward passes the last rank runs the other way round: what each raises."""
    mesh, losses = mesh_of(group, 1), []
    for seed in range(2):
        g = cases.generator(seed)
        x, w = torch.randn(6, 6, generator=g), torch.randn(10, 6, generator=g)
        parts = [distribute_tensor(p, mesh, placements_of(q)).requires_grad_() for p, q in ((x, "r"), (w, "f"))]
        losses.append(longtail.linear_cross_entropy(*parts, torch.arange(6)))
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    found = [raised_by(loss.backward) for loss in (losses[::-1] if last else losses)]
    longtail.linear_cross_entropy(*parts, torch.arange(6)).backward()
    return found


class Model(torch.nn.Module):
    """Features and a fused head, whose weight is whole inside ``forward``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = torch.nn.Linear(5, 6)
        self.loss = longtail.LinearCrossEntropyLoss(6, classes, bias=True, label_smoothing=0.1, focal_gamma=1.0)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.body(x).tanh(), target)
        return loss


def fsdp_recipe(group: Any) -> None:
    """Two steps under fully_shard are those of one process with all rows."""
    from torch.distributed.fsdp import fully_shard

    world, rank, classes = dist.get_world_size(group), dist.get_rank(group), 11
    torch.manual_seed(7)
    plain = Model(classes).double()
    torch.manual_seed(7)
    sharded = Model(classes).double()
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(sharded.loss, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (plain, sharded)]
    for step in range(2):
        g = cases.generator(step)
        x = torch.randn(6 * world, 5, generator=g, dtype=torch.float64)
        target = torch.randint(classes, (6 * world,), generator=g)
        mine = slice(6 * rank, 6 * rank + 6)
        for model, optimizer, rows in zip((plain, sharded), optimizers, (slice(None), mine), strict=True):
            optimizer.zero_grad()
            model(x[rows], target[rows]).backward()
            optimizer.step()
    for mine_, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(mine_, DTensor)
        assert_close(mine_.full_tensor().detach(), other.detach(), what="parameter", factor=64)
