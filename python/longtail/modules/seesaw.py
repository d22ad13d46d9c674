"""Seesaw loss as a module."""

from __future__ import annotations

from typing import Any

from ..arguments import check_number
from ..class_balance.counts import Counts
from ..class_balance.scales import Clamp, seesaw_mitigation
from ..functional.seesaw import SETS, seesaw_loss
from ..signatures import with_options_of
from .softmax import CrossEntropyLoss


class SeesawLoss(CrossEntropyLoss):
    """:func:`longtail.seesaw_loss`, the ``class_mitigation`` computed once: a buffer of :class:`CrossEntropyLoss`.

    Both factors are options like the others: ``loss.class_mitigation = stats.seesaw_mitigation()`` follows the classes
    that a :class:`longtail.training.StreamingClassFrequency` has seen, ``loss.compensation`` is q.

    Args:
        samples_per_class: training samples of each class, [C].
        p: >= 0, of the mitigation.
        q: >= 0, of the compensation.
        empty: what to do with classes without samples, as in ``seesaw_mitigation``.
        persistent: as in :class:`longtail.CrossEntropyLoss`.
        options: further ones of :func:`longtail.seesaw_loss`.
    """

    @with_options_of(seesaw_loss, without=["input", "target"])
    def __init__(
        self,
        samples_per_class: Counts,
        p: float = 0.8,
        q: float = 2.0,
        *,
        empty: Clamp = "error",
        persistent: bool = True,
        **options: Any,
    ) -> None:
        for name in SETS:
            if name in options:
                raise TypeError(f"SeesawLoss sets {name} itself (from samples_per_class, p and q)")
        q = check_number("q", q, 0.0)
        made = {"class_mitigation": seesaw_mitigation(samples_per_class, p, empty), "compensation": q}
        super().__init__(persistent=persistent, **made, **options)
