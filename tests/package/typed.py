"""What type checkers know of the losses; `make lint` reads it."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

import longtail

Pair = tuple[Tensor, longtail.RowStatistics]


def of_logits(input: Tensor, target: Tensor) -> None:
    assert_type(longtail.cross_entropy(input, target, z_loss=1e-4), Tensor)
    assert_type(longtail.cross_entropy(input, target, return_stats=True), Pair)
    assert_type(longtail.focal_loss(input, target, gamma=1.5, softcap=30.0), Tensor)
    assert_type(longtail.focal_loss(input, target, return_stats=True), Pair)
    assert_type(longtail.complement_entropy(input, target, weight=input, gradient="forward"), Tensor)
    assert_type(longtail.poly_cross_entropy(input, target, 2.0, temperature=0.5, gradient="inplace"), Tensor)
    assert_type(longtail.token_weighting(longtail.row_statistics(input, target), "dft"), Tensor)
    assert_type(longtail.zlpr_loss(input, target, gradient="forward"), Tensor)
    assert_type(longtail.two_way_loss(input, target, 2.0, negative_temperature=0.5), Tensor)
    longtail.generalized_cross_entropy(input, target, label_smoothing=0.1)  # type: ignore[call-arg]
    longtail.focal_loss(input, target, zloss=1e-4)  # type: ignore[call-overload]
    assert_type(longtail.asymmetric_loss(input, target, gamma_positive=input, label_smoothing=0.1), Tensor)
    assert_type(longtail.sigmoid_focal_loss(input, target, alpha=input, gamma=input, clip=0.05), Tensor)
    assert_type(longtail.distribution_balanced_loss(input, target, [1, 2], 9, kappa=0.1), Tensor)
    longtail.asymmetric_loss(input, target, gamma_negative="four")  # type: ignore[arg-type]
    longtail.asymmetric_loss(input, target, gamma=2.0)  # type: ignore[call-arg]
    longtail.sigmoid_cross_entropy(input, target, alpha="much")  # type: ignore[arg-type]


def linear(input: Tensor, weight: Tensor, target: Tensor) -> None:
    assert_type(longtail.linear_cross_entropy(input, weight, target, label_smoothing=0.1), Tensor)
    assert_type(longtail.vocab_parallel_linear_cross_entropy(input, weight, target, return_stats=True), Pair)
    assert_type(longtail.linear_cross_entropy(input, weight, target, shift=True), Tensor)
    assert_type(longtail.linear_row_statistics(input, weight, target, shift=True), longtail.RowStatistics)
    assert_type(longtail.vocab_parallel_row_statistics(input, target), longtail.RowStatistics)


def hierarchical(input: Tensor, weight: Tensor, target: Tensor, tree: longtail.Hierarchy) -> None:
    assert_type(longtail.hierarchical_cross_entropy(input, target, tree, 0.2), Tensor)
    assert_type(longtail.linear_hierarchical_cross_entropy(input, weight, target, tree, shift=True), Tensor)
    assert_type(longtail.vocab_parallel_hierarchical_cross_entropy(input, target, tree, class_start=0), Tensor)
    assert_type(
        longtail.vocab_parallel_linear_hierarchical_cross_entropy(input, weight, target, tree, chunk_size=8), Tensor
    )
    longtail.linear_hierarchical_cross_entropy(input, weight, target, [0, 1])  # type: ignore[arg-type]


def counts(target: Tensor) -> None:
    assert_type(longtail.class_counts(target, 3), Tensor)
    assert_type(longtail.class_counts([[0, 1], [2]], 3, return_totals=True), tuple[Tensor, Tensor])
    assert_type(longtail.positive_weight([1, 2], target, empty="clamp"), Tensor)
