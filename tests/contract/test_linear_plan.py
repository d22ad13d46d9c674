"""Promise: on a GPU the fused linear loss goes in one chunk where that takes less memory; else its GEMMs add up.

Counted on meta tensors, which stand for those of a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import cases
from dry_runs import DryRun
from longtail.linear import chunks as linear_chunks
from longtail.linear import rows as linear_rows

FEATURES, CLASSES = 4096, 128256
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

DIRECT = ("addmm_",)
INTO_FLOAT32 = ("addmm.dtype_out",)  # products of a half type, added to float32 in the GEMM


def knows_out_dtype() -> bool:
    total, x = torch.empty(2, 2, device="meta"), torch.empty(2, 2, dtype=BF16, device="meta")
    try:
        torch.addmm(total, x, x, out_dtype=FP32, beta=0, out=total)
    except (NotImplementedError, TypeError):  # TypeError of torch 2.12, which has a decomposition that does not take it
        return False
    return True


dry_runs = pytest.mark.skipif(not knows_out_dtype(), reason="this torch knows addmm(out_dtype=) of no meta tensors")


class Run(NamedTuple):
    chunks: int
    weight_gemms: tuple[str, ...]
    """Of each chunk, for the weight's gradient."""
    others: tuple[torch.dtype, ...] = ()
    """Of matrices [C, D] besides the gradient: of a total, of a copy of the weight."""
    rows: int = 4096
    chunk_size: int = 0
    dtype: torch.dtype = BF16
    total_dtype: torch.dtype = FP32
    weight_dtype: torch.dtype = BF16
    kept_dtype: torch.dtype | None = None
    """Of gradients that backward rounds."""
    needs: tuple[bool, bool, bool] = (True, True, True)

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.kept_dtype or self.weight_dtype


RUNS = {
    "one chunk": Run(1, DIRECT),
    "the most rows of one chunk": Run(1, DIRECT, rows=2 * FEATURES),
    "a row more": Run(4, INTO_FLOAT32, (FP32,), rows=2 * FEATURES + 1),
    "evened out": Run(2, INTO_FLOAT32, (BF16,), rows=5000, weight_dtype=FP32),
    "many rows": Run(16, INTO_FLOAT32, (FP32,), rows=65536),
    "no rows": Run(0, (), rows=0),
    "chunk_size": Run(4, INTO_FLOAT32, (FP32,), chunk_size=1024),
    "chunk_size of all rows": Run(1, DIRECT, rows=16384, chunk_size=20000),
    "frozen weight": Run(2, (), needs=(True, False, True)),
    "autocast": Run(2, INTO_FLOAT32, (BF16,), weight_dtype=FP32),
    "float16, kept": Run(2, INTO_FLOAT32, dtype=FP16, weight_dtype=FP16, kept_dtype=FP32),
    "float16": Run(2, INTO_FLOAT32, (FP32,), dtype=FP16, weight_dtype=FP16),
    "float32": Run(2, DIRECT, dtype=FP32, weight_dtype=FP32),
    "bfloat16 sums": Run(2, DIRECT, total_dtype=BF16),
    "float64 sums": Run(1, DIRECT, total_dtype=FP64),
    "float64 sums of chunks": Run(2, ("mm.dtype",) * 4, (FP64,), chunk_size=2048, total_dtype=FP64),
}


def run(given: Run, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """With the gradients' own bytes taken off."""
    monkeypatch.setattr(linear_rows, "plain", lambda _: torch.no_grad())  # autocast knows no meta tensors
    weight = torch.empty(CLASSES, FEATURES, dtype=given.weight_dtype, device="meta")
    x, bias = weight.new_empty(given.rows, FEATURES), weight.new_empty(CLASSES)
    target, upstream = (weight.new_empty(given.rows, dtype=d) for d in (torch.int64, torch.float32))
    data = (upstream, x, weight, bias, target)
    dtypes = (given.dtype, given.total_dtype, given.grad_dtype, given.grad_dtype)
    options = cases.operator_options(CLASSES, {})
    with DryRun(*data) as dry:
        out = linear_rows.row_losses_and_grad(
            linear_rows.SOFTMAX, *data, None, given.chunk_size, *dtypes, *given.needs, *options
        )
    dry.peak -= sum(grad.nbytes for grad in out[2:])
    return dry


def matrices(dry: DryRun) -> set[torch.dtype]:
    return {dtype for shape, dtype in dry.made if shape == (CLASSES, FEATURES)}


@dry_runs
@pytest.mark.parametrize("name", RUNS)
def test_gemms_and_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = RUNS[name]
    dry = run(given, monkeypatch)
    input_gemm = "mm.out" if given.grad_dtype == given.dtype else "mm.dtype_out"
    assert dry.gemms == ["addmm.out", input_gemm, *given.weight_gemms] * given.chunks
    assert matrices(dry) == {*given.others, *([given.grad_dtype] if given.needs[1] else [])}
    size = -(-given.rows // max(given.chunks, 1))
    logits, part = (size * columns * given.dtype.itemsize for columns in (CLASSES, FEATURES))
    held = logits + CLASSES * FEATURES * sum(dtype.itemsize for dtype in given.others)
    vectors = 64 * given.rows + 16 * CLASSES
    # Of the input: the chunk's rows cleared, those of the chunk before, and a copy in the dtype of the logits.
    copies = part if given.chunks == 1 else 3 * part
    assert held <= dry.peak <= held + copies + vectors


@dry_runs
def test_one_chunk_is_the_logits_and_a_copy_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README computes: 1.05 GB of logits and 0.03 of the input; by chunks the total alone would be 2.10."""
    one, chunked = RUNS["one chunk"], RUNS["a row more"]
    assert round(run(one, monkeypatch).peak / 1e9, 2) == 1.08
    assert round(run(chunked._replace(rows=16384), monkeypatch).peak / 1e9, 2) == 3.19


@dry_runs
def test_without_such_a_gemm_products_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is half of a chunk's at most; no product is added to float32 by a GEMM."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    given = RUNS["chunk_size"]
    dry = run(given, monkeypatch)
    assert dry.gemms == (["addmm.out", "mm.out"] + ["mm"] * 8) * 4
    assert matrices(dry) == {BF16, FP32}
    assert dry.peak <= 1.5 * 1024 * CLASSES * 2 + 4 * CLASSES * FEATURES + 4 * 1024 * FEATURES * 2 + 32 * CLASSES


@pytest.mark.parametrize("rows", [0, 1, 4096, 8192, 8193, 100_000])
def test_one_chunk_takes_no_more_than_it_spares(rows: int) -> None:
    for device, plan in linear_chunks.PLANS.items():
        for spared in (0, 4 * CLASSES * FEATURES):
            size = linear_chunks.chunk_rows(rows, CLASSES, 2, device, spared)
            ordinary = linear_chunks.chunk_rows(rows, CLASSES, 2, device)
            fits = plan.wide and rows * CLASSES * 2 <= spared
            assert size == (max(rows, 1) if fits else ordinary)


@pytest.mark.parametrize(
    ("dtype", "total_dtype", "grad_dtype", "bytes_each"),
    [(BF16, FP32, BF16, 4), (BF16, FP64, BF16, 8), (BF16, BF16, BF16, 0), (BF16, FP32, FP32, 0), (FP16, FP32, FP16, 0),
     (FP16, FP32, FP32, 0), (FP32, FP32, FP32, 0), (FP32, FP64, FP32, 0), (FP64, FP64, FP64, 0)],
)  # fmt: skip
def test_what_one_chunk_spares(
    dtype: torch.dtype, total_dtype: torch.dtype, grad_dtype: torch.dtype, bytes_each: int
) -> None:
    assert linear_chunks.spared(10, dtype, total_dtype, grad_dtype) == 10 * bytes_each
    made = linear_chunks.made_in(True, dtype, total_dtype, grad_dtype)
    assert made == (grad_dtype if bytes_each else total_dtype)
    assert linear_chunks.made_in(False, dtype, total_dtype, grad_dtype) == total_dtype
