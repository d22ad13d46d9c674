"""Schedules over epochs: class weights that start late, and the weight of the complement entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_number
from ..class_balance.counts import Counts, Empty, PerClass
from ..class_balance.weights import effective_number_weight


class DeferredReweighting:
    """Class weights that start late, DRW (Cao et al. 2019, section 3.3): plain training first, re-weighted after it.

    ``schedule(epoch)`` is the ``weight`` [C] of that epoch, ``(1 - r) + r * effective_number_weight(n, beta)``, with
    r = 0 before ``epoch`` and 1 from ``epoch + ramp_epochs`` on, rising linearly between. It sums to C at
    every epoch (to the number of present classes with ``empty="zero"``).

    The paper trains CIFAR for 200 epochs with ``beta=0.9999, epoch=160``.

    Args:
        samples_per_class: training samples of each class, [C]; the weights lie on its device.
        beta: in [0, 1], a number or [C], of :func:`longtail.effective_number_weight`; None where ``volume`` is given.
        epoch: the first epoch, counted from 0, that is re-weighted (where the ramp begins). Required.
        ramp_epochs: 0 switches at once.
        volume: instead of beta, as in :func:`longtail.effective_number`.
        empty: what to do with classes without samples, as in ``effective_number_weight``; with "zero" they have
            weight 0 from the start.
        dtype: of the weights.

    Raises:
        TypeError, ValueError: as ``effective_number_weight``; ``epoch`` or ``ramp_epochs`` is no number >= 0.
    """

    def __init__(
        self,
        samples_per_class: Counts,
        beta: PerClass | None = None,
        epoch: float | None = None,
        ramp_epochs: float = 0,
        *,
        volume: PerClass | None = None,
        empty: Empty = "error",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.before = effective_number_weight(samples_per_class, 0.0, empty, dtype=dtype)
        self.after = effective_number_weight(samples_per_class, beta, empty, volume=volume, dtype=dtype)
        self.epoch = check_number("epoch", epoch, 0.0)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs, 0.0)

    def __call__(self, epoch: float) -> Tensor:
        """The weights [C] of an epoch (fractions of epochs are welcome on a ramp); a new tensor."""
        return torch.lerp(self.before, self.after, _ramp(epoch, self.epoch, self.ramp_epochs))


class ComplementGammaSchedule:
    """The ``complement_gamma`` of an epoch, for complement cross-entropy in one pass (Kim et al. 2021).

    ``schedule(epoch)`` is 0 before ``epoch``, that is, plain cross-entropy, and ``gamma`` from ``epoch + ramp_epochs``
    on, changing linearly between::

        loss = longtail.cross_entropy(logits, target, complement_gamma=schedule(epoch))

    With the defaults it is the constant -1 of the paper. Under torch.compile every new value makes a new graph, as
    other floats do: keep a ramp shorter than ``torch._dynamo.config.recompile_limit``.

    Args:
        gamma: final value; negative numbers raise the complement entropy.
        epoch: where it starts, >= 0.
        ramp_epochs: length of the ramp, >= 0; 0 switches at once.

    Raises:
        TypeError, ValueError: an argument is no number, or out of its range.
    """

    def __init__(self, gamma: float = -1.0, epoch: float = 0, ramp_epochs: float = 0) -> None:
        self.gamma = check_number("gamma", gamma)
        self.epoch = check_number("epoch", epoch, 0.0)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs, 0.0)

    def __call__(self, epoch: float) -> float:
        """complement_gamma of an epoch (fractions of epochs are welcome on a ramp)."""
        return self.gamma * _ramp(epoch, self.epoch, self.ramp_epochs)


def _ramp(epoch: float, start: float, length: float) -> float:
    """0 before start, 1 from start + length on, linear between."""
    past = check_number("epoch", epoch, 0.0) - start
    if past < 0:
        return 0.0
    return 1.0 if past >= length else past / length
