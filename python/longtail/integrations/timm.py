"""timm: its loss factory, with our modules for the losses that are ours. Of timm 1.0.31.

timm's factory chooses from a fixed list, and its tasks take any module as their ``criterion``: nothing is patched.
Losses that are timm's alone need timm; the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import modules
from ..arguments import check_choice, check_number
from ..class_balance.counts import Counts
from ..functional import cross_entropy, generalized_cross_entropy
from ..modules.base import Loss

__all__ = ["create_classification_loss"]

_MULTI_LABEL_ALONE = ("twoway", "zlpr", "db")
_MULTI_LABEL = ("bce", "asl", "poly", *_MULTI_LABEL_ALONE)
_SINGLE_LABEL = ("ce", "bce", "asl", "poly", "jsd")
_NORMALIZERS = {"batchmean": ("mean", "rows"), "mean": ("mean", None), "sum": ("sum", None), "none": ("none", None)}


class _ClassWeighted(Loss):
    """``weight`` and ``pos_weight`` may be one number, which stands for that of every class."""

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        for name in ("weight", "pos_weight"):
            found = overrides.get(name, getattr(self, name))
            if found is not None and found.numel() == 1:
                overrides[name] = found.expand(input.shape[-1])
        return super().forward(input, target, **overrides)


class BinaryCrossEntropy(_ClassWeighted, modules.SigmoidCrossEntropyLoss):
    """:class:`longtail.SigmoidCrossEntropyLoss` of targets that are smoothed, then compared with a threshold.

    Args:
        smoothing: e; class indices become 1 - e + e / C and e / C.
        smooth_dense: whether a target for each element becomes (1 - e) y + e / 2; as it is otherwise.
        target_threshold: what lies above becomes 1, all else 0; None: nothing does.
        options: those of :class:`longtail.SigmoidCrossEntropyLoss`.
    """

    def __init__(self, smoothing: float, smooth_dense: bool, target_threshold: float | None, **options: Any) -> None:
        super().__init__(**options)
        self.smoothing = smoothing
        self.smooth_dense = smooth_dense
        self.target_threshold = target_threshold

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        threshold = self.target_threshold
        if target.shape != input.shape:
            target = self._of_indices(input, target)
        elif self.smooth_dense and threshold is None:
            overrides.setdefault("label_smoothing", self.smoothing)
        elif threshold is not None:
            smoothing = self.smoothing if self.smooth_dense else 0.0
            target = target * (1 - smoothing) + smoothing / 2 > threshold
        return super().forward(input, target, **overrides)

    def _of_indices(self, input: Tensor, target: Tensor) -> Tensor:
        num_classes = input.shape[-1]
        off = self.smoothing / num_classes
        on = 1 - self.smoothing + off
        if self.target_threshold is not None:
            off, on = float(off > self.target_threshold), float(on > self.target_threshold)
        target = target.reshape(-1).long()
        if (off, on) == (0.0, 1.0):
            return target  # the one-hot is never built
        dtype = torch.promote_types(input.dtype, torch.float32)
        dense = torch.full((len(target), num_classes), off, dtype=dtype, device=input.device)
        return dense.scatter_(1, target[:, None], on)

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in ("smoothing", "smooth_dense", "target_threshold")}
        return ", ".join([*(f"{name}={value}" for name, value in own.items()), super().extra_repr()])


class AsymmetricLoss(_ClassWeighted, modules.AsymmetricLoss):
    """:class:`longtail.AsymmetricLoss`, with class weights that may be one number."""


class SmoothedPolyCrossEntropy(nn.Module):
    """Poly-1 of smoothed labels t: cross-entropy and ``epsilon`` (1 - sum_c t_c p_c), of two fused losses."""

    def __init__(self, epsilon: float, smoothing: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.smoothing = smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        smoothing = self.smoothing
        # sum_c t_c p_c = (1 - e) p_g + e / C; and 1 - p_g is generalized cross-entropy with q = 1.
        miss = (1 - smoothing) * generalized_cross_entropy(input, target, 1.0) + smoothing * (1 - 1 / input.shape[1])
        return cross_entropy(input, target, label_smoothing=smoothing) + self.epsilon * miss

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, smoothing={self.smoothing}"


class ZLPRLoss(modules.ZLPRLoss):
    """:class:`longtail.ZLPRLoss` of targets that are labels above 0.5."""

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        return super().forward(input, target > 0.5, **overrides)


class DistributionBalancedLoss(modules.DistributionBalancedLoss):
    """:class:`longtail.DistributionBalancedLoss`, times 2 where it has a focal factor, as the authors' code."""

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        loss = super().forward(input, target, **overrides)
        return 2 * loss if self.gamma else loss


def create_classification_loss(
    loss_type: str | None = None,
    multi_label: bool = False,
    smoothing: float = 0.0,
    soft_targets: bool = False,
    class_weight: Tensor | float | Sequence[float] | None = None,
    pos_weight: Tensor | float | Sequence[float] | None = None,
    bce_target_thresh: float | None = None,
    bce_sum: bool = False,
    asl_gamma_pos: float = 1.0,
    asl_gamma_neg: float = 4.0,
    asl_clip: float | None = 0.05,
    asl_reduction: str = "batchmean",
    poly_epsilon: float = 2.0,
    poly_gamma: float = 0.0,
    poly_alpha: float | None = None,
    jsd_splits: int = 0,
    twoway_tp: float = 4.0,
    twoway_tn: float = 1.0,
    class_counts: Counts | None = None,
    num_samples: int | None = None,
    db_neg_scale: float = 2.0,
    db_init_bias: float = 0.05,
    db_focal_gamma: float = 2.0,
) -> nn.Module:
    """timm's function of that name: a module with the values of timm's, fused where it is ours.

    A training script imports it from here instead, or hands the module to a task::

        task = ClassificationTask(model, criterion=create_classification_loss(smoothing=0.1))

    Args:
        loss_type: "ce", "bce", "asl", "poly", "zlpr" or "db", of :class:`longtail.CrossEntropyLoss`,
            :class:`longtail.SigmoidCrossEntropyLoss`, :class:`longtail.AsymmetricLoss` (of one label
            :class:`longtail.FocalLoss`), :class:`longtail.PolyCrossEntropyLoss`, :class:`longtail.ZLPRLoss` and
            :class:`longtail.DistributionBalancedLoss`. None: "bce" for several labels, "ce" for one. timm's own module
            for "jsd" and "twoway", and where ours lack something: "asl" of one label with smoothing, "poly" of several
            labels or soft targets, "db" with a focal factor and smoothing or soft targets.
        multi_label: targets are (N, C), 0 or 1 for each element; class indices (N,) otherwise.
        smoothing: of labels; nothing where ``soft_targets`` says that Mixup or CutMix smoothed them.
        soft_targets: targets are (N, C) in [0, 1]. Without it "db" takes 0 and 1 alone: its focal factor of soft ones
            is another here.
        class_weight, pos_weight: one number, or one for each class: "bce", and "asl" of several labels.
        bce_target_thresh: smoothed targets above it become 1, all else 0.
        bce_sum: whether the mean is over rows, not elements.
        asl_gamma_pos, asl_gamma_neg, asl_clip: of :func:`longtail.asymmetric_loss`, with ``detach=False``; a clip of
            None is 0.
        asl_reduction: "batchmean" (sum over classes, mean over rows), "mean", "sum" or "none".
        poly_epsilon: of :func:`longtail.poly_cross_entropy`.
        poly_gamma, poly_alpha, jsd_splits, twoway_tp, twoway_tn: of losses that are timm's own.
        class_counts: rows with each label, [C]; 0 counts as 1, and all as all but one.
        num_samples: all rows.
        db_neg_scale, db_init_bias, db_focal_gamma: ``negative_scale``, ``kappa`` and ``gamma`` of
            :func:`longtail.distribution_balanced_loss`; with the focal factor the loss is twice that.

    Returns:
        A module of logits (N, C) and targets. Its loss is float32 for half-precision logits, where timm's "ce" and
        "bce" return their dtype; exact where timm's clips (asymmetric loss, at 1e-8).

    Raises:
        ValueError: where timm's raises it: an unknown loss, or arguments that do not go with it. smoothing is not in
            [0, 1] (timm: AssertionError).
        ImportError: the loss is timm's own, and timm is not there.
    """
    given: dict[str, Any] = dict(locals())
    options: dict[str, Any]
    loss_type = loss_type or ("bce" if multi_label else "ce")
    _check(loss_type, multi_label, given)
    smoothing = 0.0 if soft_targets else check_number("smoothing", smoothing, 0.0, 1.0)
    weights = {"weight": _as_weight(class_weight), "pos_weight": _as_weight(pos_weight)}
    if loss_type == "ce":
        return modules.CrossEntropyLoss(label_smoothing=smoothing)
    if loss_type == "bce":
        normalizer = "rows" if bce_sum else None
        return BinaryCrossEntropy(smoothing, multi_label, bce_target_thresh, normalizer=normalizer, **weights)
    if loss_type == "asl" and multi_label:
        reduction, normalizer = _NORMALIZERS[asl_reduction]
        options = {"detach": False, "label_smoothing": smoothing, "reduction": reduction, "normalizer": normalizer}
        return AsymmetricLoss(asl_gamma_pos, asl_gamma_neg, asl_clip or 0.0, **options, **weights)
    if loss_type == "asl" and not smoothing:
        return modules.FocalLoss(gamma=asl_gamma_pos)
    if loss_type == "poly" and not multi_label and not soft_targets:
        if smoothing:
            return SmoothedPolyCrossEntropy(poly_epsilon, smoothing)
        return modules.PolyCrossEntropyLoss(poly_epsilon)
    if loss_type == "zlpr":
        return ZLPRLoss()
    # Of soft targets the focal factor is another there.
    if class_counts is not None and num_samples is not None and not (db_focal_gamma and (soft_targets or smoothing)):
        options = {"kappa": db_init_bias, "negative_scale": db_neg_scale, "label_smoothing": smoothing}
        return DistributionBalancedLoss(class_counts, num_samples, db_focal_gamma, empty="clamp", **options)
    return _factory_of_timm(loss_type)(**given)


def _check(kind: str, several: bool, given: dict[str, Any]) -> None:
    """What timm's factory refuses of any loss, and of those that are ours."""
    check_choice("loss_type", kind, (*_SINGLE_LABEL, *_MULTI_LABEL_ALONE))
    if kind == "asl":
        check_choice("asl_reduction", given["asl_reduction"], tuple(_NORMALIZERS))
    weighted = kind == "bce" or (kind == "asl" and several)
    one_asl, one_poly = (kind == name and not several for name in ("asl", "poly"))

    def gave(*names: str) -> bool:
        return any(given[name] is not None and given[name] is not False for name in names)

    for wrong, expected in (
        (several and kind not in _MULTI_LABEL, f"one of {_MULTI_LABEL}"),
        (not several and kind in _MULTI_LABEL_ALONE, f"one of {_SINGLE_LABEL}"),
        (gave("class_weight", "pos_weight") and not weighted, "no class_weight and no pos_weight"),
        (gave("bce_target_thresh", "bce_sum") and kind != "bce", "no bce_target_thresh and no bce_sum"),
        (gave("class_counts", "num_samples") and kind != "db", "no class_counts and no num_samples"),
        (kind in ("twoway", "zlpr") and (given["soft_targets"] or given["smoothing"]), "no soft_targets, no smoothing"),
        (kind == "db" and not (gave("class_counts") and gave("num_samples")), "class_counts and num_samples"),
        (one_asl and given["soft_targets"], "soft_targets=False"),
        (one_asl and given["asl_reduction"] != "batchmean", "asl_reduction='batchmean'"),
        (one_poly and (given["poly_gamma"] or gave("poly_alpha")), "no poly_gamma and no poly_alpha"),
    ):
        if wrong:
            raise ValueError(f"loss_type is {kind!r} with multi_label={several}, expected {expected}")


def _as_weight(weight: Tensor | float | Sequence[float] | None) -> Tensor | None:
    return None if weight is None else torch.as_tensor(weight, dtype=torch.float32)


def _factory_of_timm(loss_type: str) -> Callable[..., nn.Module]:
    try:
        from timm.loss import create_classification_loss as factory
    except ImportError as error:
        raise ImportError(f"{error}; {loss_type!r} with these arguments needs pip install 'timm>=1.0.31'") from error
    return factory
