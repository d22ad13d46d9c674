"""The steps of ``gpu-session``: one table, which its runs, their rehearsal and the tests read."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A command. Of its words ``python`` is this one, ``{out}`` the folder of results, ``{site}`` that of packages."""

    name: str
    words: tuple[str, ...]
    file: str
    """Of the results: what the command prints is added to it."""
    seconds: int
    """At most."""
    group: str = ""
    """Steps of one group, which follow each other, run side by side."""
    needs: str = ""
    """A file beside ``bench`` without which the step is left out."""
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed


HOURS = 4 * 3600
"""For a step of a run without a limit: one that hangs ends too."""

LIMITS: dict[str, int | None] = {"first": 400, "second": 250, "all": None}
"""Seconds of each run, from the start of its installation."""

TABLE = "table.txt"
"""The file of the results that the table is written to."""

CUDA = {"LONGTAIL_BACKEND": "cuda"}
TRITON = {"LONGTAIL_BACKEND": "triton"}
SMALL = {"OMP_NUM_THREADS": "2"}  # of processes side by side
EAGER = {"CUDA_MODULE_LOADING": "EAGER"}  # a kernel may not be loaded while a graph is captured
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # the caching allocator would hide accesses beyond a tensor

SHARED_MEMORY = ("6,5003", "2,300001", "2,21,35")
"""For racecheck, the slowest: a block, a cluster, an image."""

_ENVIRONMENT = (
    Step("info", ("python", "-m", "longtail", "info"), "environment.txt", 20, "environment"),
    Step("nvidia-smi", ("nvidia-smi",), "environment.txt", 20, "environment"),
)


def _smoke(environment: dict[str, str], seconds: int, group: str = "") -> Step:
    name = f"smoke, {environment['LONGTAIL_BACKEND']}"
    return Step(name, ("python", "-m", "bench", "smoke"), "smoke.txt", seconds, group, "", environment)


def _tests(name: str, words: str, chosen: str, seconds: int, group: str = "tests", **environment: str) -> Step:
    # After a fault every other test of its process fails.
    flags = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20", "--durations=5")
    command = ("python", "-m", "pytest", *flags, *words.split(), *(("-k", chosen) if chosen else ()))
    return Step(f"tests: {name}", command, "tests.txt", seconds, group, "", {**SMALL, **environment})


def _bench(name: str, words: str, seconds: int, needs: str = "", **environment: str) -> Step:
    return Step(
        f"bench: {name}", ("python", "-m", "bench", *words.split()), "bench.txt", seconds, "", needs, environment
    )


def _sanitizer(tool: str, shapes: tuple[str, ...], seconds: int, group: str = "") -> Step:
    # Kernels' names are mangled: "longtail" stands in those of ours, and "at::" would be in none.
    flags: tuple[str, ...] = ("--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=longtail")
    flags += ("--report-api-errors", "no") if tool == "memcheck" else ()  # torch asks for what may not be there
    smoke = ("python", "-m", "bench", "smoke", *(("--shape", *shapes) if shapes else ()))
    command = ("compute-sanitizer", *flags, *smoke)
    return Step(tool, command, "sanitizer.txt", seconds, group, "", {**UNCACHED, **CUDA})


def _ncu(seconds: int) -> Step:
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "InstructionStats", "WarpStateStats", "SchedulerStats")
    flags = ("--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:longtail")
    chosen = tuple(word for section in sections for word in ("--section", section))
    command = ("ncu", *flags, *chosen, "python", "-m", "bench", "kernels", "--once")
    return Step("ncu", command, "ncu.txt", seconds, "", "", CUDA)


CONTRACT = "tests/contract"
GPU_CSV = "--output {out}/gpu.csv --no-pictures --no-compile"
LINEAR = "linear --device cuda --dtype bfloat16"

FIRST = (
    *_ENVIRONMENT,
    _smoke(CUDA, 40),
    _tests("rows", "tests/cuda/test_gpu.py", "every_way or agreement", 110),
    _tests("other CUDA", "tests/cuda/test_gpu.py", "not every_way and not agreement", 110),
    _tests("softmax", f"{CONTRACT}/test_softmax_operators.py", "cuda", 110),
    _tests("class probabilities", f"{CONTRACT}/test_class_probabilities.py", "cuda", 110),
    _tests("sigmoid, dense targets", f"{CONTRACT}/test_sigmoid_operators.py", "cuda and soft", 110),
    _tests("sigmoid", f"{CONTRACT}/test_sigmoid_operators.py", "cuda and not soft", 110),
    _tests(
        "hierarchical",
        f"{CONTRACT}/test_hierarchical.py {CONTRACT}/test_hierarchical_operators.py",
        "not reference",
        110,
    ),
    _tests(
        "hierarchical, shards and hidden states",
        f"{CONTRACT}/test_hierarchical_shards.py {CONTRACT}/test_linear_hierarchical.py",
        "not reference",
        110,
    ),
    _tests(
        "two sides of a row",
        f"{CONTRACT}/test_two_way.py {CONTRACT}/test_two_way_operators.py",
        "not reference",
        110,
    ),
    _tests(
        "images and ranks",
        f"{CONTRACT}/test_gpu_images.py tests/parallel/test_gpu.py tests/training/test_class_balance.py "
        "tests/training/test_class_frequency.py",
        "not triton",
        110,
    ),
    _tests(
        "steps",
        f"{CONTRACT}/test_gpu.py {CONTRACT}/test_gpu_steps.py {CONTRACT}/test_backends.py",
        "not triton and not 2_31 and not compiled",
        110,
        **EAGER,
    ),
    _tests(
        "means and sums over chunks",
        f"{CONTRACT}/test_means.py {CONTRACT}/test_linear_drift.py {CONTRACT}/test_unwanted_entropy.py "
        f"{CONTRACT}/test_row_statistics.py {CONTRACT}/test_row_losses.py "
        "tests/cuda/test_mean_denominator.py",
        "not triton",
        110,
    ),
    _tests(
        "Triton, a sample",
        f"{CONTRACT}/test_softmax_operators.py {CONTRACT}/test_class_probabilities.py "
        f"{CONTRACT}/test_sigmoid_operators.py",
        "gpu_triton and every_option and (mixed or all_of_probabilities) and not mixed_square",
        110,
    ),
    _smoke(TRITON, 110, "tests"),
    _bench("bfloat16", f"gpu --dtype bfloat16 --rounds 20 {GPU_CSV}", 65, **CUDA),
    _bench("float32", f"gpu --dtype float32 --rounds 20 --shape 16384,8192 4096,128256 {GPU_CSV}", 35, **CUDA),
    _bench(
        "Triton", f"gpu --dtype bfloat16 --rounds 20 --shape 32768,1000 16384,8192 4096,128256 {GPU_CSV}", 45, **TRITON
    ),
    _bench("fused linear", f"{LINEAR} --shape 4096 4096 128256 --rounds 5 --output {{out}}/linear.csv", 40, **CUDA),
    _ncu(40),
)

SECOND = (
    *_ENVIRONMENT,
    _tests("that failed", "@failed.txt", "", 70)._replace(needs="failed.txt"),
    _tests("2^31 elements", f"{CONTRACT}/test_gpu.py", "2_31 and not triton", 70),
    _tests("compiled", f"{CONTRACT}/test_gpu_steps.py", "compiled and not triton", 70, **EAGER),
    _sanitizer("memcheck", (), 60, "sanitizer"),
    _sanitizer("racecheck", SHARED_MEMORY, 60, "sanitizer"),
    Step("unpack QuACK", ("python", "-m", "tarfile", "-e", "quack.tar.xz", "{site}/quack"), "environment.txt", 60,
         "sanitizer", "quack.tar.xz"),
    _bench("kernels beside the old", "kernels --old old.so", 30, "old.so", **CUDA),
    _bench("QuACK", f"gpu --dtype bfloat16 --rounds 20 --shape 8192,32768 4096,128256 {GPU_CSV}", 50, "quack.tar.xz",
           **CUDA),
)  # fmt: skip

ALL = (
    *_ENVIRONMENT,
    _smoke(CUDA, HOURS),
    _smoke(TRITON, HOURS),
    _tests("all", "-n 4", "not 2_31", HOURS, "", **EAGER),
    _tests("2^31 elements", "", "2_31", HOURS, ""),
    _sanitizer("memcheck", (), HOURS),
    _sanitizer("racecheck", (), HOURS),
    *(
        _bench(f"{backend}, {dtype}", f"gpu --dtype {dtype} --no-compile", HOURS, LONGTAIL_BACKEND=backend)
        for backend in ("cuda", "triton")
        for dtype in ("bfloat16", "float32")
    ),
    # torch.compile takes most of the time: the extremes of the shapes alone.
    _bench("compiled", "gpu --dtype bfloat16 --shape 32768,1000 8192,32768 4096,128256", HOURS),
    _bench("fused linear", f"{LINEAR} --shape 4096 4096 128256", HOURS),
    _bench("fused linear, 256000 classes", f"{LINEAR} --shape 8192 2048 256000", HOURS),
    _bench("training step", "step --device cuda --tokens 8192 --budget 20000 --most 131072", HOURS),
    _ncu(HOURS),
)

RUNS = {"first": FIRST, "second": SECOND, "all": ALL}


def rehearsal(step: Step) -> tuple[str, ...] | None:
    """What shows without a GPU that a step's command is one, or None where nothing can."""
    if "python" not in step.words:
        return None
    words = step.words[step.words.index("python") :]  # without the tool that it runs under
    if words[1:3] == ("-m", "pytest"):
        return (*words, "--collect-only")
    if words[1:4] == ("-m", "bench", "smoke"):
        return (*words, "--device", "cpu", "--shape", "9,11", "2,7,5")
    if words[1:3] == ("-m", "bench"):
        parse = "import sys, bench.__main__ as b; b.section_parser(sys.argv[1])[0].parse_args(sys.argv[2:])"
        return ("python", "-c", parse, *words[3:])
    return words
