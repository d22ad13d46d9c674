"""The losses whose classes are shared out over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linear.chunks import Chunking
from ..options import softmax_request
from ..parallel import vocab, vocab_linear, vocab_statistics
from ..parallel.collectives import Group
from ..parallel.shard import Part
from ..reference.row_statistics import RowStatistics
from ..signatures import refuse_unknown, with_options_of
from .softmax import cross_entropy, with_stats
from .statistics import statistics_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .softmax import LinearKeywords, SoftmaxKeywords
    from .statistics import StatisticsKeywords


@with_stats
@with_options_of(cross_entropy, without=["input", "size_average", "reduce"])
def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    **options: Unpack[SoftmaxKeywords],
) -> Any:
    r""":func:`longtail.cross_entropy` of logits whose classes are shared out over the ranks of a process group.

    Every rank calls it with its own classes and the same targets, and gets the same loss, bit for bit. Forward reads
    the local logits once and exchanges 3 to 6 numbers per row in one all-gather; backward reads them once, writes their
    gradient and exchanges nothing. The gradient is that of the local logits: a row-parallel layer before them has to
    sum the gradients of its input over the group, as tensor parallelism does.

    One more all-gather, of 3 numbers per row, comes before with ``compensation``, and where ranks are given
    ``target_scale`` or ``class_mitigation`` of their own classes alone: the rank of a row's target says what that
    brings to the logits of all classes.

    Args:
        local_logits: (N, C_local), this rank's classes, any number of them, 0 included; float64, float32, bfloat16 or
            float16, the same on every rank.
        target: class indices in [0, C) or ``ignore_index``, (N,), of any integer dtype; the same on every rank.
        weight, class_bias, class_margin, class_scale, target_scale, class_mitigation: of all classes, (C,), or of this
            rank's, (C_local,); each vector is given the same way on every rank (and of all classes where one rank holds
            them all), those of all classes with the same values.
        group: a ``torch.distributed`` process group, or a 1-D DeviceMesh. Default: the default group.
        class_start: this rank's first class. Default: ranks hold consecutive classes in rank order.
        num_classes: C, the sum of the C_local. Required where the group has more than one rank: ranks that each pass
            the logits of all classes would otherwise get a wrong loss, about log(world size) too large, without a word.
        gradient: "backward"; "forward" makes the gradient with the loss, and "inplace" writes it over
            ``local_logits``. They pass over the logits three times as "backward" does, and save memory only.
        ignore_index, reduction, label_smoothing, options: the other arguments of :func:`longtail.cross_entropy`, as
            there, the same on every rank. Label smoothing and complement_gamma count all C classes.

    Every call compares dtypes, shapes, ranges of classes, options and a checksum of the targets inside that all-gather.
    On the CPU what is wrong is raised on every rank. On a GPU it is where the rank meets a head (C_local, class_start,
    num_classes) for the first time; later calls compare on the device, without a host sync, and assert. A second
    all-gather is made by a message longer than those of the group's last calls, by arguments that a rank refuses, and
    where ranges without ``class_start`` are neither an even split nor those of the last such head: the CPU then finds
    the right ones, and so does a GPU if all ranks meet the head for the first time. torch.compile breaks its graph
    at this call.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value does not fit; the ranks' classes overlap, leave some out or are not
            num_classes, or their options differ: on every rank, with the same text; no process group.
        IndexError: on the CPU, a target is out of bounds; names the row and the value.
        torch.distributed.DistBackendError, RuntimeError: another rank is gone (torch.distributed's own error, at the
            latest after the group's timeout).
    """
    refuse_unknown(vocab_parallel_cross_entropy, options)
    records = softmax_request(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        **options,
    )
    return vocab.cross_entropy(local_logits, target, *records, Part(group, class_start, num_classes))


@with_stats
@with_options_of(cross_entropy, without=["size_average", "reduce"])
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **options: Unpack[LinearKeywords],
) -> Any:
    r""":func:`longtail.linear_cross_entropy` with the rows of the weight shared out over the ranks of a process group.

    Every rank passes the same input and targets and its own classes, and gets the same loss, bit for bit. A rank holds
    one chunk of local logits. Each chunk exchanges 3 to 6 numbers per row (3 more where
    :func:`longtail.vocab_parallel_cross_entropy` does), and sums the gradient of its input over the ranks once, while
    the next chunk is computed.

    Args:
        input: (N, D), the same on every rank; with ``sequence_parallel``, this rank's N / P of the N rows. Or states
            of any number of leading dimensions, of which the first is shared out, and targets of theirs.
        linear_weight: (C_local, D), this rank's classes; ``linear_bias`` (C_local,).
        target: (N,) class indices of all rows, in the order of the ranks; the same on every rank.
        sequence_parallel: the rows of ``input`` are shared out: they are gathered a chunk at a time, and their gradient
            is reduced and scattered.
        group, class_start, num_classes: as in :func:`longtail.vocab_parallel_cross_entropy`; so are all options of the
            loss, ``sample_weight`` (N,) and class vectors (of all classes or of this rank's), and what ranks compare.
        shift, gradient, chunk_size, accumulate_dtype: as in :func:`longtail.linear_cross_entropy`. The targets of all
            rows move, with ``sequence_parallel`` too. The default chunk_size is that for C / P classes; with
            ``sequence_parallel`` it is rounded to a multiple of P.

    The gradient of the input is summed over the ranks in the input's dtype (float16 that is kept for backward: in
    ``accumulate_dtype``), by torch.distributed: it is the same on every rank, but its last bits depend on how the
    backend orders the sum.

    With ``gradient="backward"`` the backward passes of several losses run in the same order on every rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.vocab_parallel_cross_entropy`, on every rank.
        RuntimeError: in backward, ranks differentiate different calls; on a GPU an assertion.
    """
    refuse_unknown(vocab_parallel_linear_cross_entropy, options)
    return vocab_linear.linear_cross_entropy(
        (input, linear_weight, linear_bias, target),
        *softmax_request(ignore_index=ignore_index, gradient=gradient, **options),
        Chunking(chunk_size, accumulate_dtype),
        Part(group, class_start, num_classes),
        sequence_parallel,
        shift,
    )


@with_options_of(statistics_options)
def vocab_parallel_row_statistics(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    gradient: str = "backward",
    **options: Unpack[StatisticsKeywords],
) -> RowStatistics:
    r""":func:`longtail.row_statistics` of logits whose classes are shared out over the ranks of a process group.

    Every rank gets the same statistics of whole rows, bit for bit, and writes its loss of them. Forward reads the local
    logits once and exchanges 4 numbers per row in one all-gather; backward reads them once, writes their gradient and
    exchanges nothing. **Every rank has to write the same loss**: what it differentiates are numbers of its own, which
    nobody compares, and only equal gradients by the statistics are those of one loss. Do not sum the loss over the
    group: each rank already has the whole of it.

    Args:
        local_logits: (N, C_local), this rank's classes, any number of them, 0 included.
        target: class indices in [0, C) or ``ignore_index``, (N,); the same on every rank.
        group, class_start, num_classes: as in :func:`longtail.vocab_parallel_cross_entropy`; so is what ranks compare,
            and how one rank's mistake is raised on every rank.
        class_bias, class_margin, class_scale, target_scale, class_mitigation: of all classes, (C,), or of this rank's,
            (C_local,); what they add to the traffic: as in :func:`longtail.vocab_parallel_cross_entropy`.
        temperature, compensation, scale, softcap, ignore_index, gradient: as in :func:`longtail.row_statistics`, the
            same on every rank.

    torch.compile breaks its graph at this call. Differentiable once.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.vocab_parallel_cross_entropy`, on every rank; temperature
            is not positive.
    """
    refuse_unknown(vocab_parallel_row_statistics, options)
    records = statistics_options(**options)
    part = Part(group, class_start, num_classes)
    return vocab_statistics.row_statistics(local_logits, target, *records, gradient, part)


@with_options_of(statistics_options)
def vocab_parallel_linear_row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    linear_bias: Tensor | None = None,
    shift: bool = False,
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **options: Unpack[StatisticsKeywords],
) -> RowStatistics:
    r""":func:`longtail.linear_row_statistics` with the rows of the weight shared out over the ranks of a process group.

    A rank holds one chunk of local logits, in forward and in backward. Each chunk exchanges 4 numbers per row in
    forward, and in backward sums the gradient of its input over the ranks. The statistics are of all rows on every
    rank, with ``sequence_parallel`` too, and bit for bit the same. **Every rank has to write the same loss of them**,
    of all rows; see :func:`longtail.vocab_parallel_row_statistics`. The backward passes of several calls run in the
    same order on every rank.

    Args:
        input, linear_weight, target, sequence_parallel, linear_bias, shift, chunk_size, accumulate_dtype: as in
            :func:`longtail.vocab_parallel_linear_cross_entropy`; the statistics have the shape of ``target``.
        group, class_start, num_classes, temperature, scale, softcap, ignore_index: as in
            :func:`longtail.vocab_parallel_row_statistics`; so are the options of classes and targets.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.vocab_parallel_cross_entropy`, on every rank; temperature
            is not positive.
        RuntimeError: in backward, ranks differentiate different calls; on a GPU an assertion.
    """
    refuse_unknown(vocab_parallel_linear_row_statistics, options)
    records = statistics_options(**options)
    data, chunking = (input, linear_weight, linear_bias, target), Chunking(chunk_size, accumulate_dtype)
    part = Part(group, class_start, num_classes)
    return vocab_statistics.linear_row_statistics(data, *records, chunking, part, sequence_parallel, shift)
