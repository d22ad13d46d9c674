"""A last layer whose logits are cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormalizedLinear(nn.Linear):
    """Cosines between features and class vectors, (..., D) to (..., C): the last layer of LDAM and of Seesaw.

    There is no bias. The losses bring the temperature, ``scale=30`` (Cao et al. 2019) or ``scale=20`` (Wang et al.
    2021): a cosine is at most 1. A vector of zeros has the cosine 0 with all others.

    Args:
        in_features: size D of the features.
        out_features: number of classes C.
        device, dtype: of the weight (C, D).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    @classmethod
    def of(cls, linear: nn.Linear) -> NormalizedLinear:
        """With the weight of ``linear``, the parameter itself; its bias is dropped."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight = linear.weight
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., C)."""
        return F.linear(_unit(input), _unit(self.weight))


def _unit(x: Tensor) -> Tensor:
    """Over its norm along the last dimension; of half precision in float32, which holds every norm and its floor."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return F.normalize(x.float(), dim=-1).to(x.dtype) if half else F.normalize(x, dim=-1)
