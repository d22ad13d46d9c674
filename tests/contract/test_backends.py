"""Promise: `backends()` is true, `use_backend` and `LONGTAIL_BACKEND` choose, each choice trains alike."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import backends
import cases
import longtail
from backends import chosen
from longtail.ops import cpu, cuda, dispatch, triton
from tolerances import assert_close


def test_backends_lists_each_with_its_status() -> None:
    found = longtail.backends()
    assert {"cpu", "reference"} <= set(found)
    for name in ("cpu", "reference"):
        assert found[name].available, found[name].detail
        assert len(found[name].detail) > 0


def test_use_backend_nests_and_restores() -> None:
    assert chosen() == "cpu"
    with longtail.use_backend("reference"):
        assert chosen() == "reference"
        with longtail.use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(KeyError), longtail.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with (
        pytest.raises(ValueError, match=r"(?s)(?=.*gpux)(?=.*cpu)(?=.*reference)"),
        longtail.use_backend("gpux"),
    ):
        pass
    assert chosen() == "cpu"


def train(steps: int = 12) -> list[float]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = torch.randn(40, 6), torch.randint(5, (40,))
    options = cases.options("mixed", 5, target)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = longtail.cross_entropy(model(x), target, **options)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_reference_backend_trains_the_same() -> None:
    kernel = train()
    with longtail.use_backend("reference"):
        fallback = train()
    assert kernel[-1] < kernel[0] - 0.05
    assert fallback == pytest.approx(kernel, rel=1e-4)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_the_reference_backend_has_every_mode(mode: str, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(6, 9, dtype)
    options = cases.options("mixed", 9, target, dtype)
    results = []
    for backend in ("cpu", "reference"):
        x = logits.clone().requires_grad_()
        with longtail.use_backend(backend):
            loss, stats = longtail.cross_entropy(
                x * 1.0, target, gradient=mode, return_stats=True, reduction="none", **options
            )
            up = cases.upstreams(loss.shape, loss.dtype)["random"]
            results.append([loss.detach(), *stats[:3], *torch.autograd.grad(loss, x, up)])
    for kernel, fallback in zip(*results, strict=True):
        assert kernel.dtype == fallback.dtype
        assert_close(kernel, fallback.double(), factor=4)


@pytest.mark.parametrize("shape", [(40, 6), (40, 200), (4, 6, 5, 2)], ids=str)
def test_backward_may_run_on_another_backend_than_forward(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=cases.generator(0), requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=cases.generator(1))
    found = []
    for forward, backward in (("cpu", "cpu"), ("cpu", "reference"), ("reference", "cpu")):
        with longtail.use_backend(forward):
            loss = longtail.cross_entropy(x, target, focal_gamma=1.5)
        with longtail.use_backend(backward):
            found += torch.autograd.grad(loss, x)
    for grad in found[1:]:
        assert_close(grad, found[0].double(), factor=4)


def run(backend: str) -> subprocess.CompletedProcess[str]:
    body = (
        f"import sys; sys.path.insert(0, {os.path.dirname(backends.__file__)!r})\n"
        "import longtail, torch\n"
        "import backends\n"
        "print(backends.chosen())"
    )
    environment = {**os.environ, "LONGTAIL_BACKEND": backend}
    return subprocess.run(
        [sys.executable, "-c", body],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_environment_chooses(backend: str) -> None:
    done = run(backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [backend]


def test_the_environment_is_checked() -> None:
    done = run("gpux")
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert "LONGTAIL_BACKEND" in done.stderr
    assert "gpux" in done.stderr
    assert "reference" in done.stderr


@pytest.fixture
def no_cpu_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(dispatch._kernels)
    dispatch._kernels.clear()
    dispatch._warn_of_plain_pytorch.cache_clear()
    monkeypatch.setattr(cpu, "_missing", "built without a C++ compiler. Reinstall with g++")
    yield
    dispatch._warn_of_plain_pytorch.cache_clear()
    dispatch._kernels.clear()
    dispatch._kernels.update(before)


TARGET = torch.tensor([0, 3])
CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda z: longtail.cross_entropy(z, TARGET),
    "sigmoid": lambda z: longtail.sigmoid_focal_loss(z, TARGET).sum(),
    "linear": lambda z: longtail.linear_cross_entropy(z, torch.ones(5, 4), TARGET),
    "compiled": torch.compile(lambda z: longtail.focal_loss(z, TARGET), fullgraph=True, backend="aot_eager"),
}


def said_of_plain_pytorch(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is RuntimeWarning and "plain PyTorch" in str(w.message)]


@pytest.mark.usefixtures("no_cpu_library")
@pytest.mark.parametrize("name", CALLS)
def test_the_lack_of_kernels_is_said_once(name: str) -> None:
    def step() -> None:
        CALLS[name](torch.zeros(2, 4, requires_grad=True)).backward()

    with longtail.use_backend("reference"):
        assert said_of_plain_pytorch(step) == [], "it was asked for"
    (text,) = said_of_plain_pytorch(step)
    assert "on cpu tensors" in text
    assert "cpu: built without a C++ compiler. Reinstall with g++. LONGTAIL_BACKEND=reference silences" in text
    for other in CALLS.values():
        assert said_of_plain_pytorch(lambda call=other: call(torch.zeros(2, 4))) == []  # type: ignore[misc]


@pytest.mark.usefixtures("no_cpu_library")
def test_the_lack_of_kernels_is_said_of_devices_that_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(device: str) -> list[str]:
        return said_of_plain_pytorch(lambda: dispatch.kernel("softmax_loss", torch.device(device)))

    monkeypatch.setattr(cuda, "missing", lambda: "no library")
    monkeypatch.setattr(triton, "missing", lambda: "not installed")
    assert ["cuda: no library; triton: not installed" in text for text in lookup("cuda")] == [True]
    assert lookup("mps") == lookup("cuda") == []


def test_kernels_warn_of_nothing() -> None:
    dispatch._kernels.clear()
    for call in CALLS.values():
        assert said_of_plain_pytorch(lambda call=call: call(torch.zeros(2, 4))) == []  # type: ignore[misc]


@pytest.mark.gpu
def test_cuda_logits_by_the_reference_equal_the_cpu() -> None:
    logits, target = cases.random_case(6, 9)
    options = cases.options("mixed", 9, target)
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with longtail.use_backend("reference"):
            loss = longtail.cross_entropy(x, target.to(device), **moved)
            loss.backward(torch.tensor(1.7, device=device))
        results.append((loss.detach().cpu(), x.grad.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert_close(on_gpu, on_cpu.double(), factor=4)
