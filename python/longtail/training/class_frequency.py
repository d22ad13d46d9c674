"""A running estimate of class frequencies, for data that has no fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import check_number
from ..class_balance.arrays import check_ignore_index, check_positive_int, integer_labels
from ..class_balance.chunks import count_indices
from ..class_balance.counting import options_of_ranks
from ..class_balance.counts import PerClass
from ..class_balance.scales import cdt_scale, immax_scale, seesaw_mitigation
from ..class_balance.weights import effective_number_weight, inverse_frequency_weight, logit_adjustment
from ..parallel.ranks import checked_sum, group_or_alone

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class StreamingClassFrequency(nn.Module):
    r"""Exponential moving average of the class counts of batches, and the weights and biases made from it.

    With the counts :math:`c_t` of batch t and decay d:

    .. math:: S_t = d\, S_{t-1} + (1 - d)\, c_t, \qquad \text{frequency} = S_t / \textstyle\sum_k S_{t,k}

    Every batch counts by its size, one without a counted target not at all: it changes nothing. The division makes the
    estimate free of the bias towards its start at 0 (the factor :math:`1 - d^t` of Adam cancels). About the last
    1 / (1 - d) batches matter; d = 1 weighs all alike::

        stats = StreamingClassFrequency(vocab_size, device=device)
        for step, (input, target) in enumerate(loader):
            stats.update(target)
            if step % 100 == 0:  # on a GPU this waits: the vectors are made on the CPU, as all of longtail's
                class_bias = stats.logit_adjustment()
            loss = longtail.cross_entropy(model(input), target, class_bias=class_bias)

    The state is three buffers: they follow ``.to(device)``, keep their dtypes under ``.half()`` and the like, and stand
    in the ``state_dict``. ``DistributedDataParallel`` copies rank 0's buffers to all ranks, so inside such a model use
    ``update(reduce=True)``, which makes them equal anyway.

    Args:
        num_classes: C, at least 1.
        decay: d in (0, 1].
        ignore_index: target value that does not count, or None.
        device: of the buffers. There the counting is done, without a host sync on a GPU.
    """

    mean_counts: Tensor
    num_updates: Tensor
    num_targets: Tensor

    def __init__(
        self,
        num_classes: int,
        decay: float = 0.999,
        *,
        ignore_index: int | None = -100,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_ignore_index(ignore_index)
        if check_number("decay", decay, 0.0, 1.0) == 0.0:
            raise ValueError("decay is 0, expected a number in (0, 1]")
        self.num_classes = num_classes
        self.decay = float(decay)
        self.ignore_index = ignore_index
        self.register_buffer("mean_counts", torch.zeros(num_classes, dtype=torch.float64, device=device))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("num_targets", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, target: Tensor, *, reduce: bool = False, group: ProcessGroup | DeviceMesh | None = None) -> None:
        """Adds a batch.

        Args:
            target: class indices of any shape. Of multi-hot rows pass ``target.nonzero()[:, 1]``.
            reduce: add up the counts of this batch over the ranks of ``group`` first (a collective call), so that all
                ranks hold the same estimate, of the global batches. A process without ``torch.distributed`` is alone.
                What one rank refuses every rank raises, "rank 1: ...", and no estimate changes; with NCCL and buffers
                on GPUs the host does not wait: the other ranks run into a device assertion.
            group: default all ranks; a process group or a 1-d DeviceMesh.

        Raises:
            IndexError: a target is out of range (on a GPU: a device assertion, on every rank).
            TypeError: the targets are not integers; ``group`` is no process group.
            ValueError: the ranks disagree on ``num_classes``, ``decay`` or ``ignore_index``; this process is not in
                ``group``.
        """
        counts = self._counts_of_ranks(target, group_or_alone(group)) if reduce else self._batch_counts(target)
        if counts.device.type != "cpu":
            torch._assert_async(counts[-1] == 0, f"a target is out of range, expected 0 to {self.num_classes - 1}")
        counts = counts[:-1]
        total = counts.sum()
        if self.decay == 1.0:
            self.mean_counts += counts
        else:
            self.mean_counts.lerp_(counts, (total > 0).double() * (1.0 - self.decay))
        self.num_updates += total > 0
        self.num_targets += total.to(torch.int64)

    def frequency(self) -> Tensor:
        """Estimated frequencies, float64 [C], summing to 1; 0 for classes not seen. 1 / C while nothing was seen."""
        total = self.mean_counts.sum()
        return torch.where(total > 0, self.mean_counts / total, 1 / self.num_classes)

    def counts(self, num_samples: float | None = None, min_count: float = 1.0) -> Tensor:
        """Samples per class in a data set of ``num_samples`` with these frequencies, float64 [C].

        Args:
            num_samples: size of that data set; default all targets seen so far, which grows as training goes on.
            min_count: >= 0; fewer samples than this count as this many, so that classes not seen (or not for long) get
                finite weights and biases.
        """
        size: Tensor | float = self.num_targets
        if num_samples is not None:
            size = check_number("num_samples", num_samples, 0.0)
        return (self.frequency() * size).clamp(min=check_number("min_count", min_count, 0.0))

    def effective_number_weight(
        self, beta: PerClass | None = None, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """:func:`longtail.effective_number_weight` of :meth:`counts`, [C] on the buffers' device.

        Saturated for classes with far more than 1 / (1 - beta) samples: fix ``num_samples``, or the weights change with
        the length of training. ``options``: empty, volume, dtype.
        """
        return self._made_by(effective_number_weight, num_samples, min_count, beta=beta, **options)

    def inverse_frequency_weight(
        self, power: float = 1.0, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """:func:`longtail.inverse_frequency_weight` of :meth:`counts`, [C]. ``options``: empty, dtype."""
        return self._made_by(inverse_frequency_weight, num_samples, min_count, power=power, **options)

    def logit_adjustment(
        self, tau: float = 1.0, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """The ``class_bias``, tau times the log-priors: :func:`longtail.logit_adjustment` of :meth:`counts`, [C]."""
        return self._made_by(logit_adjustment, num_samples, min_count, tau=tau, **options)

    def cdt_scale(
        self, gamma: float, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """The ``class_scale`` :func:`longtail.cdt_scale` of :meth:`counts`, [C]."""
        return self._made_by(cdt_scale, num_samples, min_count, gamma=gamma, **options)

    def immax_scale(
        self, margin: float = 1.0, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """The ``target_scale`` :func:`longtail.immax_scale` of :meth:`counts`, [C]. ``options``: power, dtype."""
        return self._made_by(immax_scale, num_samples, min_count, margin=margin, **options)

    def seesaw_mitigation(
        self, p: float = 0.8, num_samples: float | None = None, min_count: float = 1.0, **options: Any
    ) -> Tensor:
        """The ``class_mitigation`` :func:`longtail.seesaw_mitigation` of :meth:`counts`, [C].

        Of the counts themselves, as in the paper, with ``decay=1``.
        """
        return self._made_by(seesaw_mitigation, num_samples, min_count, p=p, **options)

    def reset(self) -> None:
        """Forgets everything seen."""
        for buffer in (self.mean_counts, self.num_updates, self.num_targets):
            buffer.zero_()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, decay={self.decay}, ignore_index={self.ignore_index}"

    def _made_by(
        self, function: Callable[..., Tensor], num_samples: float | None, min_count: float, **options: Any
    ) -> Tensor:
        return function(self.counts(num_samples, min_count), **options)

    def _counts_of_ranks(self, target: Tensor, group: Any) -> Tensor:
        """:meth:`_batch_counts`, added up over the ranks."""
        part: Tensor | Exception
        options, call = {}, "StreamingClassFrequency.update"
        try:
            options = options_of_ranks(call, self.num_classes, self.ignore_index, decay=self.decay)
            part = self._batch_counts(target)
        except Exception as error:
            part = error
        return checked_sum(part, options, group, self.mean_counts.device)

    def _batch_counts(self, target: Tensor) -> Tensor:
        """float64 [C + 1] on the buffers' device, at last the targets out of range, which on the CPU raise.

        Sums of ones, so exact in any order of atomic additions.
        """
        device = self.mean_counts.device
        if device.type == "cpu":
            counts = count_indices(target, self.num_classes, self.ignore_index).cpu().double()
            return torch.cat([counts, counts.new_zeros(1)])
        return counts_without_sync(integer_labels(target).to(device), self.num_classes, self.ignore_index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamingClassFrequency:
        """Buffers change their device, never their dtype: counts in half precision stop counting at 2048."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def counts_without_sync(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """float64 [num_classes + 1] on the device of the int64 labels; the last one of those that are out of range."""
    labels = labels.reshape(-1)
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    places = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    counts = torch.zeros(num_classes + 1, dtype=torch.float64, device=labels.device)
    return counts.index_add_(0, places, kept.double())
