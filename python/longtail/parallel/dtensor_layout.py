"""How a mesh shares out the rows and classes of a loss, and what its ranks tell each other of their rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..arguments import given_normalizer
from ..errors import ArgumentValueError
from ..ops import operators
from ..options import Request, SoftmaxOptions
from ..softmax.shards import sum_in_rank_order
from .agreement import Proposal, checksum, explain, mesh_groups
from .collectives import Group, all_gather

SUPPORTED = "on each mesh dimension Shard(0) (rows), Replicate(), or on one of them Shard(1) (classes)"


class Layout(NamedTuple):
    """How a mesh shares out rows and classes."""

    mesh: Any
    row_dims: tuple[int, ...]
    """Mesh dimensions that shard the rows, in order."""
    class_dim: int | None
    """The mesh dimension that shards the classes."""

    @classmethod
    def of(cls, logits: DTensor) -> Layout:
        """That of logits [N, C]."""
        rows: list[int] = []
        classes: list[int] = []
        for i, placement in enumerate(logits.placements):
            if isinstance(placement, Shard):
                (rows if placement.dim % logits.dim() == 0 else classes).append(i)
            elif not isinstance(placement, Replicate):
                raise ArgumentValueError(f"input has placements {tuple(logits.placements)}, expected {SUPPORTED}")
        if len(classes) > 1:
            raise ArgumentValueError(
                f"input has placements {tuple(logits.placements)}, which share out the classes over {len(classes)} "
                f"mesh dimensions, expected {SUPPORTED}"
            )
        return cls(logits.device_mesh, tuple(rows), classes[0] if classes else None)

    @property
    def row_placements(self) -> list[Any]:
        """Of a vector over the rows."""
        return [Shard(0) if i in self.row_dims else Replicate() for i in range(self.mesh.ndim)]

    def groups(self) -> list[Group]:
        """Of the mesh dimensions that shard rows."""
        return [self.mesh.get_group(i) for i in self.row_dims]

    def check_rows(self, name: str, value: Any, rows: int) -> None:
        """Checks a vector over all rows: a DTensor of any placements, or a plain tensor that is whole."""
        if value.shape != (rows,):
            raise ArgumentValueError(
                f"{name} has shape {list(value.shape)}, expected {[rows]}, one for each row of all"
            )
        if isinstance(value, DTensor) and value.device_mesh != self.mesh:
            raise ArgumentValueError(f"{name} is on {value.device_mesh}, expected {self.mesh} as the input")

    def local_rows(self, value: Any, rows: int) -> Any:
        """This rank's part of a vector over all rows."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            return value.redistribute(placements=self.row_placements).to_local()
        begin, end = 0, rows
        for i in self.row_dims:
            start, size = local_range(end - begin, self.mesh, i)
            begin, end = begin + start, begin + start + size
        return value[begin:end]

    def wrap_rows(self, value: Tensor, rows: int) -> DTensor:
        """A vector over this rank's rows as a DTensor over all rows."""
        return DTensor.from_local(value, self.mesh, self.row_placements, shape=torch.Size((rows,)), stride=(1,))

    def total(self, value: Tensor) -> DTensor:
        """The sum of scalars over the ranks that share out the rows, known to all."""
        for group in self.groups():
            value = SumOverRanks.apply(value, group)
        return DTensor.from_local(value, self.mesh, [Replicate()] * self.mesh.ndim)


def local_range(size: int, mesh: Any, mesh_dim: int) -> tuple[int, int]:
    """(start, size) of this rank's part of ``size`` elements that a mesh dimension shards, as DTensor cuts them."""
    part = -(-size // mesh.size(mesh_dim))
    start = min(part * mesh.get_local_rank(mesh_dim), size)
    return start, min(part, size - start)


class SumOverRanks(torch.autograd.Function):
    """The sum of a scalar over a group, bitwise the same on every rank; each keeps its own gradient."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, group: Group) -> Tensor:
        return sum_in_rank_order(all_gather(value.reshape(1), group))[0]

    @staticmethod
    def backward(_ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


# What ranks tell each other of their rows: count and checksum, which add up over rows, the normalizer, and how many of
# them refused their targets, differ in them, differ in their normalizer.
SUMS, NORMALIZER, WRONG = slice(0, 2), 2, slice(3, 6)


def global_denominator(
    layout: Layout,
    target: Tensor,  # [N_local]
    num_classes: int,
    options: SoftmaxOptions,
    request: Request,
) -> Tensor | None:
    """What a mean over the rows of all ranks divides by, 0-d; None where there is no mean.

    Raises:
        IndexError: on the CPU, a target of some rank is out of bounds; on every rank of the mesh.
        ValueError: ranks differ in the targets of the rows that they share, or in the number that they pass as
            ``normalizer``; likewise. On a GPU: an assertion.
    """
    own: Proposal | Exception = Proposal(())
    counted = target.new_zeros(())
    try:
        weight = options.weight if request.normalizer is None else None
        counted = operators.mean_denominator(target, weight, options.ignore_index, num_classes)
    except Exception as error:
        own = error
    given = given_normalizer(request.normalizer, target.device)
    zero = torch.zeros((), dtype=torch.float64, device=target.device)
    refused = torch.full_like(zero, float(isinstance(own, Exception)))
    number = zero if given is None else given.double()
    told = exchanged(layout, torch.stack([counted.double(), checksum(target).double(), number, refused, zero, zero]))
    _check_told(told[WRONG], own, given, layout)
    if request.reduction != "mean":
        return None
    if given is not None:
        return given
    return told[0] if request.normalizer is None else told[0].clamp(min=1)


def exchanged(layout: Layout, told: Tensor) -> Tensor:
    """What this rank tells the others, with the sums over all rows and over the whole mesh; the same on every rank."""
    for i in range(layout.mesh.ndim):
        if layout.mesh.size(i) == 1:
            continue
        parts = all_gather(told, layout.mesh.get_group(i))
        total, shares_rows, zero = sum_in_rank_order(parts), i in layout.row_dims, torch.zeros_like(told[0])
        others = ~torch.isclose(parts[:, NORMALIZER], parts[0, NORMALIZER], rtol=1e-5, atol=0.0, equal_nan=True)
        targets = zero if shares_rows else (parts[:, 1] != parts[0, 1]).sum(dtype=zero.dtype)
        wrong = total[WRONG] + torch.stack([zero, targets, others.sum(dtype=zero.dtype)])
        told = torch.cat([(total if shares_rows else told)[SUMS], told[NORMALIZER : NORMALIZER + 1], wrong])
    return told


def _check_told(wrong: Tensor, own: Proposal | Exception, given: Tensor | None, layout: Layout) -> None:
    if wrong.device.type != "cpu":
        torch._assert_async((wrong == 0).all(), "longtail: ranks disagree on target or normalizer")
        return
    refused, targets, normalizers = wrong.tolist()
    if refused:
        explain(own, mesh_groups(layout.mesh))
    if targets:
        raise ArgumentValueError("ranks that hold the same rows disagree on the values of target (by a checksum)")
    if normalizers:
        value = None if given is None else given.item()
        explain(Proposal((("normalizer", value),)), mesh_groups(layout.mesh))
