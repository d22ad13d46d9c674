"""One rank's part of a loss over shared-out classes: what it proposes to the others, and its three steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..errors import ArgumentValueError
from ..hierarchical.tree import Tree
from ..ops import operators
from ..options import Request, SoftmaxOptions
from ..reference import softmax
from ..reference.effective import largest_scale
from ..reference.sizes import Size
from ..softmax import shards
from ..softmax.loss import mean_denominator
from ..softmax.shards import ELSEWHERE, sum_in_rank_order
from .agreement import Proposal
from .collectives import Group
from .handshake import Handshake
from .stats import Gathered, Local, Spent, Traffic, gather


def check_rows(name: str, input: Tensor, target: Tensor) -> None:
    """(N, C) or (N, D) input and integer targets (N,), none of them a DTensor."""
    arguments.check_local(**{name: input, "target": target})
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
        operators.mean_denominator(target, None, ignore_index, num_classes)
        return
    inside = ((target >= 0) & (target < num_classes)) | (target == ignore_index)
    torch._assert_async(inside.all(), "longtail: a target is out of bounds")


def with_vectors(options: SoftmaxOptions, input: Tensor, rows: torch.Size, dtype: torch.dtype) -> SoftmaxOptions:
    """``options`` with vectors in ``dtype``; :func:`begin` looks at the lengths of those over classes."""
    found: dict[str, Any] = {}
    for name, value in options.vectors.items():
        shape = rows
        if name != "sample_weight" and value is not None:
            arguments.check_tensors(**{name: value})
            shape = value.shape
            if len(shape) != 1:
                raise ArgumentValueError(f"{name} has shape {list(shape)}, expected one dimension")
        found[name] = arguments.vector(name, value, shape, input, dtype)
    return options._replace(**found)


ALL, OWN = "of all classes", "of the rank's own classes"


class Part(NamedTuple):
    """Which classes this rank holds, as users say it."""

    group: Group
    class_start: int | None
    num_classes: int | None


def begin(
    size: int,
    part: Part,
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    request: Request,
    same: dict[str, Any],
) -> tuple[Tensor, Handshake]:
    """Targets as int64, and the handshake of a loss of ``size`` local classes.

    ``part``: with a process group. ``same``: what has to be equal on every rank, by name.
    """
    proposal = _propose(size, part, options, same)
    g = arguments.class_indices(target, input)
    check_targets(g, options.ignore_index, proposal.total)
    return g, Handshake(proposal, part.group, g, request.normalizer)


def _propose(size: int, part: Part, options: SoftmaxOptions, same: dict[str, Any]) -> Proposal:
    class_start, num_classes = _count("class_start", part.class_start), _count("num_classes", part.num_classes)
    world = torch.distributed.get_world_size(part.group)
    if num_classes is None and world > 1:
        raise ArgumentValueError(
            f"num_classes is None, expected the number of classes of all {world} ranks together: without it a rank "
            f"that passes all classes looks like one that passes its share. This one passes {size} classes"
        )
    total = size if num_classes is None else num_classes
    if (class_start or 0) + size > total:
        raise ArgumentValueError(
            f"class_start is {class_start} and this rank passes {size} classes, but all ranks together have {total}, "
            "by num_classes or the hierarchy"
        )
    per_class = {name: x for name, x in options.vectors.items() if name != "sample_weight"}
    given = {name: how_given(name, x, size, total) for name, x in per_class.items()}
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


def compared(options: SoftmaxOptions, request: Request) -> dict[str, Any]:
    """What every loss over ranks has to be given alike, by name; the value of a ``normalizer`` is compared apart."""
    normalizer = request.normalizer
    kind = normalizer if normalizer is None or isinstance(normalizer, str) else "a number"
    same = {**options.numbers, "ignore_index": int(options.ignore_index), "reduction": request.reduction}
    return same | {"normalizer": kind, "gradient": request.gradient, "return_stats": bool(request.return_stats)}


class Shard(NamedTuple):
    """A rank's part of a problem, but for logits and targets; its three steps."""

    handshake: Handshake
    traffic: Traffic
    options: SoftmaxOptions
    """For all classes; class vectors as given."""
    tree: Tree | None = None
    """Of hierarchical cross-entropy."""

    def parted(self) -> tuple[Shard, tuple[Tensor | None, ...]]:
        """Without the caller's tensors, and these, which autograd keeps: it sees whether they change until backward."""
        vectors, others = self.options.parted()
        nothing: list[Any] = [None] * len(vectors)
        return self._replace(options=SoftmaxOptions(*nothing, *others)), vectors

    def joined(self, vectors: tuple[Any, ...]) -> Shard:
        """The whole of what :meth:`parted` made two of."""
        _, others = self.options.parted()
        return self._replace(options=SoftmaxOptions(*vectors, *others))

    @property
    def statistics(self) -> int:
        """How many numbers of a whole row forward leaves for backward."""
        return 5

    @property
    def total(self) -> int:
        """Classes of all ranks."""
        return self.handshake.proposal.total

    @property
    def own(self) -> SoftmaxOptions:
        """With the vectors of this rank's classes."""
        start, size, total = self.handshake.start, self.handshake.proposal.size, self.total
        whole = {n: x for n, x in self.options.vectors.items() if n != "sample_weight" and x is not None}
        return self.options._replace(**{n: x[start : start + size] for n, x in whole.items() if len(x) == total})

    @property
    def whole_weight(self) -> Tensor | None:
        """[C], where every rank was given the weights of all classes."""
        return None if self.traffic.weight else self.options.weight

    def denominator(self, request: Request, target: Tensor) -> Tensor | None:
        """What a mean divides by, 0-d; None where there is no mean, or where it takes the ranks' weights to know."""
        if request.reduction != "mean" or (request.normalizer is None and self.traffic.weight):
            return None
        return mean_denominator(request.normalizer, target, self.options._replace(weight=self.whole_weight), self.total)

    def local_target(self, target: Tensor) -> Tensor:
        """Global classes as the operators of a shard take them."""
        start, size = self.handshake.start, self.handshake.proposal.size
        return shards.local_target(target, start, size, self.options.ignore_index)

    def accumulate(self, logits: Tensor, target: Tensor) -> Gathered:
        """The statistics of whole rows, known to every rank."""
        terms = self._terms(logits, target) if self.options.by_target() else None
        found = gather(lambda: self._local(logits, target, terms), target, self.traffic, self.handshake)
        found = found._replace(terms=terms)
        return found if self.whole_weight is None else found._replace(w_g=self._whole_weights(target))

    def _terms(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the targets bring to the effective logits of all classes, [N, 3], anything where they are ignored.

        One more collective, but where every rank knows the vectors of all classes and the target's logit has no part.
        """
        if not self.traffic.terms:
            index = target.masked_fill(target == self.options.ignore_index, ELSEWHERE)
            return _target_terms(logits.new_zeros(()).expand(len(target), self.total), index, self.options)
        return sum_in_rank_order(self.handshake.gather(lambda: self._local_terms(logits, target)))

    def _local_terms(self, logits: Tensor, target: Tensor) -> Tensor:
        """[N, 3], 0 where another rank holds the target."""
        local_target = self.local_target(target)
        return _target_terms(logits, local_target, self.own).masked_fill((local_target < 0)[:, None], 0.0)

    def _largest_scales(self) -> Tensor:
        """Of this rank's classes, those that travel."""
        vectors = self.options.vectors
        return torch.cat([largest_scale(vectors[name])[None] for name in self.traffic.scales])

    def _local(self, logits: Tensor, target: Tensor, terms: Tensor | None) -> Local:
        local_target, own = self.local_target(target), self.own
        stats = shards.accumulate(logits, local_target, own, terms)
        weight_sum = stats.new_full((), float(logits.shape[1]))
        if own.weight is not None and self.traffic.smoothing:
            weight_sum = own.weight.sum(dtype=torch.float64)
        w_g = self._local_weights(local_target) if self.traffic.weight else None
        return Local(stats, w_g, weight_sum, self._largest_scales() if self.traffic.scales else stats.new_empty(0))

    def _whole_weights(self, target: Tensor) -> Tensor:
        """The class weight of each row's target, where this rank knows those of all classes."""
        assert self.whole_weight is not None
        return self.whole_weight[target.masked_fill(target == self.options.ignore_index, 0)]

    def _local_weights(self, local_target: Tensor) -> Tensor:
        """The class weight of each row's target, 0 where another rank holds it."""
        weight = self.options.weight
        assert weight is not None
        padded = torch.cat([weight, weight.new_zeros(1)])
        return padded[local_target.masked_fill(local_target < 0, ELSEWHERE)]

    def local_rows(self, rows: int) -> slice:
        """This rank's of ``rows`` that sequence parallelism shares out evenly."""
        part = rows // self.handshake.world
        return slice(part * self.handshake.rank, part * (self.handshake.rank + 1))

    def _factors(self, w_g: Tensor | None, weight_sum: Tensor) -> softmax.Factors:
        v = self.options.sample_weight
        return softmax.Factors(1.0 if w_g is None else w_g, 1.0 if v is None else v, self.total, weight_sum)

    def finish(self, found: Gathered, _target: Tensor) -> tuple[Tensor, Any]:
        """Row losses [N], those of ignored rows yet to be cleared, and what makes their gradients."""
        return softmax.finish(found.stats, self._factors(found.w_g, found.weight_sum), self.options)

    def size(
        self, target: Tensor, dtype: torch.dtype, w_g: Tensor | None, weight_sum: Tensor, scales: Tensor | None
    ) -> Size | None:
        """A bound of the gradient's elements, for float16 logits alone; the same on every rank if the arguments are.

        ``w_g``, ``weight_sum``, ``scales``: as gathered.
        """
        if dtype != torch.float16:
            return None
        counted, options = target != self.options.ignore_index, self.options
        if scales is not None:
            options = options._replace(**dict(zip(self.traffic.scales, scales.split(1), strict=True)))
        return softmax.gradient_size(counted, self._factors(w_g, weight_sum), options)

    def size_ahead(self, target: Tensor, dtype: torch.dtype) -> Size | None:
        """:meth:`size` before statistics are known: a collective more for each of weights and scales that are own."""
        if dtype != torch.float16:
            return None
        w_g, weight_sum = None, torch.full((), float(self.total), device=target.device)
        if self.whole_weight is not None:
            w_g, weight_sum = self._whole_weights(target), self.whole_weight.sum()
        elif self.options.weight is not None:
            own = self.options.weight.sum()[None]
            parts = self.handshake.gather(lambda: torch.cat([self._local_weights(self.local_target(target)), own]))
            packed = sum_in_rank_order(parts)
            w_g, weight_sum = packed[:-1], packed[-1]
        scales = self.handshake.gather(self._largest_scales).amax(0) if self.traffic.scales else None
        return self.size(target, dtype, w_g, weight_sum, scales)

    def spent(self, row_grad: Any, upstream: Tensor, terms: Tensor | None) -> Any:
        """What :meth:`apply` takes: of :meth:`finish`, upstream gradients [N] and what was gathered."""
        return Spent(shards.packed(row_grad, upstream), terms)

    def apply(self, logits: Tensor, target: Tensor, spent: Any, inplace: bool) -> Tensor:
        """The gradient of the local logits, written over them where ``inplace``."""
        return shards.apply(logits, self.local_target(target), spent.row_grad, self.own, inplace, spent.terms)


def _target_terms(logits: Tensor, target: Tensor, options: SoftmaxOptions) -> Tensor:
    """[N, 3] of rows with targets among the classes of ``logits``, anything where they are not."""
    dtype = arguments.arithmetic_dtype(logits.dtype)
    if logits.shape[1] == 0:
        return logits.new_zeros((len(target), 3), dtype=dtype)
    own = logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return shards.target_terms(own, target, options, dtype)


def make_shard(handshake: Handshake, options: SoftmaxOptions, return_stats: bool) -> Shard:
    """This rank's part; ``options`` checked, with vectors."""
    own = [name for name, given in handshake.proposal.options if given == OWN]
    options = options.for_classes(handshake.proposal.total)
    return Shard(handshake, Traffic.of(options, return_stats, own), options)
