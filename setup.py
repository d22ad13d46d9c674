"""Builds the compiled kernels. Everything else about the package stands in pyproject.toml.

LONGTAIL_CPU=0          skip the CPU kernels
LONGTAIL_REQUIRE_CPU=1  fail where they cannot be built, instead of installing the reference backend alone
LONGTAIL_CUDA=0         skip the CUDA kernels
LONGTAIL_CUDA=1         fail where they cannot be built; by default they are built where nvcc is found
TORCH_CUDA_ARCH_LIST    the GPUs to compile for, e.g. "8.0;9.0+PTX"
MAX_JOBS                how many files nvcc compiles at a time
"""

import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one library for it and all later ones
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "csrc/cpu/kernels_avx2.cpp": AVX2,
    "csrc/cpu/kernels_avx512.cpp": AVX512,
    "csrc/cpu/kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
COMMON_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast"]
COMMON_FLAGS += ["-g0"]  # Python's own flags ask for debug information, which takes a third of the time and is stripped
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]

# One GPU of each generation, and PTX that later ones compile for themselves: what the kernels know of.
CUDA_ARCHITECTURES = ((8, 0), (9, 0), (10, 0), (12, 0))
OLDEST_CUDA_ARCHITECTURE = (8, 0)
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def missing_compiler():
    """Why no C++ can be compiled here, or None."""
    if sys.platform == "win32":
        return "the kernels need GCC or Clang, and Windows has neither by default"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler found (looked for {', '.join(compilers)})"
    return None


def missing_for_cpu():
    """Why the CPU kernels cannot be built here, or None."""
    return "LONGTAIL_CPU=0" if os.environ.get("LONGTAIL_CPU") == "0" else missing_compiler()


def find_nvcc():
    """nvcc of CUDA_HOME, else of the PATH, else of /usr/local/cuda; None without."""
    # torch.utils.cpp_extension.CUDA_HOME is None beside a CPU-only torch.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_ninja():
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return os.path.join(ninja.BIN_DIR, "ninja")


def missing_for_cuda():
    """Why the CUDA kernels cannot be built here, or None."""
    if os.environ.get("LONGTAIL_CUDA") == "0":
        return "LONGTAIL_CUDA=0"
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, not on {sys.platform}"
    import torch

    if torch.version.hip is not None:
        return "the installed torch is for ROCm"
    if find_nvcc() is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        looked = os.path.join(home, "bin") if home else "the PATH and /usr/local/cuda/bin; CUDA_HOME is not set"
        return f"no nvcc found (looked in {looked})"
    if find_ninja() is None:
        return "ninja is not installed: pip install ninja"
    return missing_compiler()


def cuda_major(nvcc):
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"release (\d+)\.", said)[1])


def cuda_architectures(nvcc):
    """nvcc's -gencode arguments for TORCH_CUDA_ARCH_LIST, or for CUDA_ARCHITECTURES as far as nvcc knows them."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        entries = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in listed]
        if not all(entries):
            bad = next(entry for entry, match in zip(listed, entries, strict=True) if not match)
            raise SystemExit(f"longtail: TORCH_CUDA_ARCH_LIST has {bad!r}, expected entries such as 9.0 or 9.0+PTX")
        chosen = [((int(m[1]), int(m[2])), m[3], bool(m[4])) for m in entries]
        chosen = [entry for entry in chosen if entry[0] >= OLDEST_CUDA_ARCHITECTURE]
    else:
        said = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        known = [arch for arch in CUDA_ARCHITECTURES if "compute_{}{}".format(*arch) in said.split()]
        chosen = [(arch, "", arch == known[-1]) for arch in known]
    if not chosen:
        raise SystemExit(f"longtail: no GPU of compute capability 8.0 or later to compile for, got {listed}")
    flags = []
    for (major, minor), suffix, ptx in chosen:
        name = f"{major}{minor}{suffix}"
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


NINJA_FILE = """
builddir = {folder}
rule nvcc
  command = {nvcc} {nvcc_flags} -MD -MF $out.d -c $in -o $out
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule cxx
  command = {cxx} {cxx_flags} -MD -MF $out.d -c $in -o $out
  description = c++ $in
  depfile = $out.d
  deps = gcc
rule stub
  command = {cxx} -shared -fPIC -x c++ /dev/null -Wl,-soname,libtorch_cuda.so -o $out
rule link
  command = {nvcc} -shared -cudart=static --no-device-link $in -o $out {link_flags}
  description = link $out
{objects}
build {folder}/libtorch_cuda.so: stub
build {library}: link {inputs} | {folder}/libtorch_cuda.so
"""


def build_cuda(library):
    """Compiles csrc/cuda into ``library``: only what changed since the last time, below build/cuda."""
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc, cxx, folder = find_nvcc(), os.environ.get("CXX", "c++"), "build/cuda"
    sources = sorted(glob.glob("csrc/cuda/*.cu") + glob.glob("csrc/cuda/*.cpp"))
    inputs = [f"{folder}/{os.path.basename(source)}.o" for source in sources]
    rules = ["nvcc" if source.endswith(".cu") else "cxx" for source in sources]
    # The current stream comes from libtorch_cuda, which a CPU-only torch lacks: an empty library of its name will do.
    link_flags = [f"-Xlinker=-s,--no-as-needed,--version-script={folder}/exports", f"-L{folder}", "-ltorch_cuda"]
    link_flags += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu"]
    cxx_flags = [*COMMON_FLAGS, "-fPIC", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx_flags += [f"-isystem {path}" for path in include_paths()]
    host = [f"-ccbin={cxx.split()[0]}"] if os.environ.get("CXX") else []
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/exports", "w") as file:
        file.write("{ local: *; };\n")  # the operators register themselves when the library is loaded
    with open(f"{folder}/build.ninja", "w") as file:
        text = NINJA_FILE.format(
            folder=folder,
            nvcc=nvcc,
            nvcc_flags=" ".join([*NVCC_FLAGS, *host, *cuda_architectures(nvcc)]),
            cxx=cxx,
            cxx_flags=" ".join(cxx_flags),
            link_flags=" ".join([*host, *link_flags]),
            objects="\n".join(
                f"build {o}: {rule} {source}" for o, rule, source in zip(inputs, rules, sources, strict=True)
            ),
            inputs=" ".join(inputs),
            library=f"{folder}/{os.path.basename(library)}",
        )
        file.write(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([find_ninja(), "-f", f"{folder}/build.ninja", *jobs], check=True)
    os.makedirs(os.path.dirname(library), exist_ok=True)
    shutil.copy2(f"{folder}/{os.path.basename(library)}", library)


def dependencies(ext, compiler):
    """All that a library depends on, as text: compilers and their options, torch, the contents of every file."""
    import torch

    names = ("CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "ARCHFLAGS")
    found = [f"torch {torch.__version__}", *(f"{name}={os.environ.get(name)}" for name in names)]
    found += [f"{name}: {getattr(compiler, name, None)}" for name in sorted(compiler.executables)]
    found += [f"{key}: {value}" for key, value in sorted(vars(ext).items())]
    for name in sorted({"setup.py", *ext.sources, *ext.depends}):
        with open(name, "rb") as file:
            found.append(f"{name}: {hashlib.sha256(file.read()).hexdigest()}")
    return "\n".join(found)


def kept(folder, library, text, build):
    """``library`` as ``build`` makes it: a copy below ``folder`` serves for as long as the text stays the same."""
    copy, noted = os.path.join(folder, os.path.basename(library)), os.path.join(folder, "dependencies")
    if os.path.exists(copy) and os.path.exists(noted):
        with open(noted, encoding="utf-8") as file:
            if file.read() == text:
                os.makedirs(os.path.dirname(library), exist_ok=True)
                shutil.copy2(copy, library)
                return
        os.remove(noted)
    build()
    os.makedirs(folder, exist_ok=True)
    shutil.copy2(library, copy)
    with open(noted, "w", encoding="utf-8") as file:
        file.write(text)


def build_command():
    """A build_ext that compiles each CPU file for its own instruction set, and CUDA by nvcc."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def get_ext_filename(self, fullname):
            if "_C_cuda" in fullname:
                return fullname.replace(".", os.sep) + ".so"
            return super().get_ext_filename(fullname)

        def compile_isa(self, ext, source):
            return self.compiler.compile(
                [source],
                # Of its own: each call writes its build file there.
                output_dir=os.path.join(self.build_temp, os.path.splitext(os.path.basename(source))[0]),
                include_dirs=self.compiler.include_dirs,
                extra_postargs={"cxx": COMMON_FLAGS + ISA_FLAGS[source]},
                depends=ext.depends,
            )

        def build_extension(self, ext):
            library = self.get_ext_fullpath(ext.name)
            if "_C_cuda" in ext.name:
                build_cuda(library)
                return
            text = dependencies(ext, self.compiler)  # before the compilation adds its objects
            kept("build/cpu", library, text, lambda: self.build_cpu(ext))

        def build_cpu(self, ext):
            if platform.machine().lower() in ("x86_64", "amd64"):
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    for objects in pool.map(lambda source: self.compile_isa(ext, source), ISA_FLAGS):
                        ext.extra_objects += objects
            super().build_extension(ext)

    return Build


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "longtail._C",
        sorted(set(glob.glob("csrc/cpu/*.cpp")) - set(ISA_FLAGS)),
        depends=sorted([*glob.glob("csrc/*.h"), *glob.glob("csrc/cpu/*.h"), *ISA_FLAGS]),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": COMMON_FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def extensions():
    """What can be built here; says what cannot, and stops where that was required."""
    found = []
    reason = missing_for_cpu()
    if reason is None:
        found.append(cpu_extension())
    elif os.environ.get("LONGTAIL_REQUIRE_CPU") == "1":
        raise SystemExit(f"longtail: LONGTAIL_REQUIRE_CPU=1, but the CPU kernels cannot be built: {reason}")
    else:
        print(f"longtail: CPU kernels left out, only the reference backend is there: {reason}", file=sys.stderr)
    reason = missing_for_cuda()
    if reason is None:
        # No sources: distutils knows no rule for them. One library per CUDA major, whose runtime it holds.
        files = sorted(glob.glob("csrc/*.h") + glob.glob("csrc/cuda/*"))
        found.append(Extension(f"longtail._C_cuda{cuda_major(find_nvcc())}", [], depends=files, py_limited_api=True))
    elif os.environ.get("LONGTAIL_CUDA") == "1":
        raise SystemExit(f"longtail: LONGTAIL_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    else:
        print(f"longtail: CUDA kernels left out: {reason}", file=sys.stderr)
    return found


ext_modules = extensions()
if ext_modules:
    setup(
        ext_modules=ext_modules,
        cmdclass={"build_ext": build_command()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": len(ext_modules)}},
    )
else:
    setup()
