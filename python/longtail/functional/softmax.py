"""The softmax family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, overload

from torch import Tensor

from ..arguments import check_gamma, is_dtensor, legacy_reduction
from ..options import Request, SoftmaxOptions, softmax_request
from ..reference.row_statistics import RowStatistics
from ..signatures import refuse_unknown, with_options_of
from ..softmax import loss

P = ParamSpec("P")

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Keywords(TypedDict, total=False):
        """Keyword arguments of every loss, for type checkers."""

        sample_weight: Tensor | None
        normalizer: str | float | Tensor | None

    class _Keywords(Keywords, total=False):
        focal_gamma: float
        complement_gamma: float
        class_bias: Tensor | None
        class_margin: Tensor | None
        class_scale: Tensor | None
        target_scale: Tensor | None
        class_mitigation: Tensor | None
        compensation: float
        scale: float
        softcap: float | None
        z_loss: float
        return_stats: Literal[False]

    class SoftmaxKeywords(_Keywords, total=False):
        """Keyword-only arguments of :func:`longtail.cross_entropy`; ``return_stats=True`` has its own overload."""

        gradient: str

    class ComplementEntropyKeywords(SoftmaxKeywords, total=False):
        weight: Tensor | None

    class LinearKeywords(_Keywords, total=False):
        """Those of :func:`longtail.cross_entropy` that linear losses take by name."""

        weight: Tensor | None
        reduction: str
        label_smoothing: float

    class WithStats(Protocol[P]):
        """A loss, and a pair of it and statistics where they are asked for."""

        @overload
        def __call__(self, *data: P.args, **options: P.kwargs) -> Tensor: ...
        @overload
        def __call__(self, *data: Any, return_stats: Literal[True], **options: Any) -> tuple[Tensor, RowStatistics]: ...


def with_stats(function: Callable[P, Any]) -> WithStats[P]:
    """For type checkers: what ``function`` returns follows from ``return_stats``."""
    return function  # type: ignore[return-value]


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[SoftmaxKeywords],
) -> Tensor: ...
@overload
def cross_entropy(*data: Any, return_stats: Literal[True], **options: Any) -> tuple[Tensor, RowStatistics]: ...
@with_options_of()  # type: ignore[misc]  # the overload of statistics takes anything
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    class_scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    class_mitigation: Tensor | None = None,
    compensation: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    return_stats: bool = False,
    **unknown: Any,
) -> Tensor | tuple[Tensor, RowStatistics]:
    r"""Cross-entropy and every member of the softmax family, in the same sweeps over the logits.

    With torch's own arguments this is :func:`torch.nn.functional.cross_entropy`, value, gradient and shape; the loss
    is computed and returned in float32 for half inputs (float64 for float64). With the row's effective logits,

    .. math::
        x_j = \mathrm{class\_scale}_j\, \mathrm{target\_scale}_g\, \mathrm{softcap}(\mathrm{scale}\, z_j)
        + \mathrm{bias}_j, \quad u_g = x_g - \mathrm{margin}_g,

    .. math::
        u_j = x_j + \min(0, \mathrm{mitigation}_j - \mathrm{mitigation}_g)
        + \mathrm{compensation} \cdot \mathrm{sg}(\max(0, x_j - x_g)) \quad (j \ne g),

    where sg stops the gradient, the loss of a row is

    .. math::
        \mathrm{CE} = (1 - \varepsilon) w_g (-\log p_g) + \tfrac{\varepsilon}{C} \sum_j \omega_j (-\log p_j), \quad
        \mathrm{loss} = v \left((1 - p_g)^{\gamma} \mathrm{CE} + \tfrac{\kappa}{C - 1} w_g H\right)
        + z\, \mathrm{lse}^2,

    with H the complement entropy :math:`-\sum_{j \ne g} q_j \log q_j`, q the softmax over the other classes.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16.
        target: class indices of any integer dtype, (), (N,) or (N, d1, ...); or class probabilities, in the input's
            shape, of any floating point dtype.
        weight: class weights w, [C]. Constants, as every vector below.
        ignore_index: rows with this target have loss 0 and gradient exactly 0, whatever their logits hold.
        reduction: "mean" (divides by the sum of w_g over counted rows; NaN when nothing is counted), "sum" or "none".
        label_smoothing: epsilon in [0, 1].
        size_average, reduce: torch's, deprecated: they stand where torch's positional arguments do.
        focal_gamma: gamma >= 0 of the focal factor (Lin et al. 2017, eq. 4, over the softmax).
        complement_gamma: kappa; -1 is complement cross-entropy (Kim et al. 2021), which raises H.
        class_bias: [C], added to the logits: logit adjustment (Menon et al. 2021), balanced softmax (Ren et al. 2020).
        class_margin: [C], taken off the target's logit: LDAM (Cao et al. 2019, eq. 13).
        class_scale: [C], multiplies the logits: the temperatures of vector scaling (Kini et al. 2021) and CDT (Ye et
            al. 2020), see :func:`longtail.vector_scaling`. Positive.
        target_scale: [C], that of the row's target multiplies all logits of the row: one over the confidence margin of
            IMMAX (Cortes et al. 2025), see :func:`longtail.immax_scale`. Positive.
        class_mitigation: [C], finite (NaN mitigates nothing): where that of a class is below that of the target, the
            difference is added to its logit: Seesaw's mitigation factor (Wang et al. 2021), see
            :func:`longtail.seesaw_mitigation`.
        compensation: q >= 0, times what a logit is above the target's is added to it, as a constant: Seesaw's
            compensation factor (Wang et al. 2021), see :func:`longtail.seesaw_loss`.
        scale: multiplies the logits.
        softcap: cap > 0 of ``cap * tanh(x / cap)``, or None.
        z_loss: coefficient of the squared log-sum-exp (added after weights and focal factor).
        sample_weight: v, of the target's shape; does not enter the mean's denominator.
        normalizer: the mean's denominator: None (torch's), "count" (counted rows, at least 1), a number, or a 0-d
            tensor, such as the Trainer's ``num_items_in_batch``. A number is at least 0. None and "count" are of this
            process alone: DistributedDataParallel then takes the mean of the ranks' means, in which a row counts more
            the fewer its rank has. For the mean of all rows: ``count = (target != ignore_index).sum()``,
            ``torch.distributed.all_reduce(count)``, ``normalizer=count / world_size``.
        gradient: "backward" (3 passes over the logits); "forward" (2 passes: the gradient is made with the loss and
            kept); "inplace" (2 passes, no extra memory: the gradient overwrites ``input``, or the copy that a strided
            layout needs. What saved the logits before raises in its backward; what reads them after reads the
            gradient, without an error; refused of a leaf that requires grad). The last two allow one backward, and
            round the gradient before a gradient scaler multiplies it: of float16 logits it is therefore kept at one
            size, whatever weights and counts are, and the rest is applied in backward. An exported graph knows
            "backward" alone.
        return_stats: also return :class:`longtail.RowStatistics`.

    A DTensor of shape (N, C) may be sharded over rows (Shard(0)) on any mesh dimensions, over classes (Shard(1)) on
    one, or replicated. ``target`` and ``sample_weight`` are then DTensors on the same mesh, or plain tensors of all
    rows; class vectors are of all classes. "mean" is that of all rows of the mesh. The loss is a DTensor, replicated
    where it is reduced; the statistics are DTensors over the rows. At every call ranks compare options, placements and,
    where they hold the same rows, a checksum of the targets; what is wrong is raised on every rank (GPUs assert).

    What is of classes and targets (``class_bias``, ``class_margin``, ``class_scale``, ``target_scale``,
    ``class_mitigation``, ``compensation``) is for training. Predict from the raw logits, ``input.argmax(1)``
    (``RowStatistics.correct`` is of the effective ones), and validate by the loss without.

    Under torch.compile each new value of a float option makes a new graph, as in torch's own losses, up to
    ``torch._dynamo.config.recompile_limit`` (8); then the function runs eagerly, or with ``fullgraph=True`` raises. For
    a schedule of more values call the loss outside of what is compiled, or in a function under
    ``torch.compiler.disable``, which costs the kernels nothing; or raise the limit. Tensors, and a ``normalizer`` that
    is a number, may change freely.

    With class-probability targets the options that need one target class (focal_gamma, complement_gamma, class_margin,
    target_scale, class_mitigation, compensation, return_stats, the forward gradient modes) raise ValueError. The loss
    is :math:`v \sum_j w_j y'_j (-\log p_j) + z\, \mathrm{lse}^2` with
    :math:`y'_j = (1 - \varepsilon) y_j + \varepsilon / C`, and "mean" divides by the number of rows. It is
    differentiable in probabilities that require a gradient, and in ``weight`` beside them, by plain PyTorch. A class of
    probability 0 whose logit is -inf contributes 0, where torch gives NaN; one of positive probability, which label
    smoothing makes of all, gives inf.

    Raises:
        TypeError: an argument has the wrong type or dtype; a tensor is sparse, nested or of MKL-DNN.
        ValueError: a shape, device or value does not fit; a number is none that the loss's dtype holds, such as a
            softcap of 1e300 or 1e-50 in float32; a constant requires grad; "inplace" on a leaf that requires grad (all
            are also RuntimeErrors, as torch raises).
        IndexError: on the CPU, a target is out of bounds; names the row and the value.
    """
    if unknown:
        refuse_unknown(cross_entropy, unknown)
    reduction = legacy_reduction(reduction, size_average, reduce)
    vectors = (weight, class_bias, class_margin, class_scale, target_scale, class_mitigation, sample_weight)
    numbers = (label_smoothing, focal_gamma, complement_gamma, 1.0, scale, softcap, z_loss, compensation)
    options = SoftmaxOptions(*vectors, ignore_index, *numbers)  # type: ignore[arg-type]
    request = Request(reduction, normalizer, gradient, return_stats)
    if is_dtensor(input) or is_dtensor(target):
        from ..parallel import dtensor  # imports torch.distributed.tensor

        return dtensor.cross_entropy(input, target, options, request)
    return loss.cross_entropy(input, target, options, request)


@with_stats
@with_options_of(cross_entropy, without=["focal_gamma"])
def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[SoftmaxKeywords],
) -> Any:
    r"""Softmax focal loss :math:`-w_g (1 - p_g)^\gamma \log p_g` (Lin et al. 2017, eq. 4 and 5, multi-class).

    Finite in value and gradient for every gamma >= 0 and every margin. ``weight`` [C] is the per-class alpha.
    Arguments, ``options`` and errors as :func:`cross_entropy`, whose ``focal_gamma`` is ``gamma`` here.
    """
    refuse_unknown(focal_loss, options)
    named: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, **options}
    gamma = check_gamma(input, gamma)
    return cross_entropy(input, target, weight, label_smoothing=label_smoothing, focal_gamma=gamma, **named)


@with_stats
@with_options_of(cross_entropy, without=["complement_gamma"])
def complement_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = -1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[SoftmaxKeywords],
) -> Any:
    r"""Complement cross-entropy :math:`\mathrm{CE} + \tfrac{\gamma}{C - 1} H` (Kim et al. 2021, eq. 4).

    gamma < 0 raises the complement entropy H, that is, flattens the probabilities of the wrong classes. Arguments,
    ``options`` and errors as :func:`cross_entropy`, whose ``complement_gamma`` is ``gamma`` here.
    """
    refuse_unknown(complement_cross_entropy, options)
    named: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, **options}
    gamma = check_gamma(input, gamma, -math.inf)
    return cross_entropy(input, target, weight, label_smoothing=label_smoothing, complement_gamma=gamma, **named)


@with_stats
@with_options_of(
    cross_entropy,
    without=("size_average", "reduce", "label_smoothing", "focal_gamma", "complement_gamma", "z_loss"),
)
def complement_entropy(
    input: Tensor,
    target: Tensor,
    balanced: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Unpack[ComplementEntropyKeywords],
) -> Any:
    r"""Complement entropy :math:`H = -\sum_{j \ne g} q_j \log q_j`, q the softmax over the wrong classes.

    Chen et al. 2019 (COT), eq. 2, which maximises it: descend on its negative. ``balanced`` divides by C - 1 (Kim et
    al. 2021, eq. 3). The target's logit has no part in it: its gradient is 0, infinite ones change nothing, but NaN
    shows in loss and gradient. Integer targets only. Arguments and errors as :func:`cross_entropy`.
    """
    refuse_unknown(complement_entropy, options)
    records = softmax_request(ignore_index=ignore_index, reduction=reduction, **options)
    return loss.complement_entropy(input, target, *records, balanced)
