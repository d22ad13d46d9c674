"""Rows at the limits of the arithmetic, and what the softmax family is there: float64, by torch's own functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
from batches import Kernels, SoftmaxBatch, as_rows
from longtail.ops.layout import to_images
from longtail.options import SigmoidOptions
from tolerances import assert_close, assert_same

INF, NAN = torch.inf, torch.nan
# (the target's logit, what is added to the other logits)
TARGETS = [(x, 0.0) for x in (0.0, 20.0, 100.0, 1e4, -20.0, -100.0, -1e4, -1e18, -INF, NAN, INF)]
TARGETS += [(1e3, 1e3), (980.0, 1e3), (-1e4, 1e3), (-1e18, -1e3), (-INF, -1e3), (0.0, -INF), (-INF, -INF)]
ALL: dict[str, Any] = {"focal_gamma": 0.5, "complement_gamma": 2.0, "z_loss": 0.01}
ENTROPY = {"complement_gamma": 1.0, "cross_entropy": False}
# (options, the weight of the class without targets, which has no say)
OPTIONS: list[tuple[dict[str, Any], float | None]] = [
    ({"z_loss": 0.02}, None), ({"focal_gamma": 2.0, "z_loss": 0.02}, 0.7), (ALL, None), (ENTROPY, None),
    ({}, INF), ({}, NAN), (ALL, INF), (ALL, -INF), (ENTROPY, NAN),
]  # fmt: skip


# Each option and each odd weight once.
FEW = [({}, INF), (ALL, -INF), (ENTROPY, NAN)]


def rows(classes: int, dtype: torch.dtype, repeated: int = 1) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and targets [N], of which none is the last class where there are more than two."""
    g = cases.generator(classes)
    count = len(TARGETS) * repeated
    logits = torch.randn(count, classes, generator=g, dtype=torch.float64)
    target = torch.arange(count) % max(classes - 1, 1)
    for i in range(count):
        at_target, added = TARGETS[i % len(TARGETS)]
        logits[i] += added
        logits[i, target[i]] = at_target
    return logits.to(dtype), target


def weights(classes: int, odd: float | None, dtype: torch.dtype) -> Tensor | None:
    """Class weights [C], the last of which is ``odd``."""
    if odd is None:
        return None
    weight = torch.rand(classes, generator=cases.generator(1), dtype=torch.float64) + 0.5
    weight[-1] = odd
    return weight.to(cases.vector_dtype(dtype))


def truth(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    z_loss: float = 0.0,
    cross_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """(loss [N], its gradient [N, C])."""
    u, classes = logits.double(), logits.shape[1]
    chosen = F.one_hot(target, classes).bool()
    w = torch.ones(len(u), dtype=torch.float64) if weight is None else weight.double()[target]
    lse, others = u.logsumexp(1), u.masked_fill(chosen, -INF)
    log_p = torch.where(u[chosen] == INF, NAN, F.logsigmoid(u[chosen] - others.logsumexp(1)))
    log_miss = torch.where(u[chosen] == INF, NAN, F.logsigmoid(others.logsumexp(1) - u[chosen]))
    q = others.softmax(1).masked_fill((others == -INF).all(1, keepdim=True), 0.0)
    p, miss = log_p.exp(), log_miss.exp()
    loss, grad = torch.zeros_like(lse), torch.zeros_like(u)
    if cross_entropy:
        focal = (focal_gamma * log_miss).exp() if focal_gamma else 1.0
        slide = torch.where(p == 0, 0.0, focal_gamma * p * log_p)  # of the focal factor, by log(1 - p)
        step = w * focal * (miss - slide)
        loss = -w * focal * log_p
        grad = step[:, None] * (q - chosen.double())
    if z_loss:
        loss = loss + z_loss * lse**2
        grad = grad + (2 * z_loss * lse)[:, None] * torch.where(chosen, p[:, None], q * miss[:, None])
    if complement_gamma:
        kappa = complement_gamma / max(classes - 1, 1) * w
        log_q = torch.where(q > 0, q.log(), 0.0)
        entropy = -(q * log_q).sum(1)
        loss = loss + kappa * entropy
        grad = grad - kappa[:, None] * q * (log_q + entropy[:, None])
    undefined = u.isnan().any(1) | (loss.isnan() & cross_entropy)
    return loss.masked_fill(undefined, NAN), grad.masked_fill(undefined[:, None], NAN)


def problems(
    classes: int, dtype: torch.dtype, repeated: int = 1, options_of: Sequence[tuple[dict[str, Any], Any]] = OPTIONS
) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
    """(name, (logits, target, options as of cases.options, cross_entropy_coefficient), loss, gradient)."""
    logits, target = rows(classes, dtype, repeated)
    for options, odd in options_of:
        weight = weights(classes, odd if classes > 2 else None, dtype)
        loss, grad = truth(logits, target, weight, **options)
        given = {name: x for name, x in options.items() if name != "cross_entropy"} | {"weight": weight}
        coefficient = float(options.get("cross_entropy", True))
        yield f"{options} {odd}", (logits, target, given, coefficient), loss, grad


def check(
    what: str, losses: Iterable[Tensor], grads: Iterable[Tensor], loss: Tensor, grad: Tensor, factor: float = 1.0
) -> None:
    for value in losses:
        assert_close(value, loss, what=f"loss {what}", factor=factor)
    for value in grads:
        assert_close(value, grad, what=f"gradient {what}", factor=factor)


def check_operators(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, factor: float = 1.0, few: bool = False
) -> None:
    """Every softmax operator over rows [N, C], or over images [N, C, P] of the same rows; with FEW or all OPTIONS."""
    images = len(shape) == 3
    size = torch.Size((len(TARGETS), *shape[1:]))
    for name, (logits, target, options, coefficient), loss, grad in problems(
        shape[1], dtype, shape[2] if images else 1, FEW if few else OPTIONS
    ):
        up = torch.tensor(-1.25, dtype=cases.vector_dtype(dtype)).expand(len(target))
        case = to_images(logits, size) if images else logits, target
        one = SoftmaxBatch(kernels, case, options, up)
        options = {"entropy": False, **options}  # as losses are computed where nobody asks for statistics
        one.tail = [*cases.operator_options(shape[1], options, cross_entropy_coefficient=coefficient)]
        one.run()
        grads = [as_rows(x) for x in one.grads]
        check(f"{name} {shape} {dtype}", one.losses, grads, loss, grad * -1.25, factor)


def check_weights_of_positives(dtype: torch.dtype) -> None:
    """A pos_weight of a class that is in no target has no say in the sigmoid operators, to the bit."""
    ops, classes = torch.ops.longtail, 7
    z = torch.randn(5, classes, generator=cases.generator(1)).to(dtype)
    target = torch.arange(5)
    up = torch.full((5,), 1.5, dtype=cases.vector_dtype(dtype))
    soft = F.one_hot(target, classes).to(dtype) * 0.75
    for y in (target, F.one_hot(target, classes).to(dtype), soft):
        for numbers in ({"gamma": 0.0}, {"gamma": 1.5}, {"gamma": 2.0}, {"gamma": 1.0, "clip": 0.05}, {"clip": 0.05}):
            results = []
            for odd in (1.0, INF, NAN):
                options = SigmoidOptions(pos_weight=weights(classes, odd, dtype), alpha=0.25, **numbers)
                loss, grad = ops.sigmoid_loss_and_grad(up, z, y, *options, False)
                back = ops.sigmoid_loss_backward(up, z, y, *options)
                results.append((loss, grad, back, ops.sigmoid_loss(z, y, *options, True)))
            for got in results[1:]:
                for one, expected in zip(got, results[0], strict=True):
                    assert expected.isfinite().all()
                    assert_same(one, expected, f"{y.dtype} target, {numbers}")
