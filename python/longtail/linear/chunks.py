"""What the fused linear loss needs wherever it goes in chunks: their size, and the vendor's GEMMs around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer


class Chunking(NamedTuple):
    """How users want chunks; None: as :class:`Plan` has it, and float32 for half types."""

    size: int | None
    """Rows."""
    accumulate_dtype: torch.dtype | None
    """In which the gradients of weight and bias add up."""

    @property
    def int_size(self) -> int | None:
        """Of numpy's too: what ranks compare has to look alike."""
        return None if self.size is None else int(self.size)

    def check(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients add up, for logits of ``dtype``."""
        accumulates = self.accumulate_dtype
        if self.size is not None:
            check_integer("chunk_size", self.size, 1, "an int or None")
        if accumulates is None:
            return torch.float32 if dtype.itemsize < 4 else dtype
        if not isinstance(accumulates, torch.dtype):
            raise TypeError(f"accumulate_dtype is a {type(accumulates).__name__}, expected a torch.dtype or None")
        if not accumulates.is_floating_point or torch.promote_types(accumulates, dtype) != accumulates:
            raise ValueError(f"accumulate_dtype is {accumulates}, expected a dtype that holds every {dtype}")
        return accumulates


class Plan(NamedTuple):
    """How many rows a chunk has where nobody says: a share of all rows within a budget, but not less than pays."""

    share: int
    """A chunk takes at most one row in this many; the GEMMs' workspaces, other ones on each processor, come on top."""
    least: int
    """Fewer rows than this starve the GEMMs: each chunk reads the weight, and reads and writes its gradient."""
    budget: int
    """Bytes of a chunk of logits."""
    wide: bool = False
    """Whether no chunk has fewer rows than ``least``, evened out or not, and all rows are one chunk where their logits
    take no more than what one chunk spares (:func:`spared`)."""


PLANS = {
    "cpu": Plan(share=12, least=128, budget=1 << 28),
    # 2048 rows: a gradient [2048, 4096] is 256 tiles of 128 x 256, two waves of an H100, and three bfloat16 GEMMs take
    # 6 * 2048 C D / 7e14 s, of which reading and writing the float32 total, 8 C D / 3e12 s, is 15 %.
    "cuda": Plan(share=4, least=2048, budget=1 << 30, wide=True),
}


def chunk_rows(rows: int, num_classes: int, itemsize: int, device_type: str, spared: int = 0) -> int:
    """Rows per chunk for [rows, num_classes] logits: as :class:`Plan` has it, then evened out over the chunks."""
    plan = PLANS.get(device_type, PLANS["cuda"])
    if plan.wide and rows * num_classes * itemsize <= spared:
        return max(rows, 1)
    affordable = plan.budget // max(1, num_classes * itemsize)
    size = min(max(plan.least, min(-(-rows // plan.share), affordable)), max(rows, 1))
    chunks = -(-rows // size)
    if plan.wide:
        chunks = min(chunks, rows // plan.least)
    return max(1, -(-rows // max(1, chunks)))


def made_in(one_chunk: bool, dtype: torch.dtype, total_dtype: torch.dtype, grad_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the weight's gradient is made: ``total_dtype``, where chunks add up.

    In one chunk nothing does: its GEMM sums in float32 and rounds once, into a gradient of the logits' bfloat16.
    """
    # Not of float16: a GEMM that shares out its sum may join the parts in float16, which overflows at 65504.
    return grad_dtype if one_chunk and dtype == grad_dtype == torch.bfloat16 else total_dtype


def spared(numel: int, dtype: torch.dtype, total_dtype: torch.dtype, grad_dtype: torch.dtype) -> int:
    """Bytes of the total, of a weight's ``numel`` elements, that one chunk of all rows makes do without.

    Logits take ``N C itemsize`` bytes, a float32 total takes ``4 C D``: in bfloat16 one chunk is smaller up to N = 2 D.
    """
    made = made_in(True, dtype, total_dtype, grad_dtype)
    return 0 if made == total_dtype else numel * total_dtype.itemsize


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """No graph and no autocast: what the GEMMs compute in has been decided."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def as_matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [R, C] in ``dtype``, in a layout that BLAS takes as it is: else every chunk would copy it."""
    x = x.to(dtype)
    by_rows = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    by_columns = x.stride(0) == 1 and x.stride(1) >= x.shape[0]
    return x if by_rows or by_columns else x.contiguous()


def make_logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, out: Tensor) -> None:
    """``x @ linear_weight.T + linear_bias`` into ``out``."""
    if linear_bias is None:
        torch.mm(x, linear_weight.t(), out=out)
    else:
        torch.addmm(linear_bias, x, linear_weight.t(), out=out)


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
    """``total += grad.T @ x``; ``total`` is written, not read, the first time."""
    beta = 0 if first else 1
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), x, beta=beta)
        return
    if total.dtype == torch.float32 and _gives_float32(grad):
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, beta=beta, out=total)
        return
    if _by_blocks(grad):
        _add_by_blocks(total.zero_() if first else total, grad.t(), x)
        return
    # Some features at a time: a product takes a chunk's memory at most, half of it in the half type (rounded once).
    step = max(16, grad.shape[0] // 2)
    for begin in range(0, x.shape[1], step):
        part = _product(grad.t(), x[:, begin : begin + step])
        place = total[:, begin : begin + step]
        if first:
            place.copy_(part)
        else:
            place.add_(part)


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """``grad @ weight`` into ``out``, of any dtype."""
    if _by_blocks(grad):
        wide = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
        _add_by_blocks(wide, grad, weight)
        out.copy_(wide)
    elif out.dtype == grad.dtype:
        torch.mm(grad, weight, out=out)
    elif out.dtype == torch.float32 and _gives_float32(grad):
        torch.mm(grad, weight, out_dtype=torch.float32, out=out)
    else:
        out.copy_(_product(grad, weight))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, unrounded where torch can: a float16 sum of many terms may be over 65504."""
    return torch.mm(a, b, out_dtype=torch.float32) if _gives_float32(a) else torch.mm(a, b)


def _gives_float32(a: Tensor) -> bool:
    """Whether torch has GEMMs that take ``a``, of a half type, and give or add to float32: in CUDA since torch 2.10."""
    # Meta tensors stand for those of a GPU. ROCm's tensors say "cuda" too.
    return a.dtype.itemsize == 2 and a.device.type in ("cuda", "meta") and torch.version.hip is None


def _by_blocks(grad: Tensor) -> bool:
    """Whether a product of ``grad`` needs float32 where torch has no GEMM that takes float16 and gives it."""
    return grad.dtype == torch.float16 and not _gives_float32(grad)


def _add_by_blocks(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``, to which some rows or columns of ``a`` are converted at a time."""
    m, k = a.shape
    step = max(16, (1 << 22) // max(m, k, 1))
    if m > k:
        b = b.to(total.dtype)
        for begin in range(0, m, step):
            total[begin : begin + step].addmm_(a[begin : begin + step].to(total.dtype), b)
    else:
        for begin in range(0, k, step):
            total.addmm_(a[:, begin : begin + step].to(total.dtype), b[begin : begin + step].to(total.dtype))


def make_gradients(
    input: Tensor,
    linear_weight: Tensor,
    input_dtype: torch.dtype,
    total_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Space for the gradients; that of the weight laid out as the weight, so that a parameter can keep it uncopied."""
    needs_input, needs_weight, needs_bias = needs
    grad_input = input.new_empty(input.shape if needs_input else (0,), dtype=input_dtype)
    if needs_weight:
        total = torch.empty_like(linear_weight, dtype=total_dtype)
    else:
        total = linear_weight.new_empty((0,), dtype=total_dtype)
    bias_shape = linear_weight.shape[:1] if needs_bias else (0,)
    return grad_input, total, linear_weight.new_zeros(bias_shape, dtype=total_dtype)
