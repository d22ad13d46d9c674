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
from rank_cases import VECTORS, digest, truth_of
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


def refused_by_one(
    _group: Any, odd: dict[str, Any], rank: int, loss: str = "cross_entropy", others: dict[str, Any] | None = None
) -> str:
    """The text of the error where one rank of the 2 x 2 mesh passes other arguments than the ``others``.

    All ranks have passed either before.
    """
    mesh = mesh_2d()

    def call(target: Any = None, placed: str = "rc", trains: str = "", **given: Any) -> None:
        target = torch.arange(6) if target is None else target
        placements = placements_of(placed)
        if loss == "linear":
            weight = sharded(mesh, (8, 3), [Replicate(), Shard(0)]).requires_grad_("w" in trains)
            input = sharded(mesh, (6, 3), [placements[0], Replicate()]).requires_grad_("i" in trains)
            longtail.linear_cross_entropy(input, weight, target, **given)
        else:
            counts = {"samples_per_class": [3] * 8, "beta": 0.9} if loss == "class_balanced_loss" else {}
            getattr(longtail, loss)(sharded(mesh, (6, 8), placements), target, **counts | given)

    for given in ({}, odd):
        with contextlib.suppress(ValueError, TypeError, IndexError):
            call(**given)
    try:
        call(**odd if dist.get_rank() == rank else others or {})
    except (ValueError, TypeError, IndexError) as error:
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
