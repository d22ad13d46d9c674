"""One rank's part of a loss over shared-out classes: what it proposes to the others, and its three steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, ops, reference
from .agreement import Proposal
from .distributed import Group, sum_in_rank_order
from .errors import ArgumentValueError
from .handshake import Handshake
from .kept_gradient import Size, softmax_size
from .softmax_loss import mean_denominator
from .vocab_stats import Gathered, Local, Traffic, gather

IGNORED, ELSEWHERE = -100, -1
"""Local targets that are no class of this rank: of an ignored row, and of a class that another rank holds."""


def check_rows(name: str, input: Tensor, target: Tensor) -> None:
    """(N, C) or (N, D) input and integer targets (N,)."""
    if input.dim() != 2:
        raise ArgumentValueError(f"{name} has shape {list(input.shape)}, expected two dimensions, rows first")
    if target.shape != input.shape[:1]:
        raise ArgumentValueError(
            f"target has shape {list(target.shape)}, expected {list(input.shape[:1])} for {name} of shape "
            f"{list(input.shape)}"
        )
    arguments.class_indices(target, input)


def check_targets(target: Tensor, ignore_index: int, num_classes: int) -> None:
    """That class indices are in [0, num_classes), or ignored.

    Raises:
        IndexError: on the CPU. (On a GPU: an assertion on the device.)
    """
    if target.device.type == "cpu":
        ops.mean_denominator(target, None, ignore_index, num_classes)
        return
    inside = ((target >= 0) & (target < num_classes)) | (target == ignore_index)
    torch._assert_async(inside.all(), "longtail: a target is out of bounds")


def class_vectors(
    input: Tensor, weight: Tensor | None, class_bias: Tensor | None, class_margin: Tensor | None
) -> dict[str, Tensor | None]:
    """Class vectors by name, in the arithmetic's dtype; :func:`propose` looks at their lengths."""
    vectors = {"weight": weight, "class_bias": class_bias, "class_margin": class_margin}
    found = {}
    for name, value in vectors.items():
        shape = torch.Size()
        if value is not None:
            arguments.check_tensors(**{name: value})
            shape = value.shape
            if len(shape) != 1:
                raise ArgumentValueError(f"{name} has shape {list(shape)}, expected one dimension")
        found[name] = arguments.vector(name, value, shape, input, reference.accumulate_dtype(input))
    return found


ALL, OWN = "of all classes", "of the rank's own classes"


def propose(
    size: int,
    class_start: int | None,
    num_classes: int | None,
    group: Group,
    vectors: dict[str, Tensor | None],
    same: dict[str, Any],
) -> Proposal:
    """What this rank, of ``size`` classes, is about to compute; ``same``: what has to be equal on every rank."""
    class_start, num_classes = _count("class_start", class_start), _count("num_classes", num_classes)
    world = torch.distributed.get_world_size(group)
    if num_classes is None and world > 1:
        raise ArgumentValueError(
            f"num_classes is None, expected the number of classes of all {world} ranks together: without it a rank "
            f"that passes all classes looks like one that passes its share. This one passes {size} classes"
        )
    total = size if num_classes is None else num_classes
    if (class_start or 0) + size > total:
        raise ArgumentValueError(
            f"class_start is {class_start} and this rank passes {size} classes, but num_classes is {total}: expected "
            "the number of classes of all ranks together"
        )
    given = {name: how_given(name, v, size, total) for name, v in vectors.items()}
    return Proposal(tuple((same | given).items()), size, class_start, num_classes)


def _count(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    arguments.check_integer(name, value, 0, "an int or None")
    return int(value)  # of numpy's too: what is compared has to look alike


def how_given(name: str, vector: Tensor | None, size: int, total: int) -> str | None:
    """Whether a class vector has all ``total`` classes or the ``size`` of this rank; None of one that is not given."""
    if vector is None:
        return None
    if len(vector) not in (total, size):
        raise ArgumentValueError(
            f"{name} has {len(vector)} elements, expected {total} (all classes) or {size} (this rank's)"
        )
    return ALL if len(vector) == total else OWN


def compared(
    numbers: dict[str, Any],
    ignore_index: int,
    reduction: str,
    normalizer: str | float | Tensor | None,
    gradient: str,
    return_stats: bool,
) -> dict[str, Any]:
    """What every loss over ranks has to be given alike, by name; the value of a ``normalizer`` is compared apart."""
    kind = normalizer if normalizer is None or isinstance(normalizer, str) else "a number"
    same = {**numbers, "ignore_index": int(ignore_index), "reduction": reduction, "normalizer": kind}
    return same | {"gradient": gradient, "return_stats": bool(return_stats)}


def local_target(target: Tensor, start: int, size: int, ignore_index: int) -> Tensor:
    """Global classes as the operators of the shard of ``size`` classes from ``start`` on take them."""
    local = target - start
    elsewhere = (local < 0) | (local >= size)
    return local.masked_fill(elsewhere, ELSEWHERE).masked_fill(target == ignore_index, IGNORED)


class Shard(NamedTuple):
    """A rank's part of a problem, but for logits and targets; its three steps."""

    handshake: Handshake
    traffic: Traffic
    vectors: dict[str, Tensor | None]
    """Class vectors as given."""
    sample_weight: Tensor | None
    ignore_index: int
    scale: float
    softcap: float
    finish: dict[str, Any]
    """Options of :func:`longtail.reference.finish` that are numbers."""

    def parted(self) -> tuple[Shard, tuple[Tensor | None, ...]]:
        """Without the caller's tensors, and these, which autograd keeps: it sees whether they change until backward."""
        rest = self._replace(vectors=dict.fromkeys(self.vectors), sample_weight=None)
        return rest, (*self.vectors.values(), self.sample_weight)

    def joined(self, tensors: tuple[Tensor | None, ...]) -> Shard:
        """The whole of what :meth:`parted` made two of."""
        *vectors, sample_weight = tensors
        return self._replace(vectors=dict(zip(self.vectors, vectors, strict=True)), sample_weight=sample_weight)

    @property
    def total(self) -> int:
        """Classes of all ranks."""
        return self.handshake.proposal.total

    def own(self, name: str) -> Tensor | None:
        """A class vector of this rank's classes."""
        vector, start = self.vectors[name], self.handshake.start
        if vector is None or len(vector) != self.total:
            return vector
        return vector[start : start + self.handshake.proposal.size]

    @property
    def whole_weight(self) -> Tensor | None:
        """[C], where every rank was given the weights of all classes."""
        return None if self.traffic.weight else self.vectors["weight"]

    def denominator(self, reduction: str, normalizer: str | float | Tensor | None, target: Tensor) -> Tensor | None:
        """What a mean divides by, 0-d; None where there is no mean, or where it takes the ranks' weights to know."""
        if reduction != "mean" or (normalizer is None and self.traffic.weight):
            return None
        return mean_denominator(normalizer, target, self.whole_weight, self.ignore_index, self.total)

    def local_target(self, target: Tensor) -> Tensor:
        """Global classes as the operators of a shard take them."""
        return local_target(target, self.handshake.start, self.handshake.proposal.size, self.ignore_index)

    def accumulate(self, logits: Tensor, target: Tensor) -> Gathered:
        """The statistics of whole rows, known to every rank."""
        found = gather(lambda: self._local(logits, target), target, self.traffic, self.handshake)
        return found if self.whole_weight is None else found._replace(w_g=self._whole_weights(target))

    def _local(self, logits: Tensor, target: Tensor) -> Local:
        local_target, smoothing = self.local_target(target), self.traffic.smoothing
        weight, *others = (self.own(name) for name in self.vectors)
        stats = ops.softmax_loss_accumulate(
            *(logits, local_target, weight, *others), IGNORED, smoothing, self.scale, self.softcap
        )
        weight_sum = stats.new_full((), float(logits.shape[1]))
        if weight is not None and smoothing:
            weight_sum = weight.sum(dtype=torch.float64)
        return Local(stats, self._local_weights(local_target) if self.traffic.weight else None, weight_sum)

    def _whole_weights(self, target: Tensor) -> Tensor:
        """The class weight of each row's target, where this rank knows those of all classes."""
        assert self.whole_weight is not None
        return self.whole_weight[target.masked_fill(target == self.ignore_index, 0)]

    def _local_weights(self, local_target: Tensor) -> Tensor:
        """The class weight of each row's target, 0 where another rank holds it."""
        weight = self.vectors["weight"]
        assert weight is not None
        padded = torch.cat([weight, weight.new_zeros(1)])
        return padded[local_target.masked_fill(local_target < 0, ELSEWHERE)]

    def local_rows(self, rows: int) -> slice:
        """This rank's of ``rows`` that sequence parallelism shares out evenly."""
        part = rows // self.handshake.world
        return slice(part * self.handshake.rank, part * (self.handshake.rank + 1))

    def loss_and_row_grad(self, found: Gathered) -> tuple[Tensor, reference.RowGrad]:
        """Row losses [N], those of ignored rows yet to be cleared, and the coefficients of their gradients."""
        w_g = 1.0 if found.w_g is None else found.w_g
        v = 1.0 if self.sample_weight is None else self.sample_weight
        return reference.finish(found.stats, w_g, v, weight_sum=found.weight_sum, **self.finish)

    def size(self, target: Tensor, dtype: torch.dtype, w_g: Tensor | None, weight_sum: Tensor) -> Size | None:
        """A bound of the gradient's elements, for float16 logits alone; the same on every rank if the arguments are."""
        if dtype != torch.float16:
            return None
        v = 1.0 if self.sample_weight is None else self.sample_weight
        finish = {"w_g": 1.0 if w_g is None else w_g, "v": v, "weight_sum": weight_sum, **self.finish}
        return softmax_size(target != self.ignore_index, finish, self.scale, self.softcap)

    def size_ahead(self, target: Tensor, dtype: torch.dtype) -> Size | None:
        """:meth:`size` before statistics are known: one more collective where ranks hold their own weights alone."""
        if dtype != torch.float16:
            return None
        w_g, weight_sum = None, torch.full((), float(self.total), device=target.device)
        if self.whole_weight is not None:
            w_g, weight_sum = self._whole_weights(target), self.whole_weight.sum()
        elif self.vectors["weight"] is not None:
            own = self.vectors["weight"].sum()[None]
            parts = self.handshake.gather(lambda: torch.cat([self._local_weights(self.local_target(target)), own]))
            packed = sum_in_rank_order(parts)
            w_g, weight_sum = packed[:-1], packed[-1]
        return self.size(target, dtype, w_g, weight_sum)

    def apply(
        self, logits: Tensor, target: Tensor, row_grad: reference.RowGrad, upstream: Tensor, inplace: bool
    ) -> Tensor:
        """The gradient of the local logits, written over them where ``inplace``."""
        packed = torch.stack(row_grad.times(upstream), 1)
        weight = self.own("weight") if self.traffic.smoothing else None  # times 0 otherwise, which may be NaN
        options = (packed, weight, self.own("class_bias"), IGNORED, self.scale, self.softcap)
        if not inplace:
            return ops.softmax_loss_apply(logits, self.local_target(target), *options)
        ops.softmax_loss_apply_(logits, self.local_target(target), *options)
        return logits


def make_shard(
    handshake: Handshake,
    numbers: dict[str, Any],
    ignore_index: int,
    vectors: dict[str, Tensor | None],
    sample_weight: Tensor | None,
    return_stats: bool,
) -> Shard:
    """This rank's part."""
    total = handshake.proposal.total
    smoothing, complement = numbers["label_smoothing"], numbers["complement_gamma"]
    traffic = Traffic(
        entropy=complement != 0 or return_stats,
        smoothing=smoothing != 0,
        weight=dict(handshake.proposal.options)["weight"] == OWN,
    )
    finish = {
        "num_classes": total,
        "label_smoothing": smoothing,
        "focal_gamma": numbers["focal_gamma"],
        "complement_coefficient": complement / max(total - 1, 1),
        "cross_entropy_coefficient": 1.0,
        "z_loss": numbers["z_loss"],
    }
    return Shard(
        handshake,
        traffic,
        vectors,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        scale=numbers["scale"],
        softcap=numbers["softcap"] or 0.0,
        finish=finish,
    )
