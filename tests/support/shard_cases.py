"""The steps of a loss taken by shards of the classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cases
from longtail.ops import fallback
from longtail.options import SoftmaxOptions
from longtail.reference import softmax
from longtail.softmax.shards import combine_shards

ops = torch.ops.longtail
ELSEWHERE = -1
VECTORS = ("weight", "class_bias", "class_margin", "class_scale", "target_scale", "class_mitigation")


def shard_arguments(
    logits: Tensor, target: Tensor, options: cases.Options, begin: int, end: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, local targets and class vectors of the classes [begin, end)."""
    local = torch.where((target >= begin) & (target < end), target - begin, ELSEWHERE)
    local = torch.where(target == cases.IGNORE, cases.IGNORE, local)
    vectors = {k: options[k][begin:end].clone() if k in options else None for k in VECTORS}
    return logits[:, begin:end].clone(), local, vectors


def accumulate_tail(options: cases.Options, smoothing: bool = False, terms: Tensor | None = None) -> tuple[Any, ...]:
    """What the operator takes after logits and targets; ``options`` with the vectors of the shard's classes."""
    return (*map(options.get, VECTORS), terms, cases.IGNORE, smoothing, *_numbers(options))


def apply_tail(options: cases.Options, terms: Tensor | None = None) -> tuple[Any, ...]:
    """What the operators take after the coefficients; ``options`` as of :func:`accumulate_tail`."""
    vectors = [options.get(name) for name in VECTORS if name != "class_margin"]
    return (*vectors, terms, cases.IGNORE, *_numbers(options))


def _numbers(options: cases.Options) -> tuple[float, float, float]:
    return options.get("scale", 1.0), options.get("softcap") or 0.0, options.get("compensation", 0.0)


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
    terms = target_terms(logits, target, options)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    shards = [
        shard_arguments(logits, target, options, start, start + size) for start, size in zip(starts, sizes, strict=True)
    ]
    pieces, omegas = [], []
    for z, local, vectors in shards:
        pieces.append(ops.softmax_loss_accumulate(z, local, *accumulate_tail(options | vectors, smoothing, terms)))
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
        own = options | vectors if smoothing else options | vectors | {"weight": None}
        args = (z, local, packed, *apply_tail(own, terms))
        if inplace:
            ops.softmax_loss_apply_(*args)
            grads.append(z)
        else:
            grads.append(ops.softmax_loss_apply(*args))
    ignored = target == cases.IGNORE
    return stats.masked_fill(ignored[:, None], 0.0), loss.masked_fill(ignored, 0.0), torch.cat(grads, 1)


def target_terms(logits: Tensor, target: Tensor, options: cases.Options) -> Tensor | None:
    """[N, 3], where any of the options asks for it: scale, mitigation and x of each row's class."""
    if not {"target_scale", "class_mitigation", "compensation"} & options.keys():
        return None
    rows = torch.zeros(len(target), 3, dtype=cases.vector_dtype(logits.dtype))
    for i, g in enumerate(target.tolist()):
        if g != cases.IGNORE:
            x = effective_row(logits[i], g, {k: v for k, v in options.items() if k != "class_margin"})[g]
            scale, mitigation = (options[k][g] if k in options else 1.0 for k in ("target_scale", "class_mitigation"))
            rows[i] = torch.tensor([scale, mitigation, 0.0 if x == -torch.inf else x])
    return rows


def shard_case(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Six rows: two of other shards, one ignored, whose logits are NaN."""
    logits, target = cases.random_case(6, classes, dtype, ignore=False)
    target[1] = target[4] = ELSEWHERE
    target[2] = cases.IGNORE
    return cases.poison_ignored(logits, target), target


def told_case(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of one shard: logits, targets of it and of others, and what those who have the targets' classes tell of them."""
    logits, target = cases.random_case(rows, classes, dtype)
    target[::3] = ELSEWHERE
    terms = torch.rand(rows, 3, generator=cases.generator(9)) + 0.3
    terms[:, 2] *= -1.0  # many logits above the target's
    return cases.poison_ignored(logits, target), target, terms


def told_stats(
    logits: Tensor, target: Tensor, terms: Tensor, options: cases.Options, smoothing: bool = True
) -> list[Tensor]:
    """In float64, and in the arithmetic of the logits."""
    each = ((logits.double(), cases.to_float64(options), terms.double()), (logits, options, terms))
    return [fallback.softmax_loss_accumulate(z, target, *accumulate_tail(o, smoothing, t)) for z, o, t in each]


def told_gradient(
    logits: Tensor, target: Tensor, row_grad: Tensor, terms: Tensor | None, options: cases.Options
) -> list[Tensor]:
    """In float64, and in the arithmetic of the logits."""
    wide = None if terms is None else terms.double()
    each = ((logits.double(), row_grad.double(), cases.to_float64(options), wide), (logits, row_grad, options, terms))
    return [fallback.softmax_loss_apply(z, target, c, *apply_tail(o, t)) for z, c, o, t in each]


def effective_row(row: Tensor, g: int, options: dict[str, Any]) -> Tensor:
    """Effective logits of a row in float64, with what the target brings where it is one of these classes."""
    vectors = {k: options[k].double() for k in VECTORS if k in options}
    u = scale_of_row(g, options) * softcapped(row, options)
    u = u + vectors["class_bias"] if "class_bias" in vectors else u
    if g < 0:
        return u
    x, own = u.clone(), u[g]
    if "class_mitigation" in vectors:
        difference = vectors["class_mitigation"] - vectors["class_mitigation"][g]
        u = u + difference.minimum(torch.zeros_like(difference))
    if options.get("compensation"):
        u = u + options["compensation"] * (x - (0.0 if own == -math.inf else own)).maximum(torch.zeros_like(x))
    u[g] = own - vectors["class_margin"][g] if "class_margin" in vectors else own
    return u


def softcapped(row: Tensor, options: dict[str, Any]) -> Tensor:
    u, cap = options.get("scale", 1.0) * row.double(), options.get("softcap")
    return cap * (u / cap).tanh() if cap else u


def scale_of_row(g: int, options: dict[str, Any]) -> Any:
    """What the scales of classes and of target g multiply capped logits by; [C], or a number."""
    factor = options["class_scale"].double() if "class_scale" in options else 1.0
    return factor * options["target_scale"].double()[g] if g >= 0 and "target_scale" in options else factor


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
        u = effective_row(logits[i], g, options)
        du = (u - m).exp() * (a + b * (u - m)) + S * omega
        if g >= 0:
            du[g] = T
        cap, scale = options.get("softcap"), options.get("scale", 1.0)
        if cap:
            du = du * (1 - (scale * logits[i].double() / cap).tanh() ** 2)
        grad[i] = du * scale * scale_of_row(g, options)
    return grad
