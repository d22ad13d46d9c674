"""Promise: a few long rows, whose classes threads share, are right and the same on any number of threads."""

import pytest
import torch

import cases
import longtail
import naive
from tolerances import assert_close

pytestmark = pytest.mark.skipif(not longtail.backends()["cpu"].available, reason="needs the CPU kernels")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# A last piece of one class, and three pieces; the row that is ignored holds NaN.
@pytest.mark.parametrize("classes", [65537, 140_003])
@pytest.mark.parametrize("option_set", ["plain", "mixed", "seesaw", "mixed_tail"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_rows_in_pieces(dtype, option_set, classes, threads):
    logits, target = cases.random_case(4, classes, dtype, seed=classes)
    target[0] = classes - 1
    logits = cases.poison_ignored(logits, target)
    options = cases.options(option_set, classes, target, dtype)
    up = cases.upstreams((4,), cases.vector_dtype(dtype))["random"]
    truth, true_grad = naive.rows_and_grad(logits, target, up.double(), **cases.to_float64(options))
    found = []
    for count in (1, 3):
        threads(count)
        for mode in ("backward", "forward", "inplace"):
            x = logits.clone().requires_grad_() * 1
            loss = longtail.cross_entropy(x, target, reduction="none", gradient=mode, **options)
            (grad,) = torch.autograd.grad(loss, x, up)
            assert_close(loss, truth, what=f"loss, {mode}", factor=3)
            assert_close(grad, true_grad, what=f"grad, {mode}", factor=3)
            found.append((loss, grad))
    for (loss, grad), (again, grad_again) in zip(found[:3], found[3:], strict=True):
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


def test_a_bad_target_stands_before_any_write():
    logits = torch.randn(2, 70_000)
    with pytest.raises(IndexError, match="target 70000 in row 1 is out of bounds"):
        longtail.cross_entropy(logits, torch.tensor([0, 70_000]))
