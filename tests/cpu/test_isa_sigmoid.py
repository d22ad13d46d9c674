"""Promise: every instruction set computes the sigmoid family and the strided layouts alike, within its memory."""

from __future__ import annotations

import sys

import pytest

from isa import Scripts, supported, with_floats

AGREE = """
import sigmoid_cases
from longtail.ops.layout import to_rows
for dtype in cases.DTYPES:
    for shape in ((5, 1), (5, 3), (4, 19), (3, 600), (2, 3, 5), (2, 70, 37), (1, 1, 600)):
        for kind in sigmoid_cases.TARGETS:
            for option_set in ("plain", "focal", "mixed"):
                logits, target = sigmoid_cases.random_case(shape, kind, dtype, spread=8.0)
                options = sigmoid_cases.options(option_set, logits)
                x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
                loss = longtail.sigmoid_focal_loss(x, target, reduction="rows", **options)
                rows = to_rows(y) if y.dim() == 3 else y
                flat = target.flatten() if kind == "class" else to_rows(target) if y.dim() == 3 else target
                wide = cases.to_float64(options)
                if "sample_weight" in wide:
                    wide["sample_weight"] = wide["sample_weight"].flatten()
                truth = longtail.reference.sigmoid_loss(rows, flat if kind == "class" else flat.double(), **wide)
                up = torch.randn(truth.shape, generator=cases.generator(1), dtype=torch.float64)
                what = f"{dtype} {shape} {kind} {option_set}"
                assert_close(loss.flatten(), truth.detach(), what="loss " + what, factor=2)
                grad, = torch.autograd.grad(loss, x, up.reshape(loss.shape).to(loss.dtype))
                assert_close(grad, torch.autograd.grad(truth, y, up)[0], what="grad " + what, factor=2)
    for shape in ((3, 7, 5), (2, 33, 40), (1, 1030, 17)):
        logits, target = cases.random_case(shape[0] * shape[2], shape[1], dtype)
        images = logits.reshape(shape[0], shape[2], shape[1]).movedim(1, 2).contiguous().requires_grad_()
        y = logits.double().requires_grad_()
        for option_set in ("plain", "mixed"):
            options = cases.options(option_set, shape[1], target, dtype)
            truth = longtail.reference.softmax_loss(y, target, **cases.to_float64(options))
            up = torch.randn(truth.shape, generator=cases.generator(1), dtype=torch.float64)
            at = target.reshape(shape[0], shape[2])
            if "sample_weight" in options:
                options["sample_weight"] = options["sample_weight"].reshape(at.shape)
            for mode in ("backward", "forward"):
                loss = longtail.cross_entropy(images, at, reduction="none", gradient=mode, **options)
                assert_close(loss.flatten(), truth.detach(), what=f"loss {dtype} {shape} {option_set}", factor=3)
                grad, = torch.autograd.grad(loss, images, up.reshape(loss.shape).to(loss.dtype))
                true_grad, = torch.autograd.grad(truth, y, up, retain_graph=True)
                assert_close(to_rows(grad), true_grad, what=f"grad {dtype} {shape} {option_set}", factor=3)
print("agrees")
"""

LOGISTIC = """
# The one-element losses that need each function to full relative precision: log1p(e), 1 / (1 + e), e^-|z|.
z = torch.cat([-torch.rand(100_000, generator=cases.generator(0), dtype=torch.float64) * s for s in (80.0, 3.0, 1e-3)])
for dtype, allowed in ((torch.float32, 4 * 2.0**-24), (torch.float64, 8 * 2.0**-53)):
    x = z.to(dtype).requires_grad_()
    loss = longtail.sigmoid_focal_loss(x, torch.zeros(x.shape), None, 0.0)
    grad, = torch.autograd.grad(loss, x, torch.full_like(x, 1.0))
    exact = np.exp(x.detach().numpy().astype(np.longdouble))
    for got, want in ((loss.detach(), np.log1p(exact)), (grad, exact / (1 + exact))):
        error = float(np.max(np.abs(got.numpy().astype(np.longdouble) / want - 1)))
        print(dtype, error)
        assert error <= allowed, (dtype, error)
print("precise")
"""

GUARD = """
import sigmoid_cases
from guard_pages import GuardedEnd
of_logits, of_targets = GuardedEnd(), GuardedEnd()
for dtype in OWN_DTYPES:
    for size in (*range(1, 36), 63, 64, 65, 100):
        for shape in ((3, size), (1, 3, size), (2, 1, size)):
            for kind in ("class", "soft"):
                logits, target = sigmoid_cases.random_case(shape, kind, dtype)
                name = {1: "mixed", 2: "balanced"}.get(shape[0], "per_class")  # one row, or image, or more
                tail = sigmoid_cases.operator_options(sigmoid_cases.options(name, logits))
                z = of_logits.hold(logits)
                t = target.flatten() if kind == "class" else of_targets.hold(target)
                up = torch.randn(logits.numel() // shape[1], generator=cases.generator(0)).to(cases.vector_dtype(dtype))
                _, grad = torch.ops.longtail.sigmoid_loss_and_grad(up, z, t, *tail, True)
                torch.ops.longtail.sigmoid_loss_and_grad_(up, z, t, *tail, False)
                assert_close(z, grad.double(), what=f"{dtype} {shape}", factor=3)
            if len(shape) == 3:
                target = torch.randint(shape[1], (shape[0] * size,), generator=cases.generator(1))
                tail = cases.operator_options(shape[1], cases.options("mixed", shape[1], target, dtype))
                up = cases.upstreams(target.shape, cases.vector_dtype(dtype))["random"]
                z = of_logits.hold(logits)
                _, stats, grad = torch.ops.longtail.softmax_loss_and_grad(up, z, target, *tail)
                back = torch.ops.longtail.softmax_loss_backward(up, z, target, stats, *tail)
                torch.ops.longtail.softmax_loss_and_grad_(up, z, target, *tail)
                assert_close(z, grad.double(), what=f"{dtype} {shape}", factor=3)
                assert_close(back, grad.double(), what=f"{dtype} {shape}", factor=3)
                torch.ops.longtail.scale_grad_(z, up, None, -100)
print("within bounds")
"""


@pytest.mark.parametrize("isa", supported())
def test_results_agree_with_float64_truth(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, AGREE, "agrees")


@pytest.mark.parametrize("isa", with_floats())
def test_every_digit_of_small_losses(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, LOGISTIC, "precise")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("isa", supported())
def test_nothing_is_read_past_the_last_element(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, GUARD, "within bounds")
