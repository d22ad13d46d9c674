"""Promise: what is promised whatever computes it holds for the Triton kernels, seen in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from interpreted import rerun, starts_it

# Of tests/contract, and of this folder those that need the interpreter: a start for several files, as it takes seconds.
RUNS = {
    "softmax": ("softmax_operators", "scale_grad", "means", "row_statistics"),
    "hierarchical": ("hierarchical", "hierarchical_operators", "linear_hierarchical"),
    "sigmoid": ("sigmoid_operators", "hierarchical_shards"),
    "two_way": ("two_way_operators",),
    "options": ("class_probabilities", "functions", "limits", "long_tail_options", "no_rows", "wrong_arguments"),
}
FOLDERS = [Path(__file__).parents[1] / "contract", Path(__file__).parent]


@starts_it
@pytest.mark.parametrize("run", RUNS)
def test_in_a_process_of_its_own(run: str) -> None:
    pytest.importorskip("triton")
    paths = [path for name in RUNS[run] for folder in FOLDERS if (path := folder / f"test_{name}.py").exists()]
    assert len(paths) == len(RUNS[run])
    rerun(*paths)
