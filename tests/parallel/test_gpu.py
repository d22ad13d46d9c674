"""Promise: on a GPU, one NCCL rank and the GPU's kernels as the local passes give the loss of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import cases
import longtail
from rank_cases import close_in_norm
from tolerances import assert_close

pytestmark = pytest.mark.gpu


@pytest.fixture
def nccl() -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("gradient", cases.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "weight", "smoothing_weight", "mixed"])
def test_one_nccl_rank(option_set: str, dtype: torch.dtype, gradient: str) -> None:
    logits, target = cases.random_case(9, 1000, dtype)
    options = cases.options(option_set, 1000, target, dtype)
    z = logits.double().requires_grad_()
    loss = longtail.reference.cross_entropy(z, target, **cases.to_float64(options))
    (grad,) = torch.autograd.grad(loss, z)
    x = logits.cuda().requires_grad_()
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = longtail.vocab_parallel_cross_entropy(x * 1.0, target.cuda(), gradient=gradient, **moved)
    assert_close(got.cpu(), loss.detach(), factor=8)
    assert_close(torch.autograd.grad(got, x)[0].cpu(), grad, factor=8)


@pytest.mark.usefixtures("nccl")
def test_linear_on_one_nccl_rank() -> None:
    g = cases.generator(1)
    x, w = (torch.randn(n, 64, generator=g, dtype=torch.float64) for n in (96, 1000))
    target = torch.randint(1000, (96,), generator=g)
    truth = longtail.reference.cross_entropy(x @ w.T, target, focal_gamma=2.0)
    moved = [p.float().cuda().requires_grad_() for p in (x, w)]
    for sequence_parallel in (False, True):
        loss = longtail.vocab_parallel_linear_cross_entropy(
            *moved, target.cuda(), focal_gamma=2.0, chunk_size=32, sequence_parallel=sequence_parallel
        )
        close_in_norm(loss.cpu(), truth, torch.bfloat16, "loss")  # TF32 may be on
        assert all(p.isfinite().all() for p in torch.autograd.grad(loss, moved))
