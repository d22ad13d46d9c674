"""What each rank does in the tests of DTensors; run by :mod:`ranks`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import cases
import longtail
from rank_cases import VECTORS, close_in_norm, digest, truth_of
from tolerances import assert_close


@functools.cache
def mesh_2d() -> DeviceMesh:
    """2 x 2, of all 4 ranks."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def mesh_of(group: Any, dims: int) -> DeviceMesh:
    return mesh_2d() if dims == 2 else DeviceMesh.from_group(group, "cpu")


def placements_of(text: str) -> list[Any]:
    """'rc' is [Shard(0), Shard(1)]: rows, classes, full (replicated), partial."""
    return [{"r": Shard(0), "c": Shard(1), "f": Replicate(), "p": Partial()}[letter] for letter in text]


def cross_entropy_case(
    group: Any,
    placed: str,
    option_set: str,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    gradient: str = "backward",
    rows: int = 9,
    classes: int = 13,
    plain: bool = False,
    extra: dict[str, Any] | None = None,
) -> str:
    """Loss and gradient of a DTensor against the truth; returns a digest of the whole loss."""
    mesh, placements = mesh_of(group, len(placed)), placements_of(placed)
    logits, target = cases.random_case(rows, classes, dtype, seed=rows)
    options = cases.options(option_set, classes, target, dtype) | (extra or {})
    loss, up, grad = truth_of(logits, target, reduction, options)
    x = distribute_tensor(logits, mesh, placements).requires_grad_()
    row_placements = [p if p == Shard(0) else Replicate() for p in placements]
    given = dict(options)
    g: Tensor = target
    if not plain:
        g = distribute_tensor(target, mesh, row_placements)
        if "sample_weight" in given:
            given["sample_weight"] = distribute_tensor(given["sample_weight"], mesh, row_placements)
        for name in (name for name in VECTORS if name in given):
            given[name] = distribute_tensor(
                given[name], mesh, [Shard(0) if p == Shard(1) else Replicate() for p in placements]
            )
    got, stats = longtail.cross_entropy(x * 1.0, g, reduction=reduction, gradient=gradient, return_stats=True, **given)
    assert isinstance(got, DTensor)
    whole = got.full_tensor()
    factor = 4.0 if dtype.itemsize >= 4 else 6.0
    assert_close(whole, loss, what="loss", factor=factor)
    upstream = up.to(got.dtype)
    upstream = distribute_tensor(upstream, mesh, got.placements)
    (got_grad,) = torch.autograd.grad(got, x, upstream)
    assert tuple(got_grad.placements) == tuple(placements)
    assert_close(got_grad.full_tensor(), grad, what="gradient", factor=factor)
    _, expected = longtail.cross_entropy(logits, target, return_stats=True, **options)
    assert_close(stats.log_prob.full_tensor(), expected.log_prob.double(), what="log_prob", factor=8)
    assert torch.equal(stats.correct.full_tensor(), expected.correct)
    return digest(whole)


def backward_of_the_loss(_group: Any) -> None:
    """``loss.backward()``, without an upstream gradient; the optimizer's step is that of the unsharded model."""
    mesh = mesh_2d()
    logits, target = cases.random_case(8, 6)
    x = distribute_tensor(logits, mesh, [Shard(0), Shard(1)]).requires_grad_()
    longtail.cross_entropy(x, target, label_smoothing=0.1).backward()
    z = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(z, target, label_smoothing=0.1).backward()
    assert_close(x.grad.full_tensor(), z.grad, factor=4)


def colwise_recipe(group: Any) -> None:
    """The documented recipe: ColwiseParallel head that keeps its DTensor, then the loss."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def model() -> torch.nn.Sequential:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 11)).double()

    inputs, target = torch.randn(7, 5, dtype=torch.float64), torch.arange(7)
    plain = model()
    longtail.cross_entropy(plain(inputs), target, focal_gamma=2.0).backward()
    sharded = model()
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(sharded, DeviceMesh.from_group(group, "cpu"), {"2": head})
    loss = longtail.cross_entropy(sharded(inputs), target, focal_gamma=2.0)
    loss.backward()
    for mine, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        grad = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        assert_close(grad, other.grad, factor=16)


def refused(group: Any, placed: str, shape: tuple[int, ...] = (6, 8), **changes: Any) -> str:
    """The text of the error."""
    mesh = mesh_of(group, len(placed))
    if "p" in placed:
        x = DTensor.from_local(torch.randn(shape), mesh, placements_of(placed))
    else:
        x = distribute_tensor(torch.randn(shape), mesh, placements_of(placed))
    target = changes.pop("target", torch.zeros(shape[0], dtype=torch.int64))
    try:
        longtail.cross_entropy(x, target, **changes)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def sharded(mesh: DeviceMesh, shape: tuple[int, int], placements: list[Any]) -> DTensor:
    """Some DTensor, made without a collective."""
    local = list(shape)
    for place in placements:
        if isinstance(place, Shard):
            local[place.dim] //= 2
    return DTensor.from_local(
        torch.randn(local), mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )


def refused_by_one(_group: Any, odd: dict[str, Any], rank: int, loss: str = "cross_entropy") -> str:
    """The text of the error where one rank of the 2 x 2 mesh passes other arguments than the others.

    All ranks have passed either before.
    """
    mesh = mesh_2d()

    def call(target: Any = None, placed: str = "rc", **given: Any) -> None:
        target = torch.arange(6) if target is None else target
        placements = placements_of(placed)
        if loss == "linear":
            weight = sharded(mesh, (8, 3), [Replicate(), Shard(0)])
            longtail.linear_cross_entropy(sharded(mesh, (6, 3), [placements[0], Replicate()]), weight, target, **given)
        else:
            getattr(longtail, loss)(sharded(mesh, (6, 8), placements), target, **given)

    for given in ({}, odd):
        with contextlib.suppress(ValueError, TypeError):
            call(**given)
    try:
        call(**odd if dist.get_rank() == rank else {})
    except (ValueError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = "nothing was raised"
    call()
    return found


def compiled(group: Any) -> None:
    """Under torch.compile, which breaks its graph at the loss, gradients are those without it."""
    mesh, rank = mesh_of(group, 1), dist.get_rank(group)
    logits, target = cases.random_case(5, 8, torch.float64)
    w = torch.randn(8, 3, generator=cases.generator(5), dtype=torch.float64)
    x = logits[:, :3]
    placed = [(logits, Shard(1)), (x, Replicate()), (w, Shard(0))]
    z, x_, w_ = (distribute_tensor(value, mesh, [place]).requires_grad_() for value, place in placed)
    local_z, local_w = (value.detach().to_local().clone().requires_grad_() for value in (z, w_))
    shared = {"group": group, "num_classes": 8}
    uses: list[Any] = [
        (lambda a: longtail.vocab_parallel_cross_entropy(a * 2, target, **shared) * 3, [local_z]),
        (lambda a: longtail.vocab_parallel_linear_cross_entropy(x * 2, a * 2, target, **shared) * 3, [local_w]),
        (lambda a: longtail.cross_entropy(a * 2, target) * 3, [z]),
        (lambda a, b: longtail.linear_cross_entropy(a * 2, b * 2, target) * 3, [x_, w_]),
    ]
    for function, given in uses:
        expected = torch.autograd.grad(function(*given), given)
        got = torch.autograd.grad(torch.compile(function, backend="eager")(*given), given)
        for one, other in zip(got, expected, strict=True):
            assert type(one) is type(other)
            one, other = (g.to_local() if isinstance(g, DTensor) else g for g in (one, other))
            assert other.abs().max() > 0, rank
            assert_close(one, other)


def target_outside(_group: Any) -> str:
    """A target out of bounds in the rows of one rank."""
    mesh = mesh_2d()
    x = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0), Shard(1)])
    target = torch.zeros(8, dtype=torch.int64)
    target[6] = 6
    try:
        longtail.cross_entropy(x, target, reduction="none")
    except IndexError as error:
        return str(error)
    return "nothing was raised"


def inplace_overwrites_what_others_saved(group: Any) -> None:
    mesh = mesh_of(group, 1)
    x = distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]).requires_grad_()
    y = x.exp()  # saves its result
    loss = longtail.cross_entropy(y, torch.arange(4), gradient="inplace")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    target = distribute_tensor(torch.arange(4), mesh, [Replicate()])
    with pytest.raises(TypeError, match="target is a DTensor"):
        longtail.cross_entropy(torch.randn(4, 6), target)


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
    wide = [None if p is None else p.clone().double().requires_grad_() for p in (x, w, b)]
    logits = torch.nn.functional.linear(*wide)  # type: ignore[arg-type]
    loss = longtail.reference.cross_entropy(logits, target, reduction=reduction, **cases.to_float64(options))
    up = torch.randn(loss.shape, generator=cases.generator(11), dtype=torch.float64)
    truth = torch.autograd.grad(loss, [p for p in wide if p is not None], up)
    placed = [placements_of(text) for text in (input_placed, weight_placed, weight_placed)]
    parts = [
        None if p is None else distribute_tensor(p, mesh, q).requires_grad_()
        for p, q in zip((x, w, b), placed, strict=True)
    ]
    got, stats = longtail.linear_cross_entropy(
        parts[0], parts[1], target, linear_bias=parts[2], reduction=reduction, gradient=gradient, chunk_size=5,
        return_stats=True, **options,
    )  # fmt: skip
    close_in_norm(got.full_tensor(), loss.detach(), dtype, "loss")
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


def no_rows(_group: Any, placed: str) -> None:
    """Vectors over no rows, sharded as rows are."""
    mesh = mesh_2d()
    x = distribute_tensor(torch.randn(0, 6), mesh, placements_of(placed)).requires_grad_()
    target = distribute_tensor(torch.zeros(0, dtype=torch.int64), mesh, placements_of("rf"))
    v = distribute_tensor(torch.rand(0), mesh, placements_of("rf"))
    loss = longtail.cross_entropy(x, target, sample_weight=v, reduction="sum")
    loss.backward()
    assert loss.full_tensor() == 0
    assert x.grad.shape == (0, 6)


def inplace_on_a_leaf(group: Any) -> None:
    mesh = mesh_of(group, 1)
    x = distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]).requires_grad_()
    before = x.to_local().detach().clone()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        longtail.cross_entropy(x, torch.arange(4), gradient="inplace")
    assert torch.equal(x.to_local(), before)
