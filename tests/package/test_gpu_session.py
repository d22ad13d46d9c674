"""Promise: a run on a GPU machine keeps to its time and to 8 files, ends for no step, and says what became of each."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch

import longtail

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def step(name, body, seconds=60, **fields):
    from bench.gpu_steps import Step

    return Step(name, ("python", "-c", body), "log.txt", seconds, **fields)


def ran(steps, out, limit=None):
    from bench import gpu_session

    return gpu_session.run_steps(steps, out, limit=limit, began=time.time())


# A shell starts what runs in the background with interrupts ignored, and children inherit that.
SLOW = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
SLOW += "print('so far', flush=True)\ntry:\n    time.sleep(60)\nfinally:\n    print('cut off', flush=True)"


def test_a_failure_and_a_cut_end_no_run_and_the_table_tells_all(tmp_path, monkeypatch):
    from bench import gpu_session

    monkeypatch.setattr(gpu_session, "GRACE", 5.0)
    steps = [
        step("bad", "import sys; print('wrong'); sys.exit(3)"),
        step("slow", SLOW, 3, group="both"),
        step("good", "print('three passed')", group="both"),
        step("absent", "", needs="no such file"),
        step("place", "print('{out}')"),
    ]
    done = ran(steps, tmp_path)
    assert [(d.step.name, d.status, d.result) for d in done] == [
        ("bad", 3, "wrong"),
        ("slow", 124, "KeyboardInterrupt"),
        ("good", 0, "three passed"),
        ("absent", None, "left out: no no such file"),
        ("place", 0, str(tmp_path)),
    ]
    assert 3 <= done[1].seconds < 8
    assert done[2].seconds < 3
    lines = gpu_session.table(done, 11.6).splitlines()
    assert [re.split("  +", line)[0] for line in lines] == ["step", "install", *(s.name for s in steps)]
    assert re.split("  +", lines[2]) == ["bad", "3", "0", "wrong"]
    text = (tmp_path / "log.txt").read_text()
    assert "so far\ncut off\n" in text
    assert text.count("exit status") == 4


def test_what_hears_nothing_is_killed_with_what_it_started(tmp_path, monkeypatch):
    from bench import gpu_session

    monkeypatch.setattr(gpu_session, "GRACE", 0.5)
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    (done,) = ran([step("deaf", deaf, 2)], tmp_path)
    assert done.status == 124
    assert done.seconds < 10
    state = Path(f"/proc/{done.result}/stat")
    time.sleep(0.1)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_can_not_be_killed_is_left(tmp_path, monkeypatch):
    """As a process that waits in a driver."""
    from bench import gpu_session

    monkeypatch.setattr(gpu_session, "GRACE", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_session, "_end", lambda *_: None)
        body = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        stuck, later = ran([step("stuck", body, 2), step("later", "print('went on')")], tmp_path)
    os.kill(int(stuck.result), signal.SIGKILL)
    assert (stuck.status, later.status, later.result) == (124, 0, "went on")
    assert stuck.seconds < 10


def test_an_interrupted_run_leaves_no_step_behind(tmp_path, monkeypatch):
    from bench import gpu_session

    started = []

    def interrupted(running):
        started.extend(one.process for one in running)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_session, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran([step("one", SLOW, group="both"), step("other", SLOW, group="both")], tmp_path)
    assert [process.wait(10) for process in started] == [-signal.SIGKILL] * 2


def test_no_step_begins_that_the_limit_has_no_time_for(tmp_path, monkeypatch):
    from bench import gpu_session

    monkeypatch.setattr(gpu_session, "GRACE", 1.0)
    monkeypatch.setattr(gpu_session, "LEAST", 1.0)
    started = time.monotonic()
    done = ran([step("long", SLOW), step("later", "print('never')")], tmp_path, limit=4)
    assert [(d.step.name, d.status) for d in done] == [("long", 124), ("later", None)]
    assert done[1].result == "left out: no time left"
    assert time.monotonic() - started < 6


def test_the_table_of_steps():
    """What each run prints or writes makes at most 8 files, and its steps would fit if each took all that it may."""
    from bench.gpu_steps import LIMITS, RUNS, TABLE

    for name, steps in RUNS.items():
        assert len({s.name for s in steps}) == len(steps), "results are kept by name"
        csv = {word.removeprefix("{out}/") for s in steps for word in s.words if word.startswith("{out}/")}
        assert len({s.file for s in steps} | csv | {TABLE}) <= 8
        seconds = {s.group or s.name: max(t.seconds for t in steps if (t.group or t.name) == (s.group or s.name))
                   for s in steps}  # fmt: skip
        if LIMITS[name] is not None:
            assert sum(seconds.values()) <= LIMITS[name]
            assert not any(s.name.startswith("bench: ") and s.group for s in steps), "nothing beside what is timed"


def test_the_first_run_has_every_file_with_tests_for_a_gpu():
    from bench.gpu_steps import FIRST

    found = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    for_a_gpu = {name for name, text in found.items() if re.search(r"pytest\.mark\.gpu\b|import .*\bGPU\b", text)}
    assert len(for_a_gpu) > 10
    assert for_a_gpu == {word for step in FIRST for word in step.words if word.startswith("tests/")}


def test_every_command_of_the_steps_is_one():
    """Without running it: sections parse their options, and test files, tools and filters are what they should be."""
    import bench.__main__ as bench
    from bench.gpu_steps import RUNS, rehearsal

    for found in (s for steps in RUNS.values() for s in steps):
        words = list(found.words)
        stands_for = rehearsal(found)
        assert (stands_for is None) == (words == ["nvidia-smi"])
        if "pytest" in words:
            assert stands_for[-1] == "--collect-only"
            assert words[words.index("-m", 3) + 1] == "gpu"
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        elif "bench" in words:
            section, *options = words[words.index("bench") + 1 :]
            bench.section_parser(section)[0].parse_args(options)
        if words[0] == "compute-sanitizer":
            assert words[words.index("--kernel-name") + 1] == "kernel_substring=longtail"
            assert found.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_rehearsal_of_a_step_fails_where_its_command_is_none(tmp_path):
    from bench import gpu_session
    from bench.gpu_steps import Step

    commands = {
        "option": ("python", "-m", "bench", "gpu", "--dtype", "bfloat12"),
        "tests": ("ncu", "python", "-m", "pytest", "-q", "tests/support/no_such_file.py"),
        "good": ("compute-sanitizer", "python", "-m", "bench", "smoke"),
    }
    steps = [Step(name, words, "log.txt", 60, "all") for name, words in commands.items()]
    done = gpu_session.run_steps(steps, tmp_path, limit=None, began=time.time(), rehearse=True)
    assert [d.status for d in done] == [2, 4, 0], (tmp_path / "log.txt").read_text()
    assert done[2].result == "2 shapes as on the CPU"


def test_without_a_gpu_nothing_runs(tmp_path, capsys):
    import bench.__main__ as bench

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stop:
        bench.main(["gpu-session", "--first", "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "bench gpu-session: no CUDA device\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_operators_beside_those_of_another_build(family):
    """By the CPU's kernels, which take the same arguments."""
    from bench import kernels
    from bench.measure import Mismatch

    with longtail.use_backend("cpu"):
        pass
    builds = [torch.ops.longtail_cpu, torch.ops.longtail_cpu]
    found = list(kernels.lines((family, (40, 30), torch.bfloat16), "cpu", builds, 2))
    assert [line[0].rpartition(", ")[2] for line in found] == ["copy", "loss", "backward", "in place"]
    for line in found[1:]:
        assert float(line[2]) / float(line[1]) == pytest.approx(float(line[3]), rel=0.02)
    one = torch.ones(3)
    with pytest.raises(Mismatch, match=r"differ by 0\.5 "):
        kernels.compare("x", [(one,), (one / 2,)], torch.bfloat16)


def test_smoke_tells_of_every_shape_that_is_wrong(monkeypatch, capsys):
    import bench.__main__ as bench

    right = longtail.cross_entropy

    def wrong_at_9(x, *arguments, **options):
        return right(x, *arguments, **options) * (1.1 if x.shape[1] == 9 and options["gradient"] == "inplace" else 1.0)

    monkeypatch.setattr(longtail, "cross_entropy", wrong_at_9)
    with pytest.raises(SystemExit) as stop:
        bench.main(["smoke", "--device", "cpu", "--shape", "4,9", "4,10"])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "[4, 10]: as on the CPU" in printed.out
    assert printed.err == "bench smoke: 1 of 2 shapes are not as on the CPU\n"


def test_gpu_tests_are_shared_out_one_by_one():
    """By pytest-xdist, where they are all that runs; else a file is one group."""
    scheduler = pytest.importorskip("xdist.scheduler")
    spec = importlib.util.spec_from_file_location("conftest_of_tests", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for marker, by_file in (("gpu", False), ("not gpu", True), ("", True)):
        options = {"markexpr": marker, "tx": ["2*popen"], "loadscopereorder": False}
        config = types.SimpleNamespace(getoption=options.get, getvalue=options.get, option=types.SimpleNamespace())
        chosen = conftest.pytest_xdist_make_scheduler(config, None)
        assert isinstance(chosen, scheduler.LoadScopeScheduling if by_file else scheduler.LoadScheduling)


def test_a_contender_without_the_memory_has_a_row_that_says_so(monkeypatch):
    """The one that the others are compared with is then computed in parts."""
    from bench import eager, linear
    from bench.measure import Mismatch

    whole = eager.softmax_loss

    def too_large(x, *arguments, **options):
        if len(x) > 16:
            raise torch.OutOfMemoryError
        return whole(x, *arguments, **options)

    monkeypatch.setattr(eager, "softmax_loss", too_large)
    monkeypatch.setattr(linear, "PART", 16)
    arguments = ((40, 8, 50), 1, torch.float32, torch.device("cpu"))
    rows = linear.rows_of(linear.measure(*arguments), (40, 8, 50), torch.float32, "cpu")
    noted = {row.contender: dataclasses.asdict(row) for row in rows if row.note}
    assert list(noted) == ["eager"]
    assert {noted["eager"][name] for name in ("median_ms", "time_of_gemms", "peak_extra_MB")} == {None}
    assert noted["eager"]["note"] == "out of memory"
    linear._show(rows)
    right = longtail.linear_cross_entropy
    monkeypatch.setattr(longtail, "linear_cross_entropy", lambda *a, **o: right(*a, **o) * (1.01 if o else 1.0))
    monkeypatch.setattr(linear, "peers", lambda *_: [])
    with pytest.raises(Mismatch):
        linear.measure(*arguments)
