"""The benchmark: its rows are complete, a wrong result gets none, and no device means no row."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import longtail

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
TINY = ["--shape", "64,96", "--rounds", "1", "--no-compile"]
MODES = ["backward", "forward", "inplace"]


def command(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # no test of this run
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bench(monkeypatch):
    """The command line, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.__main__

    return bench.__main__


def test_tiny_run_writes_every_row_and_the_picture(tmp_path):
    path = tmp_path / "cpu.csv"
    done = command("bench", "cpu", *TINY, "--output", str(path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(path)
    ours = [("longtail", mode) for mode in MODES]
    losses = [(loss, *each) for loss in ("plain", "family", "everything") for each in [("eager", ""), *ours]]
    for dtype in ("float32", "bfloat16"):
        found = [(r["loss"], r["contender"], r["gradient"]) for r in rows if r["dtype"] == dtype]
        assert found == [("", "copy", ""), *losses]
    for row in rows:
        assert (row["section"], row["device"], row["N"], row["C"], row["rounds"]) == ("cpu", "cpu", "64", "96", "1")
        assert float(row["p20_ms"]) == float(row["median_ms"]) == float(row["p80_ms"]) > 0
        for fact in ("torch", "triton", "python", "cpu", "threads", "commit", "date"):
            assert row[fact], fact
        assert row["torch"] == torch.__version__
        assert row["isa"] == (longtail.ops.cpu.isa() or "")
    assert "over F.cross_entropy" in done.stdout
    assert (tmp_path / "cpu_time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("section", "shape", "rows", "losses"),
    [
        ("sigmoid", "64,96", 64, ["sigmoid_focal", "dense_focal"]),
        ("multi_label", "64,96", 64, ["multi_label_focal", "asymmetric", "distribution_balanced", "zlpr", "two_way"]),
        ("soft", "64,96", 64, ["soft"]),
        ("statistics", "64,96", 64, ["plain", "statistics"]),
        ("tail", "64,96", 64, ["plain", "vector_scaling", "immax", "seesaw", "hierarchical", "hierarchical_shuffled"]),
        ("images", "2,19,4,8", 64, ["focal"]),
    ],
)
def test_other_sections(section, shape, rows, losses, tmp_path, bench):
    path = tmp_path / "cpu.csv"
    bench.main([section, "--shape", shape, "--rounds", "1", "--no-compile", "--output", str(path)])
    found = [row for row in rows_of(path) if row["dtype"] == "float32"]
    expected = [("", "copy", "")]
    for loss in losses:
        modes = {"statistics": ("backward", "inplace"), "soft": ("backward",)}.get(loss, MODES)
        expected += [(loss, "eager", ""), *((loss, "longtail", mode) for mode in modes)]
    assert [(r["loss"], r["contender"], r["gradient"]) for r in found] == expected
    assert {(r["section"], int(r["N"]), int(r["C"])) for r in found} == {(section, rows, int(shape.split(",")[1]))}
    assert (tmp_path / f"{section}_time.png").exists()


def test_fused_linear_rows_say_how_far_from_the_bare_products(tmp_path, bench):
    path = tmp_path / "linear.csv"
    bench.main(["linear", "--shape", "64", "32", "512", "--rounds", "1", "--output", str(path)])
    bare, *others = rows_of(path)
    assert (bare["contender"], bare["loss"], bare["time_of_gemms"]) == ("three GEMMs", "", "1")
    assert [r["contender"] for r in others if r["loss"] == "family"] == ["longtail complement + focal"]
    for row in others:
        assert (row["N"], row["D"], row["C"], row["rounds"]) == ("64", "32", "512", "1")
        ratio = float(row["median_ms"]) / float(bare["median_ms"])
        assert float(row["time_of_gemms"]) == pytest.approx(ratio, rel=1e-3)


def test_training_step_rows(tmp_path, bench):
    path = tmp_path / "step.csv"
    options = ["--tokens", "256", "--rounds", "1", "--vocabulary", "4096", "--most", "512", "--output", str(path)]
    bench.main(["step", *options])
    rows = rows_of(path)
    assert [row["contender"] for row in rows] == ["plain PyTorch", "fused loss", "fused linear loss"]
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert row["largest_batch"] in ("", "512")  # empty where peak memory cannot be measured


def test_figures_of_a_row_agree_with_each_other(tmp_path, bench):
    path = tmp_path / "cpu.csv"
    bench.main(["cpu", *TINY, "--dtype", "bfloat16", "--output", str(path)])
    rows = rows_of(path)
    copy, eager = rows[:2]
    for row in rows:
        time = float(row["median_ms"])
        assert float(row["copy_ms"]) == float(copy["median_ms"])
        if row["passes"]:
            assert int(row["bytes"]) == int(row["passes"]) * 64 * 96 * 2
            assert float(row["GB_per_s"]) == pytest.approx(int(row["bytes"]) / time / 1e6, rel=1e-3)
            share = float(row["GB_per_s"]) / float(copy["GB_per_s"])
            assert float(row["share_of_copy"]) == pytest.approx(share, rel=1e-3)
        if row["loss"]:
            of_eager = float(eager["median_ms"]) / time
            assert float(row["speedup_over_cross_entropy"]) == pytest.approx(of_eager, rel=1e-3)
            assert float(row["forward_ms"]) + float(row["backward_ms"]) == pytest.approx(time, rel=1e-3)


def test_a_later_run_replaces_its_rows_and_keeps_the_others(tmp_path, bench):
    path = tmp_path / "cpu.csv"
    bench.main(["cpu", *TINY, "--dtype", "float32", "--output", str(path)])
    first = rows_of(path)
    bench.main(["cpu", *TINY, "--dtype", "float32", "--output", str(path)])
    again = rows_of(path)
    assert [r["median_ms"] for r in again] != [r["median_ms"] for r in first]
    assert len(again) == len(first)
    bench.main(["overhead", "--rounds", "2", "--output", str(path)])
    both = rows_of(path)
    assert both[: len(first)] == again
    calls = both[len(first) :]
    assert {(r["section"], r["N"], r["C"]) for r in calls} == {("overhead", "128", "10")}
    ours = [r["loss"] for r in calls if r["contender"] == "longtail" and r["gradient"] == "backward"]
    assert ours == ["plain", "focal", "sigmoid_focal", "balanced", "dense_sigmoid"]
    assert sorted(r["loss"] for r in calls if r["contender"] == "longtail module") == sorted(ours)


def test_memory_is_one_gradient_out_of_place_and_none_in_place(tmp_path, bench):
    path = tmp_path / "memory.csv"
    bench.main(["memory", "--shape", "1024,4096", "--dtype", "float32", "--output", str(path)])
    logits = 1024 * 4096 * 4 / 1e6
    ours = [row for row in rows_of(path) if row["contender"] == "longtail"]
    assert len(ours) == 9
    for row in ours:
        assert row["median_ms"] == ""
        if not row["peak_extra_MB"]:
            pytest.skip("no /proc/self/clear_refs: peak memory cannot be measured here")
        expected = 0 if row["gradient"] == "inplace" else logits
        assert float(row["peak_extra_MB"]) == pytest.approx(expected, abs=0.1 * logits), row["gradient"]


def without_complement(logits, target, **options):
    options["complement_gamma"] = 0.0
    return CORRECT(logits, target, **options)


def slightly_large_loss(logits, target, **options):
    return CORRECT(logits, target, **options) * 1.001


def large_loss(logits, target, **options):
    """Less than what F.cross_entropy may round away, which sums losses in bfloat16."""
    return CORRECT(logits, target, **options) * 1.01


def gradient_off_elsewhere(logits, target, **options):
    """1 % off at the classes other than the targets, whose gradients are small beside the targets'."""
    seen = logits.view_as(logits)
    seen.register_hook(lambda grad: torch.where(grad > 0, grad * 1.01, grad))
    return CORRECT(seen, target, **options)


CORRECT = longtail.cross_entropy


WRONG = [(wrong, "float32") for wrong in (without_complement, slightly_large_loss, gradient_off_elsewhere)]


@pytest.mark.parametrize(("wrong", "dtype"), [*WRONG, (large_loss, "bfloat16")])
def test_a_wrong_contender_is_refused_and_no_row_written(wrong, dtype, tmp_path, bench, monkeypatch, capsys):
    monkeypatch.setattr(longtail, "cross_entropy", wrong)
    path = tmp_path / "cpu.csv"
    with pytest.raises(SystemExit) as stop:
        bench.main(["cpu", *TINY, "--dtype", dtype, "--output", str(path)])
    assert stop.value.code == 1
    assert "of longtail" in capsys.readouterr().err
    assert not path.exists()


def test_without_a_cuda_device_the_gpu_section_says_so_and_writes_nothing(tmp_path):
    path = tmp_path / "gpu.csv"
    done = command("bench", "gpu", "--output", str(path), CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "gpu: no CUDA device\n", "")
    assert not path.exists()


@pytest.mark.usefixtures("bench")
def test_the_gpu_section_compares_peers_where_they_run(monkeypatch, capsys):
    """Its plan on the CPU, with one stand-in that runs and one that does not."""
    from bench import gpu, suite

    def broken(*_arguments, **_options):
        raise RuntimeError("no such device")

    stand_ins = {"liger": torch.nn.functional.cross_entropy, "quack": broken}
    for name, module, function, *_ in gpu.PEERS:
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, stand_ins[name])
        monkeypatch.setitem(sys.modules, module, stand_in)
    small = {"shapes": ((64, 96),), "dtypes": (torch.float32,), "rounds": 1, "compiled": False}
    (rows,) = suite.run(dataclasses.replace(gpu.GPU, device="cpu", **small), lambda *_: None)
    found = [(row.loss, row.contender, row.gradient) for row in rows if row.contender != "longtail"]
    eager = [(loss, "eager", "") for loss in ("plain", "focal", "complement", "family")]
    assert found == [("", "copy", ""), *eager, ("plain", "liger", "inplace")]
    assert "quack is left out: RuntimeError: no such device" in capsys.readouterr().err


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(
    ("plan", "shape"), [("SIGMOID", (64, 96)), ("MULTI_LABEL", (64, 96)), ("IMAGES", (2, 9, 7, 8))]
)
def test_the_other_gpu_sections_agree_with_eager(plan, shape):
    """On the CPU: every loss compared, in each gradient mode, with rows of all pixels."""
    from bench import gpu, suite

    chosen = getattr(gpu, plan)
    small = {"device": "cpu", "shapes": (shape,), "rounds": 1, "compiled": False}
    problems = list(suite.run(dataclasses.replace(chosen, **small), lambda *_: None))
    assert [rows[0].dtype for rows in problems] == ["bfloat16", "float32"]
    for rows in problems:
        assert [(r.loss, r.gradient) for r in rows if r.contender == "longtail"] == [
            (loss, mode) for loss in chosen.losses for mode in MODES
        ]
        assert {(r.N, r.C) for r in rows} == {(64, 96) if len(shape) == 2 else (112, 9)}
        dense = [r.passes for r in rows if (r.loss, r.contender) == ("dense_focal", "longtail")]
        assert dense in ([], [5, 3, 3]), "the targets are read too"


def test_call_overhead_is_a_pytest_benchmark():
    done = command(
        "bench", "overhead", "--pytest-benchmark", PYTEST_ADDOPTS="-p no:cacheprovider --benchmark-max-time=0.05"
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    for contender in ("eager", *(f"longtail-{mode}" for mode in MODES)):
        assert f"test_forward_and_backward[{contender}]" in done.stdout
