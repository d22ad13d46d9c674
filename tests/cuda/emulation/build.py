"""Compiles the emulated kernels: a library, and programs under sanitizers, kept in build/ until a source changes."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = ROOT / "csrc" / "cuda"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-unused-parameter", "-DLONGTAIL_EMULATED", f"-I{HERE}", f"-I{KERNELS}"]
# name -> flags of the kernels, flags of the emulation itself, sources of the latter, flags of the linker.
# Programs under sanitizers run for a second or so: what takes time is to compile them.
FLAVOURS = {
    "plain": (["-fsanitize=alignment,null"], [], ["checks.cpp"], ["-shared"]),
    "address": (
        ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATION_ASAN"],
        ["-DEMULATION_ASAN"],
        [],
        ["-fsanitize=address,undefined"],
    ),
    "thread": (["-O0", "-fsanitize=thread"], ["-DEMULATION_TSAN"], [], ["-fsanitize=thread"]),
}
_pool = ThreadPoolExecutor(2)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(x) for x in command)}\n{done.stderr[-4000:]}")


@functools.cache
def digest() -> str:
    """Of all that goes into a build here."""
    content = hashlib.sha256(str((COMPILER, FLAGS, FLAVOURS)).encode())
    files = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), *KERNELS.glob("*"), *(ROOT / "csrc").glob("*.h")]
    for path in sorted(files):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def folder() -> Path:
    """Where this build is kept; those of other sources are removed."""
    chosen = ROOT / "build" / "emulation" / digest()
    for other in chosen.parent.glob("*"):
        if other != chosen:
            shutil.rmtree(other, ignore_errors=True)
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


@functools.cache
def _compiled(source: Path, flavour: str, of_emulation: bool = False) -> Future[Path]:
    """The object file of a source, in time."""
    target = folder() / f"{source.stem}-{flavour}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}.o"

    def build() -> Path:
        with FileLock(target.with_suffix(".lock")):  # test processes wait for each other's
            if target.exists():
                return target
            flags = FLAVOURS[flavour][1 if of_emulation else 0]
            partial = target.with_suffix(".partial")
            _run(COMPILER, "-x", "c++", *FLAGS, *flags, "-c", source, "-o", partial)
            partial.rename(target)
        return target

    return _pool.submit(build)


def objects(flavour: str, harness: str = "harness", planted: Path | None = None) -> list[Future[Path]]:
    """Starts to compile what a library or program is linked of, two files at a time."""
    sources = [HERE / f"{harness}.cpp"]
    if harness == "harness":
        sources += sorted(KERNELS.glob("kernels_*.cu"))
    if planted is not None:  # first: the linker takes the first of equal functions
        sources.insert(0, planted / "kernels_float.cu")
        sources.remove(KERNELS / "kernels_float.cu")
    emulation = [HERE / name for name in ("fibre.cpp", "threads.cpp", "scheduler.cpp", *FLAVOURS[flavour][2])]
    return [_compiled(x, flavour) for x in sources] + [_compiled(x, flavour, True) for x in emulation]


@functools.cache
def linked(flavour: str, harness: str = "harness", planted: Path | None = None) -> Path:
    """The library ("plain") or program ("address", "thread") of a harness.

    planted: a folder that has its own version of the float32 kernels.
    """
    parts = [part.result() for part in objects(flavour, harness, planted)]
    target = (planted or folder()) / f"{harness}-{flavour}"
    if not target.exists():
        partial = target.with_suffix(".partial")
        _run(COMPILER, *parts, *FLAVOURS[flavour][3], "-o", partial)
        partial.rename(target)
    return target
