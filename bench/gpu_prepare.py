"""Gathers what ``gpu-session`` needs on a GPU machine without a network into one folder, and rehearses it there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from longtail.experiments import provenance

from .kernels import NAMESPACE, OLD

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 55_000_000
"""Bytes that the folder may have."""

CARRIED = ("bench", "csrc", "tests", "pyproject.toml")  # without python/: there the installed package is tested
ARCHITECTURES = "9.0"

# Of the GPU machine. A wheel's platform is matched by name, so each that occurs is named.
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")

LIGER = ("liger_kernel",)
QUACK = ("quack_kernels==0.2.4", "nvidia-cutlass-dsl==4.3.5", "apache-tvm-ffi", "torch-c-dlpack-ext")
"""The newest that fits: later ones need a larger nvidia-cutlass-dsl."""

RUN = """\
#!/bin/sh
# On the GPU machine, in this folder; no network is needed. OUT, an absolute path, gets at most 8 files.
#     sh run.sh --first --out OUT      400 seconds at most
#     sh run.sh --second --out OUT     250 seconds at most
began=$(date +%s)
cd "$(dirname "$0")" || exit
python=${{PYTHON:-python3}}
export LONGTAIL_COMMIT={commit}
export LONGTAIL_SITE="${{LONGTAIL_SITE:-$PWD/site}}"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$LONGTAIL_SITE" \\
    wheels/*.whl || exit
# pip --target reads no .pth file: that of nvidia-cutlass-dsl names the last of these.
export PYTHONPATH="$LONGTAIL_SITE:$LONGTAIL_SITE/quack:$LONGTAIL_SITE/quack/nvidia_cutlass_dsl/python_packages"
exec "$python" -m bench gpu-session --began "$began" "$@"
"""


class CannotPrepare(Exception):
    """The folder would not be what the GPU machine needs."""


def prepare(folder: Path, old: Path | None, failed: Path | None, *, quack: bool) -> None:
    """Makes ``folder``.

    Raises:
        CannotPrepare: it holds something, is too large, or a step of a run is none there.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise CannotPrepare(f"{folder} is not empty")
    copy_tracked(folder, CARRIED)
    build_wheel(folder / "wheels")
    download(LIGER, folder / "wheels")
    if quack:
        pack_quack(folder / "quack.tar.xz")
    if old is not None:
        (folder / "old.so").write_bytes(renamed(library_of(old)))
    again = [] if failed is None else failures(failed.read_text("utf-8"))
    if again:  # an empty file would name every test
        (folder / "failed.txt").write_text("".join(f"{test}\n" for test in again), encoding="utf-8")
    (folder / "run.sh").write_text(RUN.format(commit=provenance.commit()))
    rehearse(folder)
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sorted(sizes.items(), key=lambda x: -x[1])[:6]:
        print(f"{size / 1e6:8.2f} MB  {path}")
    total = sum(sizes.values())
    print(f"{total / 1e6:8.2f} MB in {len(sizes)} files: {folder}")
    if total > LARGEST:
        raise CannotPrepare(f"{folder} has {total / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; try --no-quack")


def copy_tracked(folder: Path, paths: tuple[str, ...]) -> None:
    """Copies what git knows below some paths, with the times of change, from which ninja tells what to compile."""
    listed = subprocess.run(
        ("git", "ls-files", "-z", "--", *paths), cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("bench/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build_wheel(folder: Path) -> None:
    """Builds in a copy, whose objects are kept: neither old files nor other architectures get into it."""
    source = ROOT / "build" / "gpu-session-wheel"
    for path in source.glob("*"):
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in source.glob("build/*"):
        if path.name != "cuda":
            shutil.rmtree(path)
    copy_tracked(source, ("csrc", "python", "triton_kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE"))
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    print(f"building the wheel for {architectures}", flush=True)
    done = subprocess.run(
        (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(folder), "."),
        cwd=source,
        env={**os.environ, "LONGTAIL_CUDA": "1", "LONGTAIL_REQUIRE_CPU": "1", "TORCH_CUDA_ARCH_LIST": architectures},
        check=False,
    )
    if done.returncode:
        raise CannotPrepare("the wheel cannot be built")


def download(packages: tuple[str, ...], folder: Path) -> bool:
    """Wheels for the GPU machine, without what they need; whether they came. A download that fails is told."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    done = subprocess.run(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
         PYTHON, "--implementation", "cp", *platforms, "-d", str(folder), *packages),
        check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"left out, since they cannot be downloaded: {', '.join(packages)}", file=sys.stderr)
    return done.returncode == 0


def pack_quack(path: Path) -> None:
    """QuACK and what it needs as one archive, by a third smaller than its wheels; kept, since it takes minutes."""
    kept = ROOT / "build" / f"{QUACK[0].replace('==', '-')}.tar.xz"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            wheels, unpacked, packed = (Path(scratch, name) for name in ("wheels", "quack", "packed"))
            if not download(QUACK, wheels):
                return
            for wheel in wheels.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(unpacked)
            print("packing QuACK, which takes minutes", flush=True)
            with tarfile.open(packed, "w:xz", preset=9) as archive:
                archive.add(unpacked, ".")
            kept.parent.mkdir(exist_ok=True)
            shutil.move(packed, kept)
    shutil.copy(kept, path)


def library_of(wheel: Path) -> bytes:
    """The CUDA library of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"longtail/_C_cuda\d+\.so", name)]
        if len(names) != 1:
            raise CannotPrepare(f"{wheel} has {len(names)} CUDA libraries, expected one")
        return archive.read(names[0])


def renamed(library: bytes) -> bytes:
    """A library whose operators go into the namespace ``OLD``, so that two can be loaded."""
    name = f"\0{NAMESPACE}\0".encode()
    if library.count(name) != 1:
        raise CannotPrepare(f"{NAMESPACE} stands {library.count(name)} times in the old library, expected once")
    return library.replace(name, f"\0{OLD}\0".encode())


def failures(text: str) -> list[str]:
    """The tests that pytest's summaries in a text name as failed or broken."""
    found = re.findall(r"^(?:FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", text, re.MULTILINE)
    return list(dict.fromkeys(found))


def rehearse(folder: Path) -> None:
    """Runs both runs in the folder, as far as that goes without a GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("first", "second"):
            environment = {**os.environ, "LONGTAIL_SITE": f"{scratch}/site", "PYTHON": sys.executable}
            environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
            command = ("sh", "run.sh", f"--{name}", "--rehearse", "--out", f"{scratch}/{name}")
            print(f"rehearsing the {name} run", flush=True)
            if subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
                raise CannotPrepare(f"a step of the {name} run fails in {folder}")
