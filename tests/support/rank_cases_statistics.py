"""What each rank does in the tests of row statistics over shared-out classes; run by :mod:`ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import cases
import longtail
from rank_cases import close_in_norm, digest, local_range

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
