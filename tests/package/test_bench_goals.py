"""Promise: every goal that the rows allow is judged, by its worst case, and no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
MODES = ["backward", "forward", "inplace"]
OVERHEAD = {"section": "overhead", "shape": (128, 10)}
PEAKS = {"backward": 2048 * 32768 * 4 / 1e6, "forward": 1.5 * 2048 * 32768 * 4 / 1e6, "inplace": 0.0}


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def row(loss, contender, gradient, milliseconds, shape=(2048, 32768), **values):
    """A row; what is not given is None, but for where it was measured."""
    from bench import results

    columns = dict.fromkeys(column.name for column in dataclasses.fields(results.Row))
    columns |= {"section": "cpu", "dtype": "float32", "layout": "contiguous", "threads": 2}
    columns |= {"N": shape[0], "C": shape[1], "loss": loss, "contender": contender, "gradient": gradient}
    return results.Row(**(columns | {"median_ms": milliseconds} | values))


def judged(*rows):
    """Measured values and whether they reach their goals, by the goals' names."""
    from bench import goals

    return {outcome.what: (pytest.approx(outcome.measured), outcome.met) for outcome in goals.outcomes(rows)}


def test_times_beside_rivals():
    gpu = {"section": "gpu"}
    found = judged(
        row("plain", "eager", "", 300.0),
        *(row("plain", "longtail", mode, 60.0) for mode in MODES),
        row("family", "eager", "", 1000.0),
        row("family", "longtail", "backward", 100.0),
        *(row("complement", "eager", "", ms, (ms, 1000), **gpu) for ms in (20, 10)),
        *(row("complement", "longtail", "backward", 1.0, (ms, 1000), **gpu) for ms in (20, 10)),
        row("plain", "liger", "inplace", 3.0, **gpu),
        *(row("plain", "longtail", mode, ms, **gpu) for mode, ms in (("backward", 4.0), ("inplace", 2.0))),
    )
    assert found == {
        "cpu, plain: faster than F.cross_entropy": (5.0, True),
        "cpu, family: faster than eager": (10.0, False),
        "gpu, complement: faster than eager": (10.0, False),  # the worst of all problems
        "gpu, plain: faster than liger": (1.5, True),  # in place, as Liger is
    }


def test_times_beside_a_copy_and_each_other():
    kept = {"section": "pages"}
    half = {"dtype": "bfloat16"}
    found = judged(
        row("", "copy", "", 20.0),
        *(
            row(loss, "longtail", "inplace", ms)
            for loss, ms in (("plain", 22.0), ("family", 23.0), ("everything", 44.0))
        ),
        row("plain", "longtail", "backward", 50.0, forward_ms=10.0, backward_ms=40.0),
        row("", "copy", "", 10.0, **half),
        row("plain", "longtail", "inplace", 30.0, **half),
        row("plain", "longtail", "backward", 40.0, **half),
        row("", "copy, kept pages", "", 20.0, **kept),
        row("family", "longtail, kept pages", "inplace", 20.0, **kept),
        row("family", "longtail, kept pages", "forward", 21.0, **kept),
        row("family", "longtail, kept pages", "backward", 33.0, backward_ms=22.0, **kept),
        row("", "copy, fresh pages", "", 1.0, **kept),
        row("", "copy", "", 10.0, (4096, 8192), section="sigmoid"),
        row("sigmoid_focal", "longtail", "inplace", 14.0, (4096, 8192), section="sigmoid"),
        row("dense_focal", "longtail", "inplace", 14.0, (4096, 8192), section="sigmoid"),
        row("", "copy", "", 10.0, (4 * 512 * 512, 19), section="images"),
        row("focal", "longtail", "inplace", 24.0, (4 * 512 * 512, 19), section="images"),
    )
    assert found == {
        "cpu, in place: time of a copy": (1.15, True),
        "cpu, in place, bfloat16: time of a copy": (3.0, False),
        "cpu, everything in place, float32: time of plain": (2.0, False),
        "cpu, loss alone: time of a copy": (0.5, True),
        "cpu, backward: time of a copy": (2.0, False),
        "cpu, default mode: time of bfloat16 in that of float32": (0.8, True),
        "pages, gradient in forward, its pages kept: time of in place": (1.05, True),
        "pages, backward, its pages kept: time of a copy": (1.1, True),
        "sigmoid, in place: time of a copy": (1.4, False),
        "sigmoid, dense, in place: time of a copy": (1.4, True),
        "images, in place: time of a copy": (2.4, True),
    }


def test_trees_may_cost_more_where_their_classes_are_shuffled():
    tail = {"section": "tail"}
    eager = {"hierarchical": 300.0, "hierarchical_shuffled": 299.0}
    found = judged(
        row("plain", "longtail", "inplace", 10.0, **tail),
        *(row(loss, "eager", "", ms, **tail) for loss, ms in eager.items()),
        *(
            row(loss, "longtail", mode, ms, **tail)
            for loss in eager
            for mode, ms in (("backward", 20.0), ("inplace", 12.0))
        ),
    )
    assert found == {
        "tail, hierarchical: faster than eager": (15.0, True),
        "tail, hierarchical_shuffled: faster than eager": (14.95, False),
        "tail, in place, float32: time of plain": (1.2, False),
        "tail, classes of the tree shuffled, in place, float32: time of plain": (1.2, True),
    }


def test_losses_of_several_labels_beside_sigmoid_focal():
    shape, where = (4096, 8192), {"section": "multi_label"}
    half = where | {"dtype": "bfloat16"}
    times = {"multi_label_focal": 20.0, "asymmetric": 25.0, "distribution_balanced": 30.0}
    peaks = {"backward": 4096 * 8192 * 4 / 1e6, "inplace": 0.1 * 4096 * 8192 * 4 / 1e6}
    found = judged(
        row("asymmetric", "eager", "", 500.0, shape, **where),
        row("distribution_balanced", "compiled", "", 60.0, shape, **where),
        *(
            row(loss, "longtail", mode, ms / (2 if mode == "inplace" else 1), shape, peak_extra_MB=peaks[mode], **where)
            for loss, ms in times.items()
            for mode in peaks
        ),
        row("multi_label_focal", "longtail", "inplace", 6.0, shape, **half),
        row("asymmetric", "longtail", "inplace", 9.0, shape, **half),
        row("asymmetric", "longtail", "backward", 9.0, shape, **half),
    )
    assert found == {
        "multi_label, asymmetric: faster than eager": (20.0, True),
        "multi_label, distribution_balanced: faster than compiled": (2.0, False),
        "multi_label, asymmetric in place, float32: time of sigmoid focal": (1.25, True),
        "multi_label, asymmetric in the default mode, float32: time of sigmoid focal": (1.25, True),
        "multi_label, distribution_balanced in place, float32: time of sigmoid focal": (1.5, False),
        "multi_label, distribution_balanced in the default mode, float32: time of sigmoid focal": (1.5, False),
        "multi_label, asymmetric in place, bfloat16: time of sigmoid focal": (1.5, False),
        "multi_label, in place: peak extra memory, in logits": (0.1, False),
        "multi_label, out of place: peak extra memory, in logits": (1.0, True),
    }


def test_few_classes_calls_and_memory():
    few = {"section": "few-images", "speedup_over_cross_entropy": 2.0}
    torchs = {"plain": 0.1, "balanced": 0.2, "dense_sigmoid": 0.4}
    found = judged(
        *(row("focal", "eager", "", 30.0, (64, 3), **few, layout=layout) for layout in ("contiguous", "channels_last")),
        row("focal", "longtail", "backward", 5.0, (64, 3), **few),
        row("focal", "longtail", "backward", 15.0, (64, 3), **few, layout="channels_last"),
        row("plain", "longtail", "inplace", 5.0, (64, 3), **(few | {"speedup_over_cross_entropy": 0.5})),
        *(row(loss, "eager", "", ms, **OVERHEAD) for loss, ms in torchs.items()),
        row("plain", "longtail", "backward", 0.2, **OVERHEAD),
        row("plain", "longtail", "inplace", 0.9, **OVERHEAD),
        row("focal", "longtail", "backward", 0.16, **OVERHEAD),
        row("balanced", "longtail", "backward", 0.3, **OVERHEAD),
        row("sigmoid_focal", "longtail module", "backward", 0.5, **OVERHEAD),
        row("dense_sigmoid", "eager module", "", 0.5, **OVERHEAD),
        *(row("family", "longtail", mode, None, section="memory", peak_extra_MB=peak) for mode, peak in PEAKS.items()),
    )
    assert found == {
        "few-images, focal: faster than eager": (2.0, False),
        "few-images: faster than F.cross_entropy": (0.5, False),
        "a call on (128, 10), plain, function: time of torch's cross-entropy": (2.0, False),
        "a call on (128, 10), focal, function: time of torch's cross-entropy": (1.6, True),
        "a call on (128, 10), balanced, function: time of torch's weighted cross-entropy": (1.5, True),
        "a call on (128, 10), sigmoid_focal, module: time of torch's binary cross-entropy": (1.0, True),
        "in place: peak extra memory, in logits": (0.0, True),
        "out of place: peak extra memory, in logits": (1.5, False),
    }


def test_scaling_and_growth():
    def scaled(threads, milliseconds, copy, contender="longtail"):
        facts = {"section": "threads", "threads": threads, "passes": 2, "copy_ms": copy}
        return row("family", contender, "inplace", milliseconds, (1, 2**22), **facts)

    def grown(n, milliseconds, classes=1024, gradient="inplace"):
        return row("family", "longtail", gradient, milliseconds, (n, classes), section="growth")

    linear = "threads: time in that of linear scaling, or of the copy's bandwidth"
    assert judged(scaled(1, 80.0, 20.0), scaled(2, 42.0, 10.0)) == {linear: (1.05, True)}
    assert judged(scaled(1, 80.0, 20.0), scaled(2, 42.0, 10.0), scaled(4, 40.0, 10.0)) == {linear: (2.0, False)}
    assert judged(scaled(1, 80.0, 60.0), scaled(4, 55.0, 50.0)) == {linear: (1.1, True)}, "as fast as memory"
    assert judged(scaled(1, 80.0, 20.0), scaled(2, 80.0, 20.0, "eager")) == {}
    per_element = "growth, in place, from 2^25 elements on: most over least time for an element"
    small, default, few = grown(2**10, 900.0), grown(2**20, 9000.0, gradient="backward"), grown(2**24, 900.0, 2)
    found = judged(grown(2**15, 100.0), grown(2**20, 4000.0), small, default, few)
    assert found == {per_element: (1.25, True)}


def test_the_fused_linear_loss():
    from bench import goals

    def timed(contender, ratio, dtype="float32"):
        return {"contender": contender, "dtype": dtype, "time_of_gemms": str(ratio)}

    rows = [
        timed("three GEMMs", 1),
        timed("longtail", 1.02),
        timed("longtail complement + focal", 1.05),
        timed('longtail reduction="none"', 1.5),
        timed("longtail", 1.2, "bfloat16"),
        timed("longtail", ""),
    ]
    found = {outcome.what: (outcome.measured, outcome.met) for outcome in goals.linear_time_outcomes(rows)}
    assert found == {
        "fused linear loss, mean, float32: time of three GEMMs": (1.05, True),
        "fused linear loss, none, float32: time of three GEMMs": (1.5, False),
        "fused linear loss, mean, bfloat16: time of three GEMMs": (1.2, False),
    }
    (memory,) = goals.linear_outcomes([0.1, None, 0.2])
    assert (memory.measured, memory.met) == (0.2, False)
    assert goals.linear_outcomes([None]) == []
