"""Standing cases of row statistics: options, definitions written apart from the reference, losses of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
from longtail.reference.row_statistics import RowStatistics
from naive import effective_logits

FIELDS = RowStatistics._fields[:5]
SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"class_bias": True},
    "mixed": {"temperature": 1.7, "class_bias": True, "class_margin": True, "scale": 1.3, "softcap": 8.0},
    "tail": {"temperature": 1.7, "class_bias": True, "class_margin": True, "scale": 1.3, "softcap": 8.0,
             "class_scale": True, "target_scale": True, "class_mitigation": True, "compensation": 0.8},
}  # fmt: skip
OF_CLASSES = ("class_bias", "class_margin", "class_scale", "target_scale", "class_mitigation", "compensation")


def options(name: str, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    g = cases.generator(2)
    vectors = {"class_bias": torch.randn(classes, generator=g)}
    vectors |= {name: torch.rand(classes, generator=g) for name in OF_CLASSES[1:-1]}
    return {
        key: vectors[key].to(cases.vector_dtype(dtype)) if value is True else value for key, value in SETS[name].items()
    }


def defined(logits: Tensor, target: Tensor, temperature: float = 1.0, **options: Any) -> list[Tensor]:
    """The five statistics from their definitions, written apart from the reference: hit and miss by log1p."""
    counted = target != cases.IGNORE
    g, z = target.clamp(min=0), logits.masked_fill(~counted[:, None], 0.0)
    of_classes = {name: options.pop(name) for name in OF_CLASSES if name in options}
    u = effective_logits(z, g, **options) / temperature
    u = effective_logits(u, g, **of_classes)
    pick = F.one_hot(g, u.shape[1]).bool()
    u_g, others = u[pick], u.masked_fill(pick, -torch.inf)
    l, lse = others.logsumexp(1), u.logsumexp(1)  # noqa: E741
    log_prob, log_miss = -F.softplus(l - u_g, threshold=700), -F.softplus(u_g - l, threshold=700)
    log_q = (others - l[:, None]).masked_fill(others == -torch.inf, 0.0)
    q = log_q.exp().masked_fill(others == -torch.inf, 0.0)
    complement = -(q * log_q).sum(1)
    hit, miss = log_prob.exp(), log_miss.exp()
    # -inf * 0 in neither value nor gradient
    split = -hit * log_prob.where(hit > 0, 0.0) - miss * log_miss.where(miss > 0, 0.0)
    found = [log_prob, log_miss, lse, split + miss * complement, complement]
    return [x.where(counted, 0.0) for x in found]


def weighted(values: RowStatistics | list[Tensor], seed: int = 0) -> Tensor:
    """A loss with another upstream gradient for every row and statistic; -inf of a lone class has none."""
    total = values[0].new_zeros(())
    for i, x in enumerate(values[:5]):
        up = cases.upstreams(x.shape, x.dtype, seed + i)["random"].to(x.device)
        total = total + (x.where(x.isfinite(), 0.0) * up).sum()
    return total
