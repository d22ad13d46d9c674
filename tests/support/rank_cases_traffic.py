"""What the vocabulary-parallel losses send, on real ranks; run by :mod:`ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import hierarchy_cases
import longtail
from rank_cases import VECTORS

ROWS, LOCAL, FEATURES, CHUNKS = 64, 10, 20, 4
Seen = list[tuple[str, int]]


class Traffic(TorchDispatchMode):
    """Records (collective, bytes that this rank sends to each other) of everything that happens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            sent = args[0] if name.startswith("allreduce") else args[1]
            tensors = sent if isinstance(sent, list) else [sent]
            self.seen.append((name.strip("_"), sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


def recorded(loss: str, data: tuple[Tensor, ...], shared: dict[str, Any]) -> tuple[Seen, Seen]:
    """What forward and backward of one call send."""
    with Traffic() as forward:
        value = getattr(longtail, loss)(*data, **shared)
        value = value if isinstance(value, Tensor) else (value.log_prob * value.entropy).sum()
    with Traffic() as backward:
        torch.autograd.grad(value, [x for x in data if x.requires_grad])
    return forward.seen, backward.seen


def fresh_group() -> dict[str, Any]:
    """What a call is given of a group of all ranks that has made none."""
    group = dist.new_group()
    return {"group": group, "num_classes": LOCAL * dist.get_world_size(group)}


def of_cross_entropy(_group: Any, option_set: str, dtype: torch.dtype, local_vectors: bool) -> list[tuple[Seen, Seen]]:
    """Of two calls."""
    shared = fresh_group()
    rank, classes = dist.get_rank(), shared["num_classes"]
    logits, target = cases.random_case(ROWS, classes, dtype)
    own = slice(LOCAL * rank, LOCAL * (rank + 1))
    options = cases.options(option_set, classes, target, dtype)
    if local_vectors:
        options = {k: v[own] if k in VECTORS else v for k, v in options.items()}
    data = (logits[:, own].requires_grad_(), target)
    return [recorded("vocab_parallel_cross_entropy", data, shared | options) for _ in range(2)]


def fresh_tree(depth: int, dtype: torch.dtype, local_weight: bool) -> dict[str, Any]:
    """What a call of hierarchical cross-entropy is given of such a group, with weights of all classes or its own."""
    shared = fresh_group()
    classes, rank = shared.pop("num_classes"), dist.get_rank()
    own = slice(LOCAL * rank, LOCAL * (rank + 1)) if local_weight else slice(None)
    shared["hierarchy"] = longtail.Hierarchy.from_paths(hierarchy_cases.ragged_paths(classes, depth, ordered=False))
    vectors = hierarchy_cases.vectors(classes, ROWS, dtype)
    return shared | {"weight": vectors["weight"][own], "sample_weight": vectors["sample_weight"]}


def of_hierarchical_cross_entropy(
    _group: Any, depth: int, dtype: torch.dtype, local_weight: bool
) -> list[tuple[Seen, Seen]]:
    """Of two calls."""
    shared = fresh_tree(depth, dtype, local_weight)
    data = (torch.randn(ROWS, LOCAL, dtype=dtype, requires_grad=True), torch.arange(ROWS) % LOCAL)
    return [recorded("vocab_parallel_hierarchical_cross_entropy", data, shared) for _ in range(2)]


def of_several_lengths(_group: Any, rows: list[int]) -> list[Seen]:
    shared = fresh_group()
    seen = []
    for n in rows:
        data = (torch.randn(n, LOCAL, requires_grad=True), torch.arange(n) % LOCAL)
        seen.append(recorded("vocab_parallel_cross_entropy", data, shared)[0])
    return seen


def of_the_linear_loss(
    _group: Any, gradient: str, sequence_parallel: bool, depth: int | None = None
) -> list[tuple[Seen, Seen]]:
    """Of two calls; with a ``depth`` of hierarchical cross-entropy."""
    world = dist.get_world_size()
    shared = fresh_group() if depth is None else fresh_tree(depth, torch.float32, local_weight=True)
    x = torch.randn(ROWS // world if sequence_parallel else ROWS, FEATURES, requires_grad=True)
    data = (x, torch.randn(LOCAL, FEATURES, requires_grad=True), torch.arange(ROWS) % (LOCAL * world))
    shared |= {"gradient": gradient, "chunk_size": ROWS // CHUNKS, "sequence_parallel": sequence_parallel}
    name = (
        "vocab_parallel_linear_cross_entropy" if depth is None else "vocab_parallel_linear_hierarchical_cross_entropy"
    )
    return [recorded(name, data, shared) for _ in range(2)]


def of_row_statistics(_group: Any) -> list[tuple[Seen, Seen]]:
    """Of two calls."""
    shared = fresh_group()
    data = (torch.randn(ROWS, LOCAL, requires_grad=True), torch.arange(ROWS) % shared["num_classes"])
    return [recorded("vocab_parallel_row_statistics", data, shared) for _ in range(2)]
