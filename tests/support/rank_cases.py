"""What each rank does in the tests of vocabulary parallelism; run by :mod:`ranks`."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cases
import longtail
from accuracies import without_torchmetrics
from longtail.linear import chunks as linear_chunks
from longtail.parallel import sweep
from tolerances import assert_close, assert_same

VECTORS = ("weight", "class_bias", "class_margin", "class_scale", "target_scale", "class_mitigation")


def digest(*tensors: Tensor) -> str:
    """Of the bits."""
    return hashlib.sha256(
        b"".join(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    ).hexdigest()


def local_range(group: Any, sizes: list[int], order: list[int] | None = None) -> tuple[int, int]:
    """This rank's classes; ``order[k]``: which rank holds the k-th range."""
    rank = dist.get_rank(group)
    place = rank if order is None else order.index(rank)
    start = sum(sizes[:place])
    return start, start + sizes[place]


def localised(options: cases.Options, begin: int, end: int) -> cases.Options:
    """Class vectors cut to this rank's classes."""
    return {k: v[begin:end].clone() if k in VECTORS else v for k, v in options.items()}


def truth_of(logits: Tensor, target: Tensor, reduction: str, options: cases.Options) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, upstream, gradient) of the whole, by the float64 reference."""
    z = logits.double().requires_grad_()
    loss = longtail.reference.cross_entropy(z, target, reduction=reduction, **cases.to_float64(options))
    up = torch.randn(loss.shape, generator=cases.generator(11), dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, z, up)
    return loss.detach(), up, grad


def cross_entropy_case(
    group: Any,
    sizes: list[int],
    option_set: str,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    local_vectors: bool = False,
    gradient: str = "backward",
    rows: int = 7,
    order: list[int] | None = None,
    one_owner: int | None = None,
    extra: dict[str, Any] | None = None,
) -> str:
    """Loss and gradient of one call against the truth; returns a digest of the loss."""
    classes = sum(sizes)
    logits, target = cases.random_case(rows, classes, dtype, seed=rows)
    logits = cases.poison_ignored(logits, target)
    if one_owner is not None:
        start = sum(sizes[:one_owner])
        target = torch.where(target == cases.IGNORE, target, start + target % sizes[one_owner])
    options = cases.options(option_set, classes, target, dtype) | (extra or {})
    loss, up, grad = truth_of(logits, target, reduction, options)
    begin, end = local_range(group, sizes, order)
    local = logits[:, begin:end].clone().requires_grad_()
    given = localised(options, begin, end) if local_vectors else options
    start = begin if order is not None else None
    got, stats = longtail.vocab_parallel_cross_entropy(
        local * 1.0, target, group=group, class_start=start, num_classes=classes, reduction=reduction,
        gradient=gradient, return_stats=True, **given,
    )  # fmt: skip
    factor = 4.0 if dtype.itemsize >= 4 else 6.0
    assert_close(got, loss, what="loss", factor=factor)
    (got_grad,) = torch.autograd.grad(got, local, up.to(got.dtype))
    assert got_grad.dtype == dtype
    assert_close(got_grad, grad[:, begin:end], what="gradient", factor=factor)
    ignored = target == cases.IGNORE
    assert_same(got_grad[ignored], torch.zeros_like(got_grad[ignored]), "gradient of ignored rows")
    _, whole = longtail.cross_entropy(logits, target, return_stats=True, **options)
    assert_close(stats.log_prob, whole.log_prob.double(), what="log_prob", factor=8)
    assert_close(stats.complement_entropy, whole.complement_entropy.double(), what="entropy", factor=8)
    assert torch.equal(stats.correct, whole.correct)
    return digest(got, *stats)


def saturated_case(group: Any, sizes: list[int], option_set: str, local_vectors: bool, gradient: str) -> str:
    """Targets far above and far below the others, at -inf, and ranks without mass, against the float64 reference."""
    classes = sum(sizes)
    logits, target = torch.randn(8, classes, generator=cases.generator(1)), torch.arange(8) % classes
    for row, gap in ((0, 20.0), (1, -20.0), (2, 1e4), (3, -1e4), (4, -torch.inf)):
        logits[row, target[row]] = gap
    logits[5, : sizes[0]] = logits[6, sizes[0] :] = -torch.inf
    target[6:] = torch.tensor([0, cases.IGNORE])
    logits[7] = torch.nan
    options = cases.options(option_set, classes, target)
    loss, up, grad = truth_of(logits, target, "none", options)
    x = logits.clone().requires_grad_()
    eager = longtail.reference.cross_entropy(x, target, reduction="none", **options)
    (eager_grad,) = torch.autograd.grad(eager, x, up.float())
    begin, end = local_range(group, sizes)
    local = logits[:, begin:end].clone().requires_grad_()
    given = localised(options, begin, end) if local_vectors else options
    got = longtail.vocab_parallel_cross_entropy(
        local * 1.0, target, group=group, num_classes=classes, reduction="none", gradient=gradient, **given
    )
    assert_close(got.detach(), loss, eager.detach(), what="loss", factor=4)
    (found,) = torch.autograd.grad(got, local, up.to(got.dtype))
    assert_close(found, grad[:, begin:end], eager_grad[:, begin:end], what="gradient", factor=4)
    return digest(got)


def disagreeing(group: Any, odd: dict[str, Any], rank: int, target_value: int | None = None) -> tuple[str, str]:
    """One rank passes other arguments than the others: (type, text) of what this one raises."""
    mine = odd if dist.get_rank(group) == rank else {}
    shape = mine.pop("shape", (6, 4))
    logits = torch.randn(*shape, dtype=mine.pop("dtype", torch.float32))
    target = torch.arange(shape[0]) % 4
    if target_value is not None:
        target[2] = target_value
    starts = mine.pop("starts", None)
    if starts is not None or "class_start" in odd:
        mine.setdefault("class_start", 4 * dist.get_rank(group))
    mine.setdefault("num_classes", 4 * dist.get_world_size(group))
    return raised_by(lambda: longtail.vocab_parallel_cross_entropy(logits, target, group=group, **mine))


def raised_by(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def all_logits_on_every_rank(group: Any, num_classes: int | None) -> tuple[str, str]:
    data = (torch.randn(6, 4), torch.arange(6) % 4)
    return raised_by(lambda: longtail.vocab_parallel_cross_entropy(*data, group=group, num_classes=num_classes))


def all_weights_on_every_rank(group: Any, num_classes: int | None) -> tuple[str, str]:
    data = (torch.randn(6, 3), torch.randn(4, 3), torch.arange(6) % 4)
    return raised_by(lambda: longtail.vocab_parallel_linear_cross_entropy(*data, group=group, num_classes=num_classes))


def weights_of_two_dtypes(group: Any) -> tuple[str, str]:
    """Under autocast, which would take either: how many chunks there are depends on it."""
    weight = torch.randn(4, 3).to(torch.float32 if dist.get_rank(group) == 0 else torch.bfloat16)
    data = (torch.randn(6, 3), weight, torch.arange(6) % 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return raised_by(lambda: longtail.vocab_parallel_linear_cross_entropy(*data, group=group, num_classes=8))


def calls_after_a_mistake(group: Any) -> None:
    """A mistake that every rank makes leaves the group in order."""
    logits, target = torch.randn(4, 3), torch.tensor([0, 5, 3, 1])
    shared = {"group": group, "num_classes": 6}
    for wrong in ({"label_smoothing": 2.0}, {"class_start": 0}, {"num_classes": 3}):
        try:
            longtail.vocab_parallel_cross_entropy(logits, target % wrong.get("num_classes", 6), **shared | wrong)
        except ValueError:
            longtail.vocab_parallel_cross_entropy(logits, target, **shared)
        else:
            raise AssertionError(f"{wrong} was accepted")


def linear_truth(
    parts: list[Tensor | None], target: Tensor, reduction: str, options: cases.Options
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(loss, upstream, gradients) of input, weight and bias that are whole, by the float64 reference."""
    wide = [None if p is None else p.clone().double().requires_grad_() for p in parts]
    logits = torch.nn.functional.linear(*wide)  # type: ignore[arg-type]
    loss = longtail.reference.cross_entropy(logits, target, reduction=reduction, **cases.to_float64(options))
    up = torch.randn(loss.shape, generator=cases.generator(11), dtype=torch.float64)
    return loss.detach(), up, torch.autograd.grad(loss, [p for p in wide if p is not None], up)


def linear_case(
    group: Any,
    sizes: list[int],
    option_set: str,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    local_vectors: bool = False,
    gradient: str = "auto",
    rows: int = 24,
    sequence_parallel: bool = False,
    chunk_size: int | None = 7,
    bias: bool = True,
    trains: str = "iwb",
    accumulate_dtype: torch.dtype | None = None,
) -> str:
    """Loss and gradients of one call against the single-process truth; returns a digest of the loss."""
    features, classes = 10, sum(sizes)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    _, target = cases.random_case(rows, classes, torch.float64, seed=rows)
    g = cases.generator(21)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64).to(dtype)
    w = torch.randn(classes, features, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype) if bias else None
    options = cases.options(option_set, classes, target, dtype)
    loss, up, truth = linear_truth([x, w, b], target, reduction, options)
    begin, end = local_range(group, sizes)
    share = rows // world
    mine = x.clone()
    mine[target == cases.IGNORE] = torch.nan
    mine = mine[rank * share : (rank + 1) * share] if sequence_parallel else mine
    parts = [mine, w[begin:end].clone(), None if b is None else b[begin:end].clone()]
    for part, letter in zip(parts, "iwb", strict=True):
        if part is not None:
            part.requires_grad_(letter in trains)
    given = localised(options, begin, end) if local_vectors else options
    got, stats = longtail.vocab_parallel_linear_cross_entropy(
        parts[0], parts[1], target, linear_bias=parts[2], group=group, num_classes=classes, reduction=reduction,
        gradient=gradient, chunk_size=chunk_size, sequence_parallel=sequence_parallel,
        accumulate_dtype=accumulate_dtype, return_stats=True, **given,
    )  # fmt: skip
    assert got.dtype == cases.vector_dtype(dtype)
    close_in_norm(got.detach(), loss, dtype, "loss")
    if trains:
        wanted = [p for p in parts if p is not None and p.requires_grad]
        grads = iter(torch.autograd.grad(got, wanted, up.to(got.dtype)))
        whole = [truth[0][rank * share : (rank + 1) * share] if sequence_parallel else truth[0]]
        whole += [t[begin:end] for t in truth[1:]]
        for part, true, name in zip(parts, whole, ("input", "weight", "bias"), strict=False):
            if part is not None and part.requires_grad:
                grad = next(grads)
                assert grad.dtype == dtype
                close_in_norm(grad, true, dtype, f"gradient of {name}")
    assert stats.lse.shape == (rows,)
    return digest(got, *stats)


def linear_totals(group: Any, sizes: list[int], **named: Any) -> list[torch.dtype]:
    """For each chunk of a :func:`linear_case`, the dtype that the weight's gradient is made in, by a GPU's plan."""
    plan = linear_chunks.Plan(share=4, least=1, budget=1 << 30, wide=True)
    gemm = mock.patch.object(sweep, "add_weight_gradient", side_effect=linear_chunks.add_weight_gradient)
    with mock.patch.dict(linear_chunks.PLANS, cpu=plan), gemm as calls:
        linear_case(group, sizes, "mixed", chunk_size=None, **named)
    return [call.args[0].dtype for call in calls.call_args_list]


def close_in_norm(got: Tensor, true: Tensor, dtype: torch.dtype, what: str) -> None:
    """A sum over classes or rows is as good as its largest terms, and logits of half types are rounded."""
    assert got.shape == true.shape
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    if true.numel():
        error = ((got.double() - true).norm() / (true.norm() + 1e-300)).item()
        assert error <= bound, f"{what} is off by {error:.2g} of its norm"


def losses_of(group: Any) -> dict[str, Callable[..., Tensor]]:
    """(x, w, target, ...) -> each loss; ``w``: this rank's 3 classes."""
    classes = 3 * dist.get_world_size(group)
    shared: dict[str, Any] = {"group": group, "num_classes": classes, "label_smoothing": 0.1}
    tree = longtail.Hierarchy.from_paths([(c // 4, c // 2, c) for c in range(classes)])
    below: dict[str, Any] = {"group": group, "hierarchy": tree}
    return {
        "logits": lambda x, w, *args, **given: longtail.vocab_parallel_cross_entropy(x @ w.T, *args, **given, **shared),
        "linear": lambda *args, **given: longtail.vocab_parallel_linear_cross_entropy(*args, **given, **shared),
        "hierarchical": lambda x, w, *args, **given: longtail.vocab_parallel_hierarchical_cross_entropy(
            x @ w.T, *args, **given, **below
        ),
        "linear_hierarchical": lambda *args, **given: longtail.vocab_parallel_linear_hierarchical_cross_entropy(
            *args, **given, **below
        ),
    }


def constants_that_change(group: Any, kind: str, name: str) -> str:
    """What backward raises after one of them has been written to, as that of one process does; where they are freed."""
    classes, loss = 3 * dist.get_world_size(group), losses_of(group)[kind]
    x, w, target = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True), torch.arange(4) % classes
    given = torch.rand(4 if name == "sample_weight" else classes)
    value = loss(x, w, target, gradient="backward", **{name: given})
    value.backward()
    alive, given = weakref.ref(given), torch.rand_like(given)
    assert alive() is None, "kept by a loss whose gradient is known"
    value = loss(x, w, target, gradient="backward", **{name: given})
    given.mul_(2)
    return raised_by(value.backward)[1]


def checkpointed(group: Any, kind: str, gradient: str, reentrant: bool) -> None:
    loss = losses_of(group)[kind]
    x, w = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    v, target = torch.rand(4), torch.arange(4)

    def call(w: Tensor) -> Tensor:
        return loss(x, w, target, gradient=gradient, sample_weight=v)

    (truth,) = torch.autograd.grad(call(w), w)
    checkpoint(call, w, use_reentrant=reentrant).backward()
    assert_same(w.grad, truth)


def counting(group: Any) -> None:
    """Counts and scores over ranks are those of one process that sees everything."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    target = torch.randint(5, (40 * world,), generator=cases.generator(0))
    correct = torch.rand(40 * world, generator=cases.generator(1)) < 0.6
    mine = slice(40 * rank, 40 * rank + 30 + rank)
    seen = torch.cat([torch.arange(40 * r, 40 * r + 30 + r) for r in range(world)])
    counts = longtail.class_counts(target[seen], 5, ignore_index=4)
    assert torch.equal(longtail.class_counts(target[mine], 5, ignore_index=4, reduce=True, group=group), counts)
    rows = torch.nn.functional.one_hot(target, 5) * 0.5  # multi-hot and soft; rank 0 has no batch at all
    batches = iter([rows[40 * rank :][:40]] if rank else [])
    soft = longtail.class_counts(batches, 5, reduce=True, group=group)
    assert_same(soft, rows[40:].sum(0, dtype=torch.float64) if world > 1 else torch.zeros(5, dtype=torch.int64))
    training = [1000, 200, 50, 10, 3]
    with without_torchmetrics() as accuracy:  # which takes seconds to import
        alone, together = accuracy(training), accuracy(training)
    alone.update(correct[seen], target[seen])
    together.update(correct[mine], target[mine])
    for _ in range(2):  # asking again counts nothing twice
        for one, other in zip(alone.compute(reduce=False), together.compute(reduce=True, group=group), strict=True):
            assert_same(torch.as_tensor(one), torch.as_tensor(other))
