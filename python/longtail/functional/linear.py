"""Projection and loss in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import is_dtensor
from ..linear import loss
from ..linear.chunks import Chunking
from ..options import softmax_request
from ..signatures import refuse_unknown, with_options_of
from .softmax import cross_entropy, with_stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .softmax import LinearKeywords


@with_stats
@with_options_of(cross_entropy, without=["size_average", "reduce"])
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    shift: bool = False,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **options: Unpack[LinearKeywords],
) -> Any:
    r"""``cross_entropy(input @ linear_weight.T + linear_bias, target, ...)`` without ever holding the logits.

    With torch's own arguments this is :func:`torch.nn.functional.linear_cross_entropy`, value, gradients, shapes and
    errors; the loss is float32 for half inputs. In place of its ``options`` stand ``chunk_size``, ``accumulate_dtype``
    and ``gradient``. Exact: no gradient is filtered. Rows go in chunks: their logits are
    made by the vendor's GEMM, turned into their gradient in place, and spent in the two GEMMs of the gradients.
    Extra memory: one chunk of logits, and with half inputs the accumulator of the weight's gradient. Without gradients
    to make, one GEMM and one chunk. On a CPU chunks of classes may cost less (``linear/cost.py``): the weight's
    gradient then needs no accumulator; the logits are made twice, but for one chunk, unless a forward has left their
    statistics, as for reduction="none". On a GPU all bfloat16 rows are one chunk where their logits take no more than
    the accumulator would, 2 N C bytes and 4 C D. What adds up over chunks, of rows or of classes, does so
    in float32 at least: errors of the gradients do not grow with the number of chunks.

    Args:
        input: (D,) or (N, D), or with a weight (C, D) any number of leading dimensions, such as (B, L, D): then what is
            said of N holds of (B, L), and losses that are not reduced have that shape. float64, float32, bfloat16 or
            float16. Under autocast the GEMMs run in its dtype.
        linear_weight: (C, D), or (C, d1, ..., dK, D) for K-dimensional targets.
        target: class indices of any integer dtype, (), (N,) or (N, d1, ..., dK); or class probabilities, (C,), (N, C)
            or (N, C, d1, ..., dK), and (B, L, C) of states (B, L, D).
        linear_bias: (C,) or (C, d1, ..., dK). Input, weight and bias are what the loss is differentiable in.
        ignore_index: None is -100. Refused with class probabilities, as torch does. What input the ignored rows hold,
            NaN included, reaches no gradient. On the CPU they take no part in the products; on a GPU, where the host
            would have to wait for their number, they are cleared.
        shift: position i along the last dimension of the rows predicts target i + 1, as language models do: the targets
            are moved, and no state is copied. The last position is ignored: it has the loss 0, and statistics 0. Needs
            states of at least (L, D), and class indices. ``sample_weight`` is that of the predicted token: it moves
            with the targets. Means count the rows that remain.
        gradient: "forward" makes the gradients with the loss (three GEMMs) and keeps them: one backward, whose
            upstream scalar they are then multiplied by; "inplace" is the same, for there are no logits to overwrite.
            "backward" makes the logits again in backward (four GEMMs): any upstream gradient, any number of times.
            "auto" (default): "forward" for a mean or sum, "backward" for reduction="none", which needs it.
        chunk_size: rows per chunk; given, nothing goes by classes. Default: a twelfth of the rows on the CPU, within
            256 MiB of logits, but at least 128 rows; elsewhere a quarter, within 1 GiB, but at least 2048 rows, or all
            (see above); evened out over the chunks. By classes: as many logits as a 48th of the rows,
            but at least 48, would have.
        accumulate_dtype: in which the gradients of weight and bias add up over the chunks; float32 for half inputs,
            else the dtype of the logits. Not narrower than that. Of one chunk nothing adds up.
        options: the other arguments of :func:`longtail.cross_entropy`, as there.

    K-dimensional targets and class probabilities go by way of the whole logits and :func:`longtail.cross_entropy`.
    float16: products are summed in float32. What is kept for backward stays in ``accumulate_dtype``, at least float32,
    until the upstream gradient and the mean's denominator have multiplied it, and is scaled so that the chunks of
    logits hold it, whatever weights and counts are.

    DTensors: ``input`` (N, D), ``linear_weight`` (C, D) and ``linear_bias`` on one mesh. One mesh dimension may shard
    the classes (the weight's Shard(0)), with ``input`` replicated over it or, in sequence parallelism, sharded by rows;
    over the others ``input`` is sharded by rows or replicated. Targets, constants and result as in
    :func:`longtail.cross_entropy`; with ``shift`` DTensors of targets and sample weights are gathered, for the next row
    may be another rank's. Where rows are sharded, backward sums the parameters' gradients over the ranks: the
    backward passes of several losses run in the same order on every rank (otherwise RuntimeError). Parameters of FSDP
    are to be gathered: call the loss inside the ``forward`` of the module that ``fully_shard`` wraps, where they are.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout; a DTensor with an ``input`` that is none.
        ValueError: a shape, device or value does not fit; a number is none that the loss's dtype holds; a parameter is
            empty, because ZeRO-3 or FSDP shares it out; a constant requires grad (all are also RuntimeErrors).
        IndexError: on the CPU, a target is out of bounds; names the value and the row of its state, counted through
            all leading dimensions.
    """
    refuse_unknown(linear_cross_entropy, options)
    records = softmax_request(ignore_index=-100 if ignore_index is None else ignore_index, gradient=gradient, **options)
    data, chunking = (input, linear_weight, linear_bias, target), Chunking(chunk_size, accumulate_dtype)
    if is_dtensor(input):
        from ..parallel import dtensor_linear  # imports torch.distributed.tensor

        return dtensor_linear.linear_cross_entropy(data, *records, chunking, shift)
    return loss.linear_cross_entropy(data, *records, chunking, ignores=ignore_index is not None, shift=shift)
