"""The sigmoid family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..arguments import check_tensors, legacy_reduction
from ..options import SIGMOID_INNER, Request, SigmoidOptions, sigmoid_request
from ..sigmoid.loss import sigmoid_loss
from ..signatures import refuse_unknown, with_options_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .softmax import Keywords

    class ElementKeywords(Keywords, total=False):
        """Keyword arguments of the sigmoid family, but for those of the focusing factor."""

        ignore_index: int | None
        gradient: str
        class_bias: Tensor | None
        negative_scale: float
        label_smoothing: float

    class SigmoidKeywords(ElementKeywords, total=False):
        gamma_negative: float | None
        clip: float
        detach: bool

    class SigmoidCrossEntropyKeywords(SigmoidKeywords, total=False):
        class_weight_by_target: bool

    class BinaryFocalKeywords(SigmoidKeywords, total=False):
        weight: Tensor | None
        pos_weight: Tensor | None


@with_options_of()
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = 0.25,
    gamma: float | Tensor = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    class_weight_by_target: bool = False,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    gamma_negative: float | None = None,
    clip: float = 0.0,
    detach: bool = False,
    negative_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **unknown: Any,
) -> Tensor:
    r"""Sigmoid focal loss (Lin et al. 2017, eq. 5); torchvision's function of that name, and more.

    Each element, with :math:`p_t = \sigma(z)` for y = 1 and :math:`1 - \sigma(z)` for y = 0:

    .. math:: \mathrm{loss} = v\, w_j\, \alpha_t (1 - p_t)^\gamma (-\log p_t)

    exact for every finite logit, in value and gradient: nothing is clipped. Computed and returned in float32 for half
    inputs (torchvision returns their dtype), in float64 for float64.

    Args:
        inputs: logits, float64, float32, bfloat16 or float16. (N, C) or (N, C, d1, ...); with a target for each element
            any shape, where (N,) means N binary problems. Contiguous and channels-last images are read as they lie.
        targets: class indices, any integers, (N,) or (N, d1, ...): one-hot implied, never built. Or, in the inputs'
            shape, a target for each element: 0, 1, or soft in between, any real dtype. Soft ones as torchvision reads
            them: :math:`1 - p_t = y (1 - p) + (1 - y) p`, :math:`\alpha_t` likewise. NaN gives a loss of NaN.
        alpha: weight of positives, in [0, 1]; negatives get 1 - alpha. None (or, as in torchvision, a negative number)
            leaves both at 1. A tensor [C] has one for each class.
        gamma: >= 0; 0 is binary cross-entropy. A tensor [C] has one for each class.
        reduction: "none" (a loss for each element, in the inputs' shape), "rows" (summed over the classes), "sum" or
            "mean". The default is torchvision's: of a loss for each element torch refuses ``backward()`` ("grad can be
            implicitly created only for scalar outputs"); train with "mean" or "sum", or reduce it yourself.
        weight: [C], of each column. Constants, as every vector below. With a target for each element also any shape
            that broadcasts to the inputs', as in torch: one along the classes ([1, C], [C, 1, 1]) costs nothing,
            another some passes over the losses.
        class_weight_by_target: the weight of a row's target class multiplies its whole row, negatives included, as the
            class-balanced paper has it; class indices only.
        pos_weight: [C], multiplies the positive term of each class, as in ``F.binary_cross_entropy_with_logits``; other
            shapes as those of ``weight``, where those that are not along the classes cost a second loss, make their
            gradient in backward whatever ``gradient`` says, and overflow at logits of some 1e26.
        sample_weight: v, of the rows' shape: (N,) or (N, d1, ...).
        class_bias: [C], added to the logits: they are z + class_bias wherever z stands here.
        gamma_negative: >= 0, in the place of gamma for y = 0; None: gamma. Of soft targets the exponent is
            :math:`y\, \gamma + (1 - y)\, \gamma_-`.
        clip: m in [0, 1). Of negatives :math:`\max(p - m, 0)` stands in the place of p
            (:func:`longtail.asymmetric_loss`).
        detach: whether the gradient takes the factor :math:`(1 - p_t)^\gamma` for a constant.
        negative_scale: lambda > 0. Of negatives the logit is lambda z, and the loss is divided by lambda
            (:func:`longtail.distribution_balanced_loss`).
        label_smoothing: epsilon in [0, 1]: the targets become (1 - epsilon) y + epsilon / 2, as torch smooths two
            classes.
        ignore_index: rows (elements, with a target for each) with this target have loss 0 and gradient exactly 0,
            whatever their logits hold. None: -100 for class indices, nothing otherwise.
        normalizer: what "mean" divides by: "elements" (or None; those that count, as torch: NaN when none does), "rows"
            (counted rows, at least 1), "positives" (the sum of the targets, at least 1), a number, or a 0-d tensor.
            What is counted is this process's own; for that of all ranks see :func:`longtail.cross_entropy`.
        gradient: "backward", "forward" or "inplace", as in :func:`longtail.cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.cross_entropy`.
        ValueError: on the CPU, a target of an element is neither in [0, 1] nor ignored (255 in a mask); names its
            index and value. Floats up to 1e-3 (bfloat16: 2^-7) beyond, as rounding makes them, count as 0 or 1. On a
            GPU an assertion on the device for integers; floats are not looked at there, nor anything under
            torch.compile.
    """
    if unknown:
        refuse_unknown(sigmoid_focal_loss, unknown)
    # By place: a dozen keywords cost a microsecond of every call. Between them, what distribution_balanced_loss makes.
    vectors: Any = (weight, pos_weight, sample_weight, class_bias, None, None, None)
    rest: Any = (class_weight_by_target, ignore_index, alpha, gamma, gamma_negative, clip, detach, negative_scale)
    options = SigmoidOptions(*(*vectors, *rest, label_smoothing))
    return sigmoid_loss(inputs, targets, options, Request(reduction, normalizer, gradient))


@with_options_of(SigmoidOptions, Request, without=["return_stats", *SIGMOID_INNER])
def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    alpha: float | Tensor | None = None,
    gamma: float | Tensor = 0.0,
    **options: Unpack[SigmoidCrossEntropyKeywords],
) -> Tensor:
    r"""Binary cross-entropy with logits, :math:`-w_j (\mathrm{pos}_j\, y \log p + (1 - y) \log(1 - p))`.

    :func:`torch.nn.functional.binary_cross_entropy_with_logits` for float targets; class indices too.

    Args:
        input, target, weight, reduction, pos_weight: as in :func:`sigmoid_focal_loss`.
        size_average, reduce: torch's, deprecated.
        options: the others of :func:`sigmoid_focal_loss`; alpha and gamma are off.

    Raises:
        TypeError, ValueError, IndexError: as :func:`sigmoid_focal_loss`.
    """
    reduction = legacy_reduction(reduction, size_average, reduce)
    refuse_unknown(sigmoid_cross_entropy, options)
    named = {"weight": weight, "pos_weight": pos_weight, "alpha": alpha, "gamma": gamma, "reduction": reduction}
    return sigmoid_loss(input, target, *sigmoid_request(**named, **options))


@with_options_of(SigmoidOptions, Request, without=["return_stats", "class_weight_by_target", *SIGMOID_INNER])
def binary_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float | Tensor = 2.0,
    reduction: str = "mean",
    **options: Unpack[BinaryFocalKeywords],
) -> Tensor:
    """Binary classification: logits (N,), or any shape, and a target in {0, 1} (or soft) for each.

    The four binary losses of Lin et al. 2017:

    >>> binary_focal_loss(z, y, gamma=0)              # cross-entropy, eq. 1
    >>> binary_focal_loss(z, y, alpha=0.25, gamma=0)  # alpha-weighted cross-entropy, eq. 3
    >>> binary_focal_loss(z, y)                       # focal loss, eq. 4
    >>> binary_focal_loss(z, y, alpha=0.25)           # alpha-balanced focal loss, eq. 5

    ``options``: the others of :func:`sigmoid_focal_loss`; for (N,) logits sample_weight has their shape, and weight and
    pos_weight have it or are [1].

    Raises:
        ValueError: the target's shape is not the input's.
    """
    check_tensors(input=input, target=target)
    if input.shape != target.shape:
        raise ValueError(f"target has shape {list(target.shape)}, expected {list(input.shape)} as the input")
    refuse_unknown(binary_focal_loss, options)
    return sigmoid_loss(input, target, *sigmoid_request(alpha=alpha, gamma=gamma, reduction=reduction, **options))
