"""Promise: where nvcc is found, one library per CUDA major is built, also beside a CPU-only torch, without spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from emulation.harness import ACCUMULATE, BACKWARD, LOSS
from longtail.ops import operators
from sass import loops
from wheels import ROOT, build_wheel, load_setup

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
VECTORS = {"float": 4, "BFloat16": 8, "Float16": 8}  # storage type -> elements in 16 bytes
KERNELS = ("warp_rows", "sweep_rows", "shared_rows", "dense_rows", "sigmoid_rows", "sigmoid_pixels", "softmax_pixels")
# Three blocks of 128 threads fit on a multiprocessor; of the other kernels two of 256.
SMALL_BLOCKS = ("warp_rows", "softmax_pixels")
UNDER_WAY = 4  # kPlainGroup: vectors that a thread has under way
VARIANTS = [(kind, storage, switch) for kind in KERNELS for storage in VECTORS for switch in "01"]


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


def mangled(kind: str, storage: str, switch: str, pass_: int | None = None) -> str:
    """What the symbol of the kernel of whole vectors holds. switch: extras, or dense targets of the sigmoid family.

    pass_: of csrc/cuda/passes.h, for a kernel that is compiled for one.
    """
    name = f"{kind}_kernel"
    element = "f" if storage == "float" else f"NS0_{len(storage)}{storage}E"
    count = "" if kind == "shared_rows" else f"Li{VECTORS[storage]}E"
    fixed = "" if pass_ is None else f"NS0_5FixedILNS0_4PassE{pass_}EE"
    return f"{len(name)}{name}I{element}{count}Lb{switch}E{fixed}"


def general(what: str, storage: str) -> str:
    """As mangled(), of the sigmoid family with every option, over "rows" or "pixels"."""
    name = f"general_sigmoid_{what}_kernel"
    element = "f" if storage == "float" else f"NS0_{len(storage)}{storage}E"
    return f"{len(name)}{name}I{element}Li{4 if what == 'pixels' else VECTORS[storage]}E"


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
        for storage in VECTORS:
            assert any(general("rows", storage) in name for name in kernels), (arch, storage)
            assert any(general("pixels", storage) in name for name in kernels), (arch, storage)
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
        bodies = {name: body for name, body in functions.items() if mangled(*variant) in name}
        assert bodies, variant
        for name, body in bodies.items():
            read = "LDGSTS.E.BYPASS.128" if variant[0] == "shared_rows" else "LDG.E.128"
            assert read in body, name
            makes_grad = not any(mangled(*variant, pass_) in name for pass_ in (LOSS, ACCUMULATE))
            assert re.search(r"STG\.E(\.\w+)*\.128", body) or not makes_grad, name
            for unwanted in ("LDL", "STL", "ATOM", "RED."):
                assert unwanted not in body, (name, unwanted)


# kernel, pass -> the most instructions an element of half types and of float32, in each of its loops: without and with
# entropy, or complement entropy.
COUNTS = {
    ("sweep_rows", LOSS): ((6.0, 7.0), (7.0, 8.0)),
    ("sweep_rows", ACCUMULATE): ((7.0,), (8.0,)),
    ("sweep_rows", BACKWARD): ((5.3, 7.3), (5.0, 7.0)),
}


@needs_nvcc
@pytest.mark.parametrize(("kind", "pass_"), COUNTS)
def test_instructions_an_element(kind: str, pass_: int, functions: dict[str, str]) -> None:
    halves, single = COUNTS[kind, pass_]
    for storage, most in {"BFloat16": halves, "Float16": halves, "float": single}.items():
        (body,) = (body for name, body in functions.items() if mangled(kind, storage, "0", pass_) in name)
        elements = UNDER_WAY * VECTORS[storage]
        found = [len(way) / elements for way in loops(body, elements)]
        assert all(x <= limit for x, limit in zip(found[: len(most)], most, strict=True)), (storage, found)


@needs_nvcc
def test_short_rows_are_finished_together(functions: dict[str, str]) -> None:
    """The loop over a warp's rows, of 32 elements a lane, has nothing of a row's end, such as the store of its loss."""
    for storage in VECTORS:
        (body,) = (body for name, body in functions.items() if mangled("warp_rows", storage, "0", LOSS) in name)
        without, with_entropy = loops(body, 32)
        assert "STG" in body
        assert [name for name in [*without, *with_entropy] if name.startswith("STG")] == [], storage
        assert len(without) <= 8 * 32, storage
        assert len(with_entropy) <= 9.5 * 32, storage


@needs_nvcc
@pytest.mark.parametrize(("pass_", "half", "single"), [(LOSS, 20.0, 20.0), (BACKWARD, 22.0, 23.0)])
def test_instructions_an_element_of_sigmoid_focal_loss(
    pass_: int, half: float, single: float, functions: dict[str, str]
) -> None:
    """Class targets, gamma 2, no weights: one exponential, one reciprocal and the series of a logarithm an element."""
    for storage, count in VECTORS.items():
        (body,) = (body for name, body in functions.items() if mangled("sigmoid_rows", storage, "0", pass_) in name)
        found = []
        for way in loops(body, count):
            elements = way.count("MUFU.RCP")
            if elements == way.count("MUFU.EX2") and way.count("FFMA") > 3 * elements:
                found.append(len(way) / elements)
        assert min(found) <= (single if storage == "float" else half), (storage, found)


@needs_nvcc
def test_instructions_an_element_of_asymmetric_loss(functions: dict[str, str]) -> None:
    """Targets of elements, a shift of the probability, its gradient detached, apart from the products of its powers;
    both passes: one exponential, one series, one logarithm and two reciprocals an element."""
    for what in ("rows", "pixels"):
        for storage, count in VECTORS.items():
            (body,) = (body for name, body in functions.items() if general(what, storage) in name)
            together = 4 if what == "pixels" else count
            found = [len(way) / together for way in loops(body, together, logarithms=together)]
            assert found[0] <= (74.0 if together == 8 else 86.0), (what, storage, found)
            for access in (r"LDG\.E", r"STG\.E(\.\w+)*"):
                assert re.search(access + (r"\.64" if together < count else r"\.128"), body), (what, storage, access)


@needs_nvcc
def test_instructions_an_element_of_distribution_balanced_loss(functions: dict[str, str]) -> None:
    """Targets of elements, class bias and weights of the row: two exponentials and two reciprocals an element."""
    (body,) = (body for name, body in functions.items() if general("rows", "BFloat16") in name)
    found = [len(way) / 8 for way in loops(body, 16, reciprocals=16)]
    assert found[0] <= 73.0, found


@needs_nvcc
@pytest.mark.parametrize(("pass_", "most"), [(LOSS, 14.0), (BACKWARD, 10.0)])
def test_instructions_an_element_of_class_probabilities(pass_: int, most: float, functions: dict[str, str]) -> None:
    """Two vectors under way of logits, and as many or, of wide targets, twice as many of targets."""
    for storage, count in VECTORS.items():
        (body,) = (body for name, body in functions.items() if mangled("dense_rows", storage, "0", pass_) in name)
        found = loops(body, 2 * count)
        assert len(found) == (1 if storage == "float" else 2), storage
        assert max(len(way) / (2 * count) for way in found) <= most, storage
        assert min(way.count("LDG.E.128") for way in found) == 4, storage


def hierarchical(storage: str, pass_: int) -> str:
    """As mangled(), of hierarchical cross-entropy."""
    element = "f" if storage == "float" else f"NS0_{len(storage)}{storage}E"
    return f"24hierarchical_rows_kernelI{element}Li{VECTORS[storage]}ENS0_5FixedILNS0_4PassE{pass_}EE"


@needs_nvcc
@pytest.mark.parametrize(("pass_", "least", "most"), [(LOSS, 10.0, 16.0), (BACKWARD, 8.0, 15.0)])
def test_instructions_an_element_of_hierarchical_cross_entropy(
    pass_: int, least: float, most: float, functions: dict[str, str]
) -> None:
    """Two vectors under way; least: where classes are at their own positions, most: where they are not."""
    for storage, count in VECTORS.items():
        (body,) = (body for name, body in functions.items() if hierarchical(storage, pass_) in name)
        found = [len(way) / (2 * count) for way in loops(body, 2 * count)]
        assert found[0] <= least, storage
        assert found[-1] <= most, storage
        assert "LDG.E.128" in body
        assert bool(re.search(r"STG\.E(\.\w+)*\.128", body)) == (pass_ == BACKWARD)


@needs_nvcc
def test_bytes_under_way(library: Path, functions: dict[str, str]) -> None:
    """A multiprocessor of sm_90 reads 64 KiB at a time in the loops of long rows, by blocks of 256 threads."""
    used = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", cuobjdump("-res-usage", "-arch", "sm_90", library)))
    for kind, pass_ in COUNTS:
        for storage in VECTORS:
            (name,) = (name for name in functions if mangled(kind, storage, "0", pass_) in name)
            blocks = 65536 // (256 * -(-int(used[name]) // 8) * 8)
            loads = min(way.count("LDG.E.128") for way in loops(functions[name], UNDER_WAY * VECTORS[storage])[:1])
            assert blocks >= 4, (name, used[name])
            assert blocks * 256 * loads * 16 >= 64 * 1024, (name, loads)


@needs_nvcc
def test_only_rows_of_several_blocks_wait_for_their_cluster(library: Path, functions: dict[str, str]) -> None:
    """sm_80 has no clusters, and a single block no reason to wait for others."""
    old = cuobjdump("-sass", "-arch", "sm_80", library)
    assert "UCGABAR" not in old
    for name, body in functions.items():
        kernel = name.split("_kernel")[0]
        spread = kernel.endswith(
            (
                *("sweep_rows", "shared_rows", "dense_rows", "sigmoid_rows", "sigmoid_general_rows", "two_way_rows"),
                *("mean_denominator", "mean_loss"),
            )
        )
        assert ("UCGABAR" in body) == spread, name


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
    assert said.strip() == str(sorted(operators.SCHEMAS))


@needs_nvcc
def test_a_wheel_holds_it(library: Path, tmp_path: Path) -> None:
    done, wheels = build_wheel(tmp_path, "build/cuda", LONGTAIL_CUDA="1", LONGTAIL_CPU="0", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = wheels
    assert re.fullmatch(r"longtail-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    assert zipfile.ZipFile(wheel).read(f"longtail/{library.name}") == library.read_bytes()
