"""Promise: the emulation of CUDA on the host runs a right kernel right, and finds fault with a wrong one."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess

import pytest
import torch
from torch import Tensor

from emulation import build, harness

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
SANITIZERS = ("address", "thread")


@pytest.fixture(scope="module")
def toys() -> ctypes.CDLL:
    for flavour in (*SANITIZERS, "plain"):
        build.objects(flavour, "toy_kernels")
    library = ctypes.CDLL(str(build.linked("plain", "toy_kernels")))
    library.toy.restype = ctypes.c_char_p
    return library


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def run(toys: ctypes.CDLL, case: str, clusters: int = 3, cluster: int = 2, threads: int = 96, order: int = 0) -> tuple:
    """(why it failed, or "", the sums, what they should be)."""
    x = torch.randint(-8, 8, (clusters, cluster * 200), dtype=torch.float32)
    sums = harness.poisoned((max(clusters, threads),))
    failure = toys.toy(case.encode(), pointer(x), pointer(sums), 200, clusters, cluster, threads, order)
    return failure.decode(), sums[:clusters], x.sum(1)


@pytest.mark.parametrize("order", [harness.EVEN, harness.SKEWED])
@pytest.mark.parametrize(("cluster", "threads"), [(1, 32), (1, 1024), (2, 96), (5, 64), (16, 128)])
def test_a_right_kernel(toys: ctypes.CDLL, cluster: int, threads: int, order: int) -> None:
    failure, sums, expected = run(toys, "none", 4, cluster, threads, order)
    assert failure == ""
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("case", ["no_barrier", "no_cluster_barrier"])
def test_a_missing_barrier_gives_wrong_sums(toys: ctypes.CDLL, case: str) -> None:
    outcomes = [run(toys, case, order=order) for order in (harness.EVEN, harness.SKEWED)]
    assert any(not torch.equal(sums, expected) for _, sums, expected in outcomes)


FAILURES = {
    "misaligned": "misaligned address at .* for .*float4",
    "divergent": r"deadlock: thread \d+ of block 0 waits at toy_kernels.cpp:\d+, and 32 of 96 threads",
    "lone_lane": "deadlock: thread .* waits at toy_kernels.cpp",
    "two_barriers": "is at toy_kernels.cpp:.*, others of its group at toy_kernels.cpp",
    "unfinished_copy": "exits with copies under way",
    "no_wait": "exits without having waited for its cluster",
    "unmapped": "maps memory of rank 1",
    "assertion": "thread 0 of block 0: device-side assertion: as it should",
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_no_gpu_would_run(toys: ctypes.CDLL, case: str) -> None:
    failure, *_ = run(toys, case, clusters=1, cluster=1)
    assert re.search(FAILURES[case], failure), failure
    assert run(toys, "none")[0] == "", "the next launch is not affected"


def test_a_copy_that_is_not_waited_for_is_not_there(toys: ctypes.CDLL) -> None:
    failure, sums, _ = run(toys, "early_read", clusters=1, cluster=1)
    assert failure == ""
    assert sums.isnan().all()


@pytest.mark.parametrize(
    ("clusters", "cluster", "threads", "why"),
    [(0, 1, 32, "blocks"), (1, 17, 32, "blocks per cluster"), (1, 1, 33, "whole warps"), (1, 1, 2048, "threads")],
)
def test_launches_that_a_gpu_refuses(toys: ctypes.CDLL, clusters: int, cluster: int, threads: int, why: str) -> None:
    assert why in run(toys, "none", clusters, cluster, threads)[0]


def sanitized(flavour: str, case: str) -> subprocess.CompletedProcess[str]:
    program = build.linked(flavour, "toy_kernels")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, case], env=environment, capture_output=True, text=True, timeout=300, check=False)


REPORTS = {
    ("thread", "no_barrier"): "data race",
    ("thread", "no_cluster_barrier"): "data race",
    ("thread", "no_last_barrier"): "(data race|heap-use-after-free)",
    ("address", "beyond_shared"): "heap-buffer-overflow",
    ("address", "beyond_input"): "heap-buffer-overflow",
    ("address", "misaligned"): "misaligned address",
}


@pytest.mark.parametrize("flavour", SANITIZERS)
@pytest.mark.usefixtures("toys")
def test_sanitizers_pass_a_right_kernel(flavour: str) -> None:
    done = sanitized(flavour, "none")
    assert (done.returncode, done.stdout.split()) == (0, ["2000"]), done.stderr


@pytest.mark.parametrize(("flavour", "case"), REPORTS)
@pytest.mark.usefixtures("toys")
def test_sanitizers_report_a_wrong_kernel(flavour: str, case: str) -> None:
    done = sanitized(flavour, case)
    assert done.returncode != 0
    assert re.search(REPORTS[flavour, case], done.stderr), done.stderr


def test_half_types_round_as_in_torch(toys: ctypes.CDLL) -> None:
    """Every half and its neighbours' midpoints, and random bits: to nearest even, NaN kept."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    exact = [halves.view(kind).float() for kind in (torch.float16, torch.bfloat16)]
    ties = [(torch.cat([x[:-1], x[1:]]).view(2, -1).double().mean(0)).float() for x in exact]
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    x = torch.cat([*exact, *ties, *(t.nextafter(torch.tensor(0.0)) for t in ties), bits.view(torch.float32)])
    bfloat16, float16 = (torch.empty(x.shape, dtype=torch.int32) for _ in range(2))
    back = torch.empty_like(x)
    toys.convert(*(pointer(t) for t in (x, bfloat16, float16, back)), ctypes.c_int64(len(x)))
    for actual, kind in ((bfloat16, torch.bfloat16), (float16, torch.float16)):
        values = actual.to(torch.int16).view(kind)
        torch.testing.assert_close(values, x.to(kind), rtol=0.0, atol=0.0, equal_nan=True)
        assert (values.signbit() == x.signbit())[~x.isnan()].all()
    torch.testing.assert_close(back, x.half().float(), rtol=0.0, atol=0.0, equal_nan=True)
