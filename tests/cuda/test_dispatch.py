"""Promise: `backends()` says in one line why the CUDA kernels do not run; operators that they lack run elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import longtail
from longtail.ops import cuda, dispatch, layout, operators, plain, triton


@pytest.fixture(autouse=True)
def _fresh_answers() -> Iterator[None]:
    before, questions = dict(dispatch._kernels), (cuda.missing, triton.missing)
    for question in questions:
        question.cache_clear()
    yield
    for question in questions:
        question.cache_clear()
    dispatch._kernels.clear()
    dispatch._kernels.update(before)


def status() -> tuple[bool, str]:
    return longtail.backends()["cuda"]


def library(monkeypatch: pytest.MonkeyPatch, *majors: int, loads: Callable[[str], None] = lambda _: None) -> list[str]:
    """An install with libraries for these CUDA majors; returns the list of those that get loaded."""
    loaded: list[str] = []

    def load(path: str) -> None:
        loads(path)
        loaded.append(path)

    monkeypatch.setattr(cuda, "libraries", lambda: {m: f"/install/_C_cuda{m}.so" for m in majors})
    monkeypatch.setattr(torch.ops, "load_library", load)
    return loaded


def gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_cuda_comes_first() -> None:
    assert next(iter(longtail.backends())) == "cuda"


def test_libraries_are_known_by_their_cuda_major(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["_C_cuda13.so", "_C_cuda12.so", "_C_cuda.so", "_C_cuda13_old.so"]
    monkeypatch.setattr(cuda.glob, "glob", lambda _: [f"/install/{name}" for name in names])
    assert cuda.libraries() == {13: "/install/_C_cuda13.so", 12: "/install/_C_cuda12.so"}


def test_an_install_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch)
    gpu(monkeypatch, "13.0", (9, 0))
    available, detail = status()
    assert not available
    assert "built without nvcc" in detail
    assert "LONGTAIL_CUDA=1" in detail
    with pytest.raises(ValueError, match="built without nvcc"), longtail.use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("majors", "cuda", "capabilities", "words"),
    [
        ((13,), None, (), ("compiled for CUDA 13", "built without CUDA")),
        ((13,), "12.8", ((9, 0),), ("compiled for CUDA 13", "has CUDA 12.8")),
        ((12, 13), "14.1", ((9, 0),), ("compiled for CUDA 12 and 13", "has CUDA 14.1")),
        ((13,), "13.0", (), ("no CUDA device",)),
        ((13,), "13.0", ((7, 5), (7, 0)), ("8.0 or later", "got 7.5")),
    ],
)
def test_why_the_library_does_not_run(
    majors: tuple[int, ...],
    cuda: str | None,
    capabilities: tuple[tuple[int, int], ...],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = library(monkeypatch, *majors)
    gpu(monkeypatch, cuda, *capabilities)
    available, detail = status()
    assert not available
    assert "\n" not in detail
    for word in words:
        assert word in detail
    assert not loaded


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError(f"{path}: undefined symbol: something")

    library(monkeypatch, 13, loads=fail)
    gpu(monkeypatch, "13.0", (9, 0))
    available, detail = status()
    assert not available
    assert "_C_cuda13.so does not load" in detail
    assert "undefined symbol" in detail


def test_on_a_device_the_library_of_its_major_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library(monkeypatch, 12, 13)
    gpu(monkeypatch, "13.0", (7, 5), (9, 0))
    assert status() == (True, "compiled kernels, CUDA 13.0")
    assert dispatch.selected(torch.device("cuda", 1)) == "cuda"
    assert dispatch.selected(torch.device("cpu")) == "cpu"
    assert loaded == ["/install/_C_cuda13.so"]
    with longtail.use_backend("cuda"), pytest.raises(ValueError, match="serves cuda tensors"):
        longtail.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_without_the_library_triton_serves_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    library(monkeypatch)
    gpu(monkeypatch, "13.0", (9, 0))
    assert dispatch.selected(torch.device("cuda")) == "triton"


@pytest.mark.parametrize("runs", [True, False])
def test_what_cuda_does_not_serve_runs_on_the_next_backend(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "operator", lambda op: (lambda *_: "cuda") if op == "softmax_loss" else None)
    monkeypatch.setattr(triton, "operator", lambda op: None if op == "mean_denominator" else lambda *_: "triton")
    monkeypatch.setattr(triton, "missing", lambda: None if runs else "not here")
    monkeypatch.setattr(plain, "operator", lambda _: lambda *_: "reference")
    single, double = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
    after = "triton" if runs else "reference"
    for op, dtypes in {"softmax_loss": ("cuda", "reference"), "scale_grad_": (after, "reference")}.items():
        kernel = dispatch.implementation("cuda", op)
        assert (kernel(single), kernel(double)) == dtypes
    assert dispatch.implementation("cuda", "mean_denominator")(torch.ones(2, dtype=torch.int64)) == "reference"


def test_the_next_backend_is_not_asked_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "operator", lambda _: lambda *_: "cuda")
    monkeypatch.setattr(triton, "missing", lambda: pytest.fail("to look for Triton imports it"))
    assert dispatch.implementation("cuda", "softmax_loss")(torch.ones(2, 3)) == "cuda"


@pytest.fixture
def compiled() -> Iterator[list[Tensor]]:
    """A CUDA kernel of scale_grad_, for CPU tensors too; the list of what reaches it."""
    seen: list[Tensor] = []
    with torch.library._scoped_library("longtail_cuda", "IMPL") as kernels:
        for key in ("CUDA", "CPU"):
            kernels.impl("scale_grad_", lambda grad, *_: seen.append(grad), key)
        yield seen


def test_float64_goes_to_the_reference(compiled: list[Tensor]) -> None:
    scale = dispatch.implementation("cuda", "scale_grad_")
    factor = torch.tensor([2.0, 3.0])
    single, double = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.float64)
    scale(single, factor, None, -100)
    scale(double, factor.double(), None, -100)
    assert [t.dtype for t in compiled] == [torch.float32]
    assert double.sum() == 4 * 2 + 4 * 3
    image = torch.ones(1, 4, 2, dtype=torch.float64)
    scale(image, factor.double(), None, -100)
    assert torch.equal(image, factor.double().expand(1, 4, 2))


@pytest.mark.usefixtures("compiled")
def test_only_registered_operators_count() -> None:
    others = set(operators.SCHEMAS) - {"scale_grad_"}
    assert cuda.operator("scale_grad_") is not None
    assert [op for op in others if cuda.operator(op)] == []


@pytest.mark.parametrize(
    ("op", "position"), [("softmax_loss", 0), ("softmax_loss_backward", 1), ("softmax_loss_and_grad_", 1)]
)
def test_where_the_logits_stand(op: str, position: int) -> None:
    schema = getattr(torch.ops.longtail, op).default._schema
    assert schema.arguments[position].name == "logits"
    assert layout.logits_position(op) == position
