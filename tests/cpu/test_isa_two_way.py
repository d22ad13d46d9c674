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
import ctypes, mmap
# Logits and targets end where unreadable pages begin: a vector load past the last element is a crash.
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
memories = []
for _ in range(2):
    memory = mmap.mmap(-1, 17 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + 16 * page), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    memories.append(memory)

def at_the_end(memory, x):
    place = 16 * page - x.numel() * x.element_size()
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=place).view(x.shape).copy_(x)

for dtype in OWN_DTYPES:
    for shape in (*((3, n) for n in (*range(1, 20), 35, 63, 64, 65, 1030)), (2, 3, 7), (2, 5, 17), (1, 18, 33)):
        values = torch.randn(shape).to(dtype)
        y = (torch.rand(shape) < 0.4).to(dtype)
        for target in (y, (torch.rand(shape[0], *shape[2:]) * shape[1]).long()):
            z = at_the_end(memories[0], values)
            t = at_the_end(memories[1], target) if target is y else target
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
    done = scripts.run(isa, AGREE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("isa", supported())
def test_nothing_is_read_past_the_last_element(isa: str, scripts: Scripts) -> None:
    done = scripts.run(isa, GUARD)
    assert done.returncode == 0, f"exit {done.returncode} (-11 is a read out of bounds): {done.stdout + done.stderr}"
    assert "within bounds" in done.stdout
