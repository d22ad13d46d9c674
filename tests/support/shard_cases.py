"""The steps of a loss taken by shards of the classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cases
from longtail.options import SoftmaxOptions
from longtail.reference import softmax
from longtail.softmax.shards import combine_shards

ops = torch.ops.longtail
ELSEWHERE = -1
VECTORS = ("weight", "class_bias", "class_margin")


def shard_arguments(
    logits: Tensor, target: Tensor, options: cases.Options, begin: int, end: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, local targets and class vectors of the classes [begin, end)."""
    local = torch.where((target >= begin) & (target < end), target - begin, ELSEWHERE)
    local = torch.where(target == cases.IGNORE, cases.IGNORE, local)
    vectors = {k: options[k][begin:end].clone() if k in options else None for k in VECTORS}
    return logits[:, begin:end].clone(), local, vectors


def joined(*pieces: Tensor) -> Tensor:
    """The statistics [N, 5] of rows from those of pieces, each of which knows the logit that U is relative to."""
    columns = dict(enumerate(torch.stack(pieces).permute(2, 0, 1)))
    nothing = pieces[0].new_zeros(len(pieces))
    return combine_shards(columns, nothing, torch.zeros(len(pieces[0]), dtype=torch.long, device=nothing.device))


def run_shards(
    logits: Tensor, target: Tensor, up: Tensor, sizes: list[int], options: cases.Options, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Stats, losses and gradient of the rows by accumulate, combine, finish and apply."""
    classes, smoothing = logits.shape[1], bool(options.get("label_smoothing"))
    scale, softcap = options.get("scale", 1.0), options.get("softcap", 0.0)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    shards = [
        shard_arguments(logits, target, options, start, start + size) for start, size in zip(starts, sizes, strict=True)
    ]
    pieces, omegas = [], []
    for z, local, vectors in shards:
        pieces.append(ops.softmax_loss_accumulate(z, local, *vectors.values(), cases.IGNORE, smoothing, scale, softcap))
        omegas.append(vectors["weight"].sum() if "weight" in options else pieces[-1].new_tensor(float(z.shape[1])))
    owner = sum((target >= start + size).long() for start, size in zip(starts, sizes, strict=True))
    columns = dict(enumerate(torch.stack(pieces).permute(2, 0, 1)))
    if not smoothing:
        del columns[4]
    stats = combine_shards(columns, torch.stack(omegas), owner)
    weight = options.get("weight")
    g = target.clamp(min=0)
    factors = softmax.Factors(
        1.0 if weight is None else weight[g], options.get("sample_weight", 1.0), classes, torch.stack(omegas).sum()
    )
    loss, row_grad = softmax.finish(stats, factors, SoftmaxOptions(*cases.operator_options(classes, options)))
    packed = torch.stack(row_grad.times(up), 1)
    grads = []
    for z, local, vectors in shards:
        omega = vectors["weight"] if smoothing else None
        args = (z, local, packed, omega, vectors["class_bias"], cases.IGNORE, scale, softcap)
        if inplace:
            ops.softmax_loss_apply_(*args)
            grads.append(z)
        else:
            grads.append(ops.softmax_loss_apply(*args))
    ignored = target == cases.IGNORE
    return stats.masked_fill(ignored[:, None], 0.0), loss.masked_fill(ignored, 0.0), torch.cat(grads, 1)


def shard_case(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Six rows: two of other shards, one ignored, whose logits are NaN."""
    logits, target = cases.random_case(6, classes, dtype, ignore=False)
    target[1] = target[4] = ELSEWHERE
    target[2] = cases.IGNORE
    return cases.poison_ignored(logits, target), target


def effective_row(row: Tensor, g: int, options: dict[str, Any]) -> Tensor:
    """Effective logits of a row in float64, with the margin where the target is."""
    u = options.get("scale", 1.0) * row.double()
    cap = options.get("softcap")
    u = cap * (u / cap).tanh() if cap else u
    u = u + options["class_bias"].double() if "class_bias" in options else u
    if g >= 0 and "class_margin" in options:
        u[g] -= options["class_margin"].double()[g]
    return u


def expected_stats(logits: Tensor, target: Tensor, options: dict[str, Any], smoothing: bool) -> Tensor:
    """(m, d, t, u_g, U) of every row, by a loop over its classes."""
    found = torch.zeros(len(logits), 5, dtype=torch.float64)
    omega = options.get("weight", torch.ones(logits.shape[1])).double()
    for i, (row, g) in enumerate(zip(logits, target.tolist(), strict=True)):
        if g == cases.IGNORE:
            continue
        u = effective_row(row, g, options).tolist()
        others = [x for j, x in enumerate(u) if j != g]
        m = max(others, default=-math.inf)
        shifts = [x - m for x in others]
        d, t = sum(math.exp(s) for s in shifts), sum(math.exp(s) * s for s in shifts)
        reference = u[max(g, 0)]
        U = sum(float(w) * (x - reference) for w, x in zip(omega, u, strict=True)) if smoothing else 0.0
        found[i] = torch.tensor([m, d, t, reference, U])
    return found


def expected_grad(logits: Tensor, target: Tensor, row_grad: Tensor, options: dict[str, Any]) -> Tensor:
    grad = torch.zeros_like(logits, dtype=torch.float64)
    omega = options.get("weight", torch.ones(logits.shape[1])).double()
    for i, g in enumerate(target.tolist()):
        if g == cases.IGNORE:
            continue
        m, a, b, S, T = row_grad[i].double()
        u = effective_row(logits[i], -1, options)
        du = (u - m).exp() * (a + b * (u - m)) + S * omega
        if g >= 0:
            du[g] = T
        cap, scale = options.get("softcap"), options.get("scale", 1.0)
        if cap:
            du = du * (1 - (scale * logits[i].double() / cap).tanh() ** 2)
        grad[i] = du * scale
    return grad
