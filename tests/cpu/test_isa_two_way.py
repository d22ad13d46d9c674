"""Promise: every instruction set computes ZLPR and the two-way loss alike, within its memory."""

from __future__ import annotations

import sys

import pytest

from isa import Scripts, supported

AGREE = """
from kernels import CPU
from two_way_cases import TwoWayBatch
for dtype in OWN_DTYPES:
    for shape in ((5, 37), (3, 1100), (2, 5, 19)):
        for kind, name in (("class", "zlpr_vectors"), ("hard", "zlpr"), ("soft", "two_way_vectors")):
            batch = TwoWayBatch.of(CPU["cpu"], shape, kind, name, dtype)
            batch.run()
            batch.check(2)
print("agrees")
"""

GUARD = """
from guard_pages import GuardedEnd
of_logits, of_targets = GuardedEnd(), GuardedEnd()
for dtype in OWN_DTYPES:
    for shape in (*((3, n) for n in (*range(1, 20), 35, 63, 64, 65, 1030)), (2, 3, 7), (2, 5, 17), (1, 18, 33)):
        values = torch.randn(shape).to(dtype)
        y = (torch.rand(shape) < 0.4).to(dtype)
        for target in (y, (torch.rand(shape[0], *shape[2:]) * shape[1]).long()):
            z = of_logits.hold(values)
            t = of_targets.hold(target) if target is y else target
            one, two = values.clone().requires_grad_(), z.detach().requires_grad_()
            for function in (longtail.zlpr_loss, longtail.two_way_loss):
                loss, same = function(one, target, reduction="sum"), function(two[:], t, reduction="sum")
                assert loss == same
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
