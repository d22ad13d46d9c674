"""The papers' claims are tested on the rows, seed by seed; verdicts; trainings one after the other."""

from __future__ import annotations

import math
import os
import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from scipy import stats

from longtail.experiments import claims, comparison, methods, output, pool, statistics
from longtail.experiments.texts import label_methods

VALUES = {
    "complement cross-entropy": (0.75, 0.71, 0.79, 0.68, 0.735),
    "complement objective training": (0.7, 0.68, 0.75, 0.62, 0.69),
    "cross-entropy": (0.69, 0.70, 0.74, 0.64, 0.66),
    "class-balanced softmax, beta 0.999": (0.6, 0.6, 0.63, 0.53, 0.56),
}


def rows_of(values):
    return [{"method": name, "few_by_seed": " ".join(f"{x:.4f}" for x in each)} for name, each in values.items()]


def test_claims_are_paired_tests_of_one_family():
    found = claims.findings(rows_of(VALUES), "few")
    pairs = [(finding.claim.better, finding.claim.than) for finding in found]
    assert pairs == [
        ("complement cross-entropy", "complement objective training"),
        ("complement objective training", "cross-entropy"),
        ("class-balanced softmax, beta 0.999", "cross-entropy"),
    ], "claims of methods that have no row are left out"
    p = [stats.ttest_rel(VALUES[better], VALUES[than]).pvalue for better, than in pairs]
    assert sorted(p) == [p[2], p[0], p[1]]
    assert [finding.p_holm for finding in found] == pytest.approx([2 * p[0], p[1], 3 * p[2]])
    assert [finding.outcome for finding in found] == ["holds", "no difference shown", "the reverse holds"]
    assert found[0].difference == pytest.approx(0.045)


def test_a_single_seed_tests_no_claim(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    rows = rows_of({name: each[:1] for name, each in VALUES.items()})
    assert {finding.outcome for finding in claims.findings(rows, "few")} == {"not tested"}
    rows[0]["few_by_seed"] = 0.75  # as it comes out of a CSV
    claims.print_claims("Claims", rows, "few")
    printed = capsys.readouterr().out
    assert re.search(r"complement cross-entropy over complement objective training +\+5\.0 +not tested", printed)
    assert "nan" not in printed


@pytest.mark.parametrize("by_seed", [None, ""])
def test_a_method_without_scores_tests_no_claim(by_seed):
    rows = rows_of(VALUES)
    rows[2]["few_by_seed"] = by_seed
    assert len(claims.findings(rows, "few")) == 1


def test_every_claim_is_of_methods_that_stand_in_one_experiment():
    names = [
        {method.name for method in each}
        for each in (methods.grid(), methods.selection(), label_methods.label_methods())
    ]
    for claim in claims.CLAIMS:
        assert any({claim.better, claim.than} <= each for each in names), claim
        assert re.fullmatch(r"\w+ et al\. 20\d\d", claim.source)
    assert len({claim[:2] for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def of_few(values):
    return [{"few": value} for value in values]


def test_the_control_is_compared_with_nothing():
    columns = comparison.columns_of(of_few([0.12345, math.nan]), None, ["few"])
    assert math.isnan(columns.pop("few_mean"))
    assert math.isnan(columns.pop("few_std"))
    assert columns == {
        **dict.fromkeys(("few_difference", "few_half_width", "few_p", "few_p_holm")),
        "few_verdict": "",
        "few_by_seed": "0.1235",
    }


def test_verdicts_take_all_rows_of_a_metric_as_one_family():
    rows = [{"method": "control", **comparison.columns_of(of_few(VALUES["cross-entropy"]), None, ["few"])}]
    for name, values in VALUES.items():
        columns = comparison.columns_of(of_few(values), of_few(VALUES["cross-entropy"]), ["few"])
        rows.append({"method": name, **columns})
    comparison.add_verdicts(rows, ["few"], "control")
    control = VALUES["cross-entropy"]
    p = [1.0 if values == control else stats.ttest_rel(values, control).pvalue for values in VALUES.values()]
    assert [row["few_p_holm"] for row in rows[1:]] == pytest.approx(statistics.holm(p))
    assert [row["few_verdict"] for row in rows] == ["", "better", "no difference shown", "no difference shown", "worse"]
    assert rows[0]["few_p_holm"] is None


def test_trainings_end_in_order_and_an_interrupt_keeps_them():
    told = []

    def advance(task):
        told.append(task)
        if task == 3:
            raise KeyboardInterrupt

    assert pool.train_all([1, 2], str, 1, told.append, lambda *_: {}) == {1: "1", 2: "2"}
    assert told == [1, 2]
    with pytest.raises(output.Interrupted) as stop:
        pool.train_all([1, 2, 3, 4], str, 1, advance, lambda task, outcome: {"task": task, "is": outcome})
    assert stop.value.done == "3 of 4 networks"
    assert stop.value.rows == [{"task": i, "is": str(i)} for i in (1, 2, 3)]


def test_a_process_that_the_system_ends_is_one_error():
    with pytest.raises(ChildProcessError, match="the system has ended a process"):
        pool.train_all([9], os._exit, 2, lambda _: None, lambda *_: {})
