"""Promise: `row_statistics` in every layout and gradient mode, in graphs that are kept, compiled and exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from statistics_cases import weighted
from tolerances import assert_close, assert_same


def test_losses_of_one_graph() -> None:
    """Used twice, kept, and backward twice: the gradient of each is its own."""
    logits, target = cases.random_case(6, 9)
    x = logits.requires_grad_()
    found = longtail.row_statistics(x, target)
    first, second = found.log_prob.sum(), (found.entropy * found.log_prob).sum()
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (first, second, first, first + second)]
    assert_same(grads[0], grads[2])
    assert_close(grads[3], (grads[0] + grads[1]).double(), factor=4)
    expected = torch.autograd.grad(-F.cross_entropy(x, target, reduction="sum"), x)[0]
    assert_close(grads[0], expected.double(), factor=4)
    (grad,) = torch.autograd.grad(found.entropy.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **cases.LAYOUTS,
    "images": lambda x: x.view(2, 3, 5).movedim(1, 2).contiguous(),
    "channels_last": lambda x: x.view(2, 3, 5).movedim(1, 2),
}


@pytest.mark.parametrize("gradient", ["backward", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_modes(layout: str, gradient: str) -> None:
    rows, target = cases.random_case(6, 5)
    laid = LAYOUTS[layout](rows)
    images = laid.dim() == 3
    g = target.view(2, 3) if images else target
    leaf = laid.clone().requires_grad_()
    plain = leaf.movedim(1, 2).reshape(6, 5) if images else leaf
    want = longtail.reference.row_statistics(plain, target)
    (want_grad,) = torch.autograd.grad(weighted(want), leaf)
    x = laid.requires_grad_()
    z = x * 1.0
    found = longtail.row_statistics(z, g, gradient=gradient)
    assert found.correct.shape == g.shape
    (grad,) = torch.autograd.grad(weighted([v.reshape(-1) for v in found[:5]]), x)
    for got, expected in zip(found, want, strict=True):
        assert_close(got.reshape(-1).double(), expected.double(), factor=1e7)
    assert_close(grad, want_grad.double(), factor=4)
    if gradient == "inplace" and layout == "contiguous":
        assert_close(z, grad.double())


def test_in_place_serves_one_backward_and_no_leaf() -> None:
    logits, target = cases.random_case(6, 5)
    x = logits.requires_grad_()
    z = x * 1.0
    square = z.square()  # whose backward reads z
    found = longtail.row_statistics(z, target, gradient="inplace")
    assert_same(z, x)
    found.log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run once"):
        found.log_prob.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with pytest.raises(ValueError, match="leaf"):
        longtail.row_statistics(x, target, gradient="inplace")
    with pytest.raises(ValueError, match="gradient is 'forward', expected one of 'backward', 'inplace'"):
        longtail.row_statistics(z, target, gradient="forward")


def _ratio_loss(z: Tensor, target: Tensor) -> Tensor:
    found = longtail.row_statistics(z * 1.0, target, temperature=0.9, softcap=20.0)
    return -(found.log_prob.exp() * 2.0).sum() - 0.01 * found.entropy.mean()


def test_compile_func_and_export() -> None:
    logits, target = cases.random_case(6, 13)
    x = logits.requires_grad_()
    loss = _ratio_loss(x, target)
    (want,) = torch.autograd.grad(loss, x)
    compiled = torch.compile(_ratio_loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, target), x)
    assert_close(got, want.double())
    assert_close(compiled(x.detach(), target), loss.double())
    assert_close(torch.func.grad(_ratio_loss)(x.detach(), target), want.double())

    class Module(torch.nn.Module):
        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            return _ratio_loss(z, target)

    exported = torch.export.export(Module(), (x, target)).module()
    (got,) = torch.autograd.grad(exported(x, target), x)
    assert_close(got, want.double(), factor=4)
    with pytest.raises(RuntimeError, match="no rule for vmap"):
        torch.func.vmap(lambda z: _ratio_loss(z, target))(torch.stack([logits, logits]))
