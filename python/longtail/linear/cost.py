"""Which way of chunks costs a CPU less: by what each does beyond the products that both do.

Rows in chunks take three GEMMs, but read the weight for each chunk, and read and write the sum of its gradient [C, D].
Classes in chunks make the weight's gradient once, chunk by chunk; what adds up is the gradient of the input [N, D].
But the logits are made twice, and swept twice, unless their statistics are known.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Prices(NamedTuple):
    """Picoseconds of one core."""

    product: float
    """Of a multiply-add in a GEMM of many rows."""
    logit: float
    """Of a logit that is made, swept for its row's statistics, and made again, besides the multiply-adds."""
    weight_read: float
    """Of an element of the weight, for each chunk of rows and GEMM that reads it: it is packed for few rows."""
    weight_total: float
    """Of an element of the sum of the weight's gradient, for each chunk of rows."""
    input_total: float
    """Of an element of the sum of the input's gradient, for each chunk of classes."""


@functools.cache
def has_amx() -> bool:
    """Whether bfloat16 GEMMs run on tiles, which take their second factor by rows."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


_PRICES = {
    torch.float64: Prices(product=24, logit=900, weight_read=700, weight_total=700, input_total=0),
    torch.float32: Prices(product=12, logit=500, weight_read=350, weight_total=350, input_total=0),
    torch.bfloat16: Prices(product=10, logit=500, weight_read=350, weight_total=2000, input_total=600),
}
_AMX_PRODUCT = 1.6  # of bfloat16


class Task(NamedTuple):
    """What is to be made of ``rows`` rows of ``features`` features."""

    rows: int
    features: int
    dtype: torch.dtype
    """Of the logits."""
    needs: tuple[bool, bool]
    """Whether input and weight need a gradient."""
    known: bool = False
    """Whether the statistics of the rows are, so that classes in chunks need make the logits but once."""


def by_classes(task: Task, row_chunks: int, class_chunks: int, num_classes: int) -> bool:
    """Whether chunks of classes are the cheaper ones. The same answer for the same shapes, dtypes and processor.

    float16 stays with rows: its products of many rows could overflow.
    """
    prices = _PRICES.get(task.dtype)
    if prices is None or row_chunks < 2:
        return False
    if task.dtype == torch.bfloat16 and has_amx():
        prices = prices._replace(product=_AMX_PRODUCT)
    n, d, needs = task.rows, task.features, task.needs
    # All by one class.
    rows = row_chunks * d * (prices.weight_read * (1 + needs[0]) + prices.weight_total * needs[1])
    again = 0 if task.known or not any(needs) else 1 - 1 / class_chunks
    classes = again * n * (prices.logit + d * prices.product)
    classes += needs[0] * class_chunks * n * d * prices.input_total / num_classes
    return classes < rows
