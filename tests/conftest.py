"""Fixed seeds, NaN-poisoned allocations, the `gpu` marker, what pytest-xdist keeps together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("longtail", deadline=None, derandomize=True, max_examples=40, print_blob=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
settings.load_profile("longtail")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks Hugging Face's hub, or reports to it


# Files that share a build, or the processes of `ranks`, run on one worker of pytest-xdist, as every other file does;
# with the emulation's run the tests of other files over its kernels, and each run in an interpreter stands alone.
TOGETHER = {"tests/cuda/test_build": "nvcc", "tests/cuda/": "emulation", "tests/parallel/": "ranks"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScheduling, LoadScopeScheduling

    if config.getoption("markexpr") == "gpu":  # a few large files, which share nothing
        return LoadScheduling(config, log)

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if "emulated-" in nodeid:
                return "emulation"
            if "in_a_process_of_its_own[" in nodeid:
                return nodeid
            file = nodeid.split("::")[0]
            return next((group for start, group in TOGETHER.items() if file.startswith(start)), file)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: "in_a_process_of_its_own" not in item.nodeid)  # so that none is left alone at the end


@pytest.fixture(autouse=True)
def _seed() -> None:
    # Without a GPU torch.manual_seed formats the stack three times, for devices that nobody starts.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Every fresh uninitialised tensor holds NaN (integers: their maximum), so an unwritten output is seen.

    The fill happens inside aten::empty and its kin, so it reaches the allocations of compiled kernels too.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """Processes in one gloo group, shared by all tests."""
    from ranks import Ranks

    workers = Ranks()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def scripts() -> Iterator[Any]:
    """Scripts under one instruction set of the CPU or another, each in a process of its own."""
    from isa import Scripts

    found = Scripts()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def sanitizers() -> Iterator[None]:
    """The emulated kernels begin to compile under both sanitizers; torch keeps to one thread."""
    from batches import one_thread
    from emulation import build

    for flavour in ("thread", "address"):
        build.objects(flavour)
    with one_thread():
        yield
