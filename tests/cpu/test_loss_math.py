"""csrc/loss_math.h, dense_math.h and sigmoid_math.h in scalar double precision: what CPU and CUDA kernels share."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtail import reference

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("loss_math") / "loss_math_host.so"
    source = Path(__file__).with_name("loss_math_host.cpp")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


# Those of LossOptions, in its order.
NUMBERS = [x.name for x in torch.ops.longtail.softmax_loss.default._schema.arguments if str(x.type) == "float"]


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def row_in_pieces(library, u, g, omega, ends, options, v):
    stats, loss, grad = (torch.full(n, torch.nan, dtype=torch.float64) for n in ((5,), (1,), u.shape))
    given = {"cross_entropy_coefficient": 1.0, "scale": 1.0} | options
    ends, options = torch.tensor(ends), torch.tensor([given.get(x, 0.0) for x in NUMBERS], dtype=torch.float64)
    library.row_in_pieces(
        *(pointer(u), ctypes.c_int64(u.numel()), ctypes.c_int64(g), pointer(omega), pointer(ends)),
        *(
            ctypes.c_int64(len(ends)),
            pointer(options),
            ctypes.c_double(v),
            pointer(stats),
            pointer(loss),
            pointer(grad),
        ),
    )
    return stats, loss, grad


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_of_a_row_gives_the_reference(library, data):
    num_classes = data.draw(st.integers(1, 40), label="C")
    margin = data.draw(st.sampled_from([0.0, 3.0, 20.0, 100.0, 1e4]), label="margin")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    cuts = data.draw(st.sets(st.integers(1, num_classes), max_size=5), label="cuts")
    smoothing, gamma, kappa, z_loss = data.draw(st.sampled_from([(0, 0, 0, 0), (0.1, 2, -0.3, 0.01), (0, 0.5, 0, 0)]))
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(num_classes, generator=generator, dtype=torch.float64) * 2
    g = int(torch.randint(num_classes, (1,), generator=generator))
    u[g] += margin
    omega = torch.rand(num_classes, generator=generator, dtype=torch.float64)
    v = 0.7
    options = {"label_smoothing": smoothing, "focal_gamma": gamma, "complement_coefficient": kappa, "z_loss": z_loss}
    stats, loss, grad = row_in_pieces(library, u, g, omega, sorted(cuts | {num_classes}), options, v)

    logits = u[None].clone().requires_grad_()
    target = torch.tensor([g])
    expected_stats = reference.softmax.accumulate(u[None], target, omega, smoothing != 0)[0]
    expected = reference.softmax_loss(
        logits,
        target,
        weight=omega,
        label_smoothing=smoothing,
        focal_gamma=gamma,
        complement_gamma=kappa * max(num_classes - 1, 1),
        z_loss=z_loss,
        sample_weight=torch.tensor([v], dtype=torch.float64),
    )
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad[0], rtol=1e-9, atol=1e-12)


def test_masked_classes_contribute_nothing(library):
    u = torch.tensor([1.0, -torch.inf, 0.5, -torch.inf], dtype=torch.float64)
    omega = torch.ones(4, dtype=torch.float64)
    options = {"complement_coefficient": 0.3}
    stats, loss, grad = row_in_pieces(library, u, 0, omega, [2, 4], options, 1.0)
    alone = row_in_pieces(library, u[[0, 2]].contiguous(), 0, omega[:2], [2], options, 1.0)
    torch.testing.assert_close(stats, alone[0])
    torch.testing.assert_close(loss, alone[1])
    torch.testing.assert_close(grad[[0, 2]], alone[2])
    assert grad[1] == 0
    assert grad[3] == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_of_a_row_of_probabilities_gives_its_definition(library, data):
    num_classes = data.draw(st.integers(1, 40), label="C")
    margin = data.draw(st.sampled_from([0.0, 3.0, 20.0, 100.0, 1e4]), label="margin")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_classes), max_size=5), label="cuts") | {num_classes})
    smoothing, z_loss = data.draw(st.sampled_from([(0.0, 0.0), (0.1, 0.01)]))
    u, y, omega = torch.randn(3, num_classes, generator=generator, dtype=torch.float64)
    u[int(torch.randint(num_classes, (1,), generator=generator))] += margin
    y, omega, v = (y * 3).softmax(0), omega.abs(), 0.7
    absent = torch.rand(num_classes, generator=generator) < 0.3
    if not smoothing and not absent.all():  # such classes are as if they were not there
        u[absent], y[absent] = -torch.inf, 0.0
    stats, loss, grad = (torch.full(n, torch.nan, dtype=torch.float64) for n in ((4,), (1,), u.shape))
    ends, given = torch.tensor(cuts), {"label_smoothing": smoothing, "z_loss": z_loss}
    options = torch.tensor([given.get(x, 0.0) for x in NUMBERS], dtype=torch.float64)
    library.dense_row_in_pieces(
        *(pointer(u), pointer(y), ctypes.c_int64(num_classes), pointer(omega), pointer(ends)),
        *(ctypes.c_int64(len(cuts)), pointer(options), ctypes.c_double(v), pointer(stats), pointer(loss)),
        pointer(grad),
    )
    there = u.isfinite()
    x = u[there].clone().requires_grad_()
    q = omega[there] * ((1 - smoothing) * y[there] + smoothing / num_classes)
    lse = x.logsumexp(0)
    expected = v * (q * (lse - x)).sum() + z_loss * lse**2
    (expected_grad,) = torch.autograd.grad(-1.5 * expected, x)
    top = x.detach().amax()
    sums = [top, (x - top).exp().sum(), (q * (top - x)).sum(), q.sum()]
    torch.testing.assert_close(stats, torch.stack(sums).detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss[0], expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad[there], expected_grad, rtol=1e-9, atol=1e-12)
    assert not grad[~there].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_sigmoid_elements(library, gamma):
    logits = [s * v for v in (0.0, 0.3, 3.0, 17.0, 40.0, 89.0, 700.0, 1e4, 1e300) for s in (1, -1)]
    pairs = torch.tensor([(z, y) for z in logits for y in (0.0, 1.0, 0.2, 0.9)], dtype=torch.float64)
    z, y = pairs.t().contiguous()
    loss, slope = (torch.full_like(z, torch.nan) for _ in range(2))
    library.sigmoid_elements(
        *(pointer(z), pointer(y), ctypes.c_int64(z.numel()), ctypes.c_double(gamma), pointer(loss), pointer(slope))
    )
    x = z.clone().requires_grad_()
    expected = reference.sigmoid_loss(x[:, None], y[:, None], gamma=gamma)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(slope, grad, rtol=1e-10, atol=1e-300)
