"""Promise: where nvcc is found, one library per CUDA major is built, also beside a CPU-only torch, without spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from wheels import ROOT, build_wheel, needs_compiler

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
VECTORS = {"float": 4, "BFloat16": 8, "Float16": 8}  # storage type -> elements in 16 bytes
KERNELS = ("warp_rows", "sweep_rows", "shared_rows", "sigmoid_rows", "sigmoid_pixels", "softmax_pixels")
# Three blocks of 128 threads fit on a multiprocessor; of the other kernels two of 256.
SMALL_BLOCKS = ("warp_rows", "softmax_pixels")
# Extras, or dense targets of the sigmoid family, which has a kernel for each pass.
SWITCHES = {
    kind: [f"{on}ENS0_8CompiledILNS0_4PassE{n}EE" for on in "01" for n in range(3)] if "sigmoid" in kind else ["0", "1"]
    for kind in KERNELS
}
VARIANTS = [(kind, storage, switch) for kind in KERNELS for storage in VECTORS for switch in SWITCHES[kind]]


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the present sources: what changed since the last build is compiled."""
    folder = tmp_path_factory.mktemp("build")
    options = {"LONGTAIL_CPU": "0", "LONGTAIL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
    run(
        sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp", **options
    )
    (found,) = (folder / "longtail").glob("_C_cuda*.so")
    assert re.fullmatch(r"_C_cuda\d+\.so", found.name)
    return found


def cuobjdump(*arguments: str | Path) -> str:
    beside_nvcc = Path(str(NVCC)).resolve().parent / "cuobjdump"
    spec = importlib.util.find_spec("triton")
    in_triton = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump" if spec else beside_nvcc
    tool = next((t for t in (beside_nvcc, in_triton) if t.exists()), None)
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    return run(tool, *arguments)


def mangled(kind: str, storage: str, switch: str) -> str:
    """What the symbol of the kernel of whole vectors holds."""
    name = f"{kind}_kernel"
    element = "f" if storage == "float" else f"NS0_{len(storage)}{storage}E"
    count = "" if kind == "shared_rows" else f"Li{VECTORS[storage]}E"
    return f"{len(name)}{name}I{element}{count}Lb{switch}E"


@needs_nvcc
def test_every_architecture_has_every_kernel_and_none_spills(library: Path) -> None:
    used = cuobjdump("-res-usage", library)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for section in used.split("arch = ")[1:]:
        arch = section.split()[0]
        kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", section)
        found.setdefault(arch, {}).update({n: (int(r), int(s) + int(local)) for n, r, s, local in kernels})
    assert set(found) == {f"sm_{major}{minor}" for major, minor in known_architectures()}
    for arch, kernels in found.items():
        for variant in VARIANTS:
            assert any(mangled(*variant) in name for name in kernels), (arch, variant)
        assert {name: memory for name, (_, memory) in kernels.items() if memory} == {}, arch
        for kind in KERNELS:
            most = max(registers for name, (registers, _) in kernels.items() if kind in name)
            assert most <= (168 if kind in SMALL_BLOCKS else 128), (arch, kind)


def known_architectures() -> list[tuple[int, int]]:
    said = run(str(NVCC), "--list-gpu-arch").split()
    return [a for a in load_setup().CUDA_ARCHITECTURES if "compute_{}{}".format(*a) in said]


@pytest.fixture(scope="module")
def functions(library: Path) -> dict[str, str]:
    """The instructions of every kernel for sm_90, by symbol."""
    listing = cuobjdump("-sass", "-arch", "sm_90", library)
    return {f.split()[0]: f for f in listing.split("Function : ")[1:]}


@needs_nvcc
def test_rows_move_in_16_byte_accesses(functions: dict[str, str]) -> None:
    for variant in VARIANTS:
        (body,) = (body for name, body in functions.items() if mangled(*variant) in name)
        read = "LDGSTS.E.BYPASS.128" if variant[0] == "shared_rows" else "LDG.E.128"
        assert read in body, variant
        assert re.search(r"STG\.E(\.\w+)*\.128", body), variant
        assert "LDL" not in body, variant
        assert "STL" not in body, variant
        assert "ATOM" not in body, variant
        assert "RED." not in body, variant


@needs_nvcc
def test_only_rows_of_several_blocks_wait_for_their_cluster(library: Path, functions: dict[str, str]) -> None:
    """sm_80 has no clusters, and a single block no reason to wait for others."""
    old = cuobjdump("-sass", "-arch", "sm_80", library)
    assert "UCGABAR" not in old
    for name, body in functions.items():
        regime = name.split("_rows_kernel")[0] if "_rows_kernel" in name else "scale"
        assert ("UCGABAR" in body) == regime.endswith(("sweep", "shared", "sigmoid")), name


@needs_nvcc
def test_symbols(library: Path) -> None:
    """The library needs torch's C shim, the C and C++ runtimes, and nothing of CUDA; it offers nothing."""
    assert run("nm", "-D", "--defined-only", library).strip() == ""
    symbols = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    shim = {s for s in symbols if re.match(r"(aoti_torch|torch)_", s)}
    assert {"aoti_torch_library_init_impl", "aoti_torch_get_current_cuda_stream"} <= shim
    runtime = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|__gmon_start__$|_ITM_\w+TMCloneTable$|__cxa_\w+$")
    assert {
        s for s in symbols - shim if not runtime.match(s) and not s.startswith(("_ZNSt", "_ZNKSt", "_ZSt"))
    } == set()
    needed = re.findall(r"NEEDED.*\[(\S+)\]", run("readelf", "-d", library))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed)
    assert [name for name in needed if "cudart" in name or "c10" in name] == []


@needs_nvcc
def test_it_loads_without_the_cuda_runtime_and_registers_its_operators(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "libtorch_cuda.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    stand_in = tmp_path / "libtorch_cuda.so"
    run("c++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", stand_in)
    code = f"""
import ctypes, torch, longtail
from longtail.ops import cuda
ctypes.CDLL({str(stand_in)!r})
torch.ops.load_library({str(library)!r})
print(sorted(op for op in longtail.ops.operators.SCHEMAS if cuda.operator(op)))
"""
    said = run(sys.executable, "-c", code)
    steps = ("loss", "loss_and_grad", "loss_and_grad_", "loss_backward")
    losses = [f"{family}_{step}" for family in ("softmax", "sigmoid") for step in steps]
    assert said.strip() == str(sorted(["scale_grad_", *losses]))


@needs_nvcc
def test_a_wheel_holds_it(library: Path, tmp_path: Path) -> None:
    done, wheels = build_wheel(tmp_path, "build/cuda", LONGTAIL_CUDA="1", LONGTAIL_CPU="0", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = wheels
    assert re.fullmatch(r"longtail-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    assert zipfile.ZipFile(wheel).read(f"longtail/{library.name}") == library.read_bytes()


@needs_compiler
def test_a_required_library_that_cannot_be_built_fails_the_install(tmp_path: Path) -> None:
    done, wheels = build_wheel(tmp_path, LONGTAIL_CUDA="1", LONGTAIL_CPU="0", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "LONGTAIL_CUDA=1, but the CUDA kernels cannot be built: no nvcc found" in done.stdout
    assert "/nonexistent/bin" in done.stdout
    assert wheels == []


def load_setup() -> ModuleType:
    """setup.py's functions, with nothing set up."""
    spec = importlib.util.spec_from_file_location("longtail_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("LONGTAIL_CPU", "0")
        patch.setenv("LONGTAIL_CUDA", "0")
        patch.delenv("LONGTAIL_REQUIRE_CPU", raising=False)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Makes a toolkit whose nvcc is of a release and knows some architectures; CUDA_HOME points at it."""

    def make(release: str, architectures: str) -> str:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        listed = "\\n".join(f"compute_{arch}" for arch in architectures.split())
        listing = f'[ "$1" = --list-gpu-arch ] && printf "{listed}\\n"'
        nvcc.write_text(f'#!/bin/sh\n{listing} || echo "Cuda tools, release {release}, V1"\n')
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return str(nvcc)

    return make


def gencode(*names: str) -> list[str]:
    """'90' stands for machine code, '90+PTX' for code and PTX."""
    flags = []
    for name in names:
        arch = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


@pytest.mark.parametrize(
    ("known", "listed", "expected"),
    [
        ("75 80 86 90 100 103 120", "", ("80", "90", "100", "120+PTX")),
        ("50 75 80 86 89 90", "", ("80", "90+PTX")),
        ("80 90", "9.0", ("90",)),
        ("80 90", "7.5 8.0;9.0a+PTX", ("80", "90a+PTX")),
    ],
)
def test_architectures(
    known: str,
    listed: str,
    expected: tuple[str, ...],
    fake_nvcc: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    nvcc = fake_nvcc("12.9", known)
    setup = load_setup()
    assert setup.find_nvcc() == nvcc
    assert setup.cuda_major(nvcc) == 12
    assert setup.cuda_architectures(nvcc) == gencode(*expected)


@pytest.mark.parametrize(("listed", "words"), [("Hopper", "'Hopper'"), ("7.5", "8.0 or later")])
def test_architectures_that_cannot_be_served(
    listed: str, words: str, fake_nvcc: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    nvcc = fake_nvcc("13.0", "75 80 90")
    with pytest.raises(SystemExit, match=words):
        load_setup().cuda_architectures(nvcc)


def test_what_is_missing(fake_nvcc: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc("13.0", "80 90")
    setup = load_setup()
    monkeypatch.delenv("LONGTAIL_CUDA", raising=False)
    assert setup.missing_for_cuda() is None
    monkeypatch.setattr(setup, "find_ninja", lambda: None)
    assert "pip install ninja" in setup.missing_for_cuda()
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert "no nvcc found" in setup.missing_for_cuda()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in setup.missing_for_cuda()
    monkeypatch.setenv("LONGTAIL_CUDA", "0")
    assert setup.missing_for_cuda() == "LONGTAIL_CUDA=0"
