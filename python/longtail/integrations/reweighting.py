"""What the callbacks of all frameworks do to re-weight a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

WeightSchedule: TypeAlias = Callable[[float], Tensor]


@torch.no_grad()
def set_weight(loss: nn.Module, weight: Tensor) -> None:
    """Copies class weights into the ``weight`` buffer of a loss, in place.

    Raises:
        ValueError: the loss has no class weights, or others in number. Added later they would change its state_dict.
    """
    buffer = getattr(loss, "weight", None)
    if not isinstance(buffer, Tensor):
        raise ValueError(f"{type(loss).__name__} has no class weights, expected one made with weight=schedule(0)")
    if buffer.shape != weight.shape:
        raise ValueError(f"the schedule gives weights of shape {list(weight.shape)}, expected {list(buffer.shape)}")
    buffer.copy_(weight)
