"""Promise: every instruction set computes hierarchical cross-entropy alike, within its memory."""

from __future__ import annotations

import sys

import pytest

from isa import Scripts, supported

AGREE = """
import hierarchy_cases
for dtype in OWN_DTYPES:
    for name in ("one_deep", "two", "flat", "small", "deep", "shuffled", "ordered"):
        hierarchy, names = hierarchy_cases.tree(name)
        logits, target = cases.random_case(6, len(names), dtype)
        vectors = hierarchy_cases.vectors(len(names), 6, dtype)
        up = torch.randn(6, generator=cases.generator(1), dtype=torch.float64)
        for given in ({}, vectors):
            y, wide = logits.double().requires_grad_(), {k: x.double() for k, x in given.items()}
            with longtail.use_backend("reference"):
                truth = longtail.hierarchical_cross_entropy(y, target, hierarchy, 0.2, reduction="none", **wide)
                true_grad, = torch.autograd.grad(truth, y, up)
            for mode in ("backward", "inplace"):
                x = logits.clone().requires_grad_()
                loss = longtail.hierarchical_cross_entropy(
                    x * 1, target, hierarchy, 0.2, reduction="none", gradient=mode, **given
                )
                grad, = torch.autograd.grad(loss, x, up.to(loss.dtype))
                assert_close(loss, truth.detach(), what=f"loss {dtype} {name}", factor=4)
                assert_close(grad, true_grad, what=f"gradient {dtype} {name}", factor=4)
print("agrees")
"""

GUARD = """
from guard_pages import GuardedEnd
end = GuardedEnd()
for dtype in OWN_DTYPES:
    for classes in (*range(1, 20), 35, 63, 64, 65, 300):
        for step in (1, 7):
            paths = [(j * step % classes % 3, j * step % classes % 5, j) for j in range(classes)]
            paths = paths if step > 1 else sorted(paths)
            hierarchy = longtail.Hierarchy.from_paths(paths)
            values, target = cases.random_case(3, classes, dtype)
            z = end.hold(values)
            one, two = z.clone().requires_grad_(), z.detach().requires_grad_()
            loss = longtail.hierarchical_cross_entropy(one, target, hierarchy)
            same = longtail.hierarchical_cross_entropy(two[:], target, hierarchy)
            assert loss.isnan() or loss == same
            grad, = torch.autograd.grad(loss, one)
            other, = torch.autograd.grad(same, two)
            assert torch.equal(grad, other)
print("within bounds")
"""


@pytest.mark.parametrize("isa", supported())
def test_results_agree_with_float64_truth(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, AGREE, "agrees")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("isa", supported())
def test_nothing_is_read_past_the_last_element(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, GUARD, "within bounds")
