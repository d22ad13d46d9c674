"""Promise: what is promised whatever computes it holds for the Triton kernels, seen in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from interpreted import rerun, starts_it

CONTRACT = Path(__file__).parents[1] / "contract"


@starts_it
@pytest.mark.parametrize(
    "name",
    [
        *("class_probabilities", "hierarchical", "hierarchical_operators", "hierarchical_shards", "limits"),
        *("linear_hierarchical", "long_tail_options", "means", "row_statistics", "scale_grad", "sigmoid_operators"),
        *("softmax_operators", "two_way_operators"),
    ],
)
def test_in_a_process_of_its_own(name: str) -> None:
    pytest.importorskip("triton")
    rerun(str(CONTRACT / f"test_{name}.py"), "-k", "triton", "-m", "not gpu")
