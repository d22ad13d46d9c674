"""The steps of a loss taken by shards of the classes."""

from __future__ import annotations

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
