"""Promise: the fused linear loss holds one chunk of logits, and makes nothing that is not asked for."""

from __future__ import annotations

import pytest
import torch

import cases
import longtail
from allocations import peak_while
from linear_cases import Calls
from longtail.linear import chunks as linear_chunks
from longtail.linear import rows as linear_rows

ROWS, FEATURES, CLASSES = 12, 8, 13


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_the_operator_makes_what_is_needed_and_reads_nothing_back(
    needs: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)  # as on a GPU
    x, target = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    weight, bias = torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    dtypes = [torch.float32] * 4
    options = cases.operator_options(CLASSES, {})
    with Calls() as calls:
        out = linear_rows.row_losses_and_grad(
            linear_rows.SOFTMAX, torch.ones(ROWS), x, weight, bias, target, None, 5, *dtypes, *needs, *options
        )
    assert [g.numel() > 0 for g in out[2:]] == list(needs)
    chunks = 3
    names = [name for name, _ in calls.seen]
    gemms = [name for name in names if "mm" in name]
    assert len(gemms) == chunks * (1 + needs[0] + needs[1])
    for sync in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"):
        assert not [name for name in names if name.split("::")[1].split(".")[0] == sync]


def test_the_parameter_takes_the_gradient_uncopied() -> None:
    x, target = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    weight = torch.randn(CLASSES, FEATURES).requires_grad_()
    with Calls() as calls:
        loss = longtail.linear_cross_entropy(x, weight, target)
    (out,) = [out for name, out in calls.seen if name == "longtail::linear_softmax_loss_and_grad"]
    made = out[3].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("mode", ["mean", "none", "no_grad"])
def test_peak_memory_is_an_eighth_of_the_logits(mode: str, dtype: torch.dtype) -> None:
    """Above inputs and gradients, a BLAS's own workspaces aside."""
    rows, features, classes = 1152, 64, 16384
    x, weight = torch.randn(rows, features, dtype=dtype), torch.randn(classes, features, dtype=dtype)
    target = torch.randint(classes, (rows,))
    needs = mode != "no_grad"
    leaves = x.requires_grad_(needs), weight.requires_grad_(needs)

    def step() -> None:
        loss = longtail.linear_cross_entropy(*leaves, target, reduction="none" if mode == "none" else "mean")
        if needs:
            loss.backward(torch.full_like(loss, 0.5))

    peak, _ = peak_while(step)
    grads = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    logits = rows * classes * dtype.itemsize
    assert logits / 32 < peak - grads <= logits / 8


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1152, 2049, 4095, 5000, 100_000])
@pytest.mark.parametrize("classes", [1, 32768, 1_000_000])
def test_default_chunks(rows: int, classes: int) -> None:
    for device, plan in linear_chunks.PLANS.items():
        size = linear_chunks.chunk_rows(rows, classes, 4, device)
        assert 1 <= size <= max(rows, 1)
        chunks = -(-rows // size)
        most = 2 * plan.least - 1 if plan.wide else plan.least
        assert size <= max(most, -(-rows // plan.share))
        assert size <= most or size * classes * 4 <= plan.budget
        assert not plan.wide or size >= min(rows, plan.least)
        assert chunks > 16 or rows <= size or rows - (chunks - 1) * size > 0.5 * size, "the last chunk is no rump"
