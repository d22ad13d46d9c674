"""Builds the compiled kernels. Everything else about the package stands in pyproject.toml.

LONGTAIL_CPU=0          skip the CPU kernels
LONGTAIL_REQUIRE_CPU=1  fail where they cannot be built, instead of installing the reference backend alone
"""

import glob
import os
import platform
import shutil
import sys

from setuptools import setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one library for it and all later ones
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "csrc/cpu/kernels_avx2.cpp": AVX2,
    "csrc/cpu/kernels_avx512.cpp": AVX512,
    "csrc/cpu/kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
COMMON_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]


def missing_for_cpu():
    """Why the CPU kernels cannot be built here, or None."""
    if os.environ.get("LONGTAIL_CPU") == "0":
        return "LONGTAIL_CPU=0"
    if sys.platform == "win32":
        return "the kernels need GCC or Clang, and Windows has neither by default"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler found (looked for {', '.join(compilers)})"
    return None


def cpu_extension():
    """The extension and a build command that compiles each kernel file for its own instruction set."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            if platform.machine().lower() in ("x86_64", "amd64"):
                for source, flags in ISA_FLAGS.items():
                    ext.extra_objects += self.compiler.compile(
                        [source],
                        output_dir=self.build_temp,
                        include_dirs=self.compiler.include_dirs,
                        extra_postargs={"cxx": COMMON_FLAGS + flags},
                        depends=ext.depends,
                    )
            super().build_extension(ext)

    headers = sorted(glob.glob("csrc/*.h") + glob.glob("csrc/cpu/*.h"))
    extension = CppExtension(
        "longtail._C",
        sorted(set(glob.glob("csrc/cpu/*.cpp")) - set(ISA_FLAGS)),
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": COMMON_FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    return [extension], {"build_ext": Build}


reason = missing_for_cpu()
if reason is None:
    ext_modules, cmdclass = cpu_extension()
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
elif os.environ.get("LONGTAIL_REQUIRE_CPU") == "1":
    raise SystemExit(f"longtail: LONGTAIL_REQUIRE_CPU=1, but the CPU kernels cannot be built: {reason}")
else:
    print(f"longtail: CPU kernels left out, only the reference backend is there: {reason}", file=sys.stderr)
    ext_modules, cmdclass, options = [], {}, {}

setup(ext_modules=ext_modules, cmdclass=cmdclass, options=options)
