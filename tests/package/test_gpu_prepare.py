"""Promise: what is gathered for a GPU machine is what it needs, and nothing is overwritten by it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from longtail.experiments import provenance

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    import bench.__main__ as bench

    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as stop:
        bench.main(["gpu-session", "--prepare", str(tmp_path)])
    assert (stop.value.code, len(list(tmp_path.iterdir()))) == (1, 1)
    assert "is not empty" in capsys.readouterr().err


def test_what_failed_is_found_in_what_the_first_run_printed():
    from bench.gpu_prepare import failures

    text = (
        "=== tests: rows: python -m pytest\nFAILED tests/a.py::test_b[cuda-(3, 10)] - AssertionError: x - y\n"
        "ERROR tests/a.py::test_c\nFAILED tests/a.py::test_b[cuda-(3, 10)] - again\n1 failed, 2 passed in 3 s\n"
    )
    assert failures(text) == ["tests/a.py::test_b[cuda-(3, 10)]", "tests/a.py::test_c"]


def test_where_nothing_failed_nothing_runs_again(tmp_path, monkeypatch):
    """pytest takes an empty list of tests for all of them."""
    from bench import gpu_prepare

    for name in ("copy_tracked", "build_wheel", "download", "rehearse"):
        monkeypatch.setattr(gpu_prepare, name, lambda *_: None)
    for text, there in (("3 passed in 2 s\n", False), ("FAILED tests/a.py::test_b - x\n", True)):
        (tmp_path / "tests.txt").write_text(text)
        folder = tmp_path / f"folder {there}"
        folder.mkdir()
        gpu_prepare.prepare(folder, None, tmp_path / "tests.txt", quack=False)
        assert (folder / "failed.txt").exists() == there


def test_an_old_library_gets_a_namespace_of_its_own(tmp_path):
    from bench.gpu_prepare import CannotPrepare, library_of, renamed

    wheel = tmp_path / "old.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("longtail/_C_cuda13.so", b"x\0longtail_cuda\0softmax_loss\0")
    assert renamed(library_of(wheel)) == b"x\0longtail_past\0softmax_loss\0"
    with pytest.raises(CannotPrepare, match="stands 0 times"):
        renamed(b"longtail_cudas")


def test_the_commit_of_an_installed_package_is_what_it_is_told(monkeypatch):
    monkeypatch.setenv("LONGTAIL_COMMIT", "abc1234")
    monkeypatch.setattr(provenance, "output_of", lambda *_: "")
    assert provenance.commit() == "abc1234"
    monkeypatch.delenv("LONGTAIL_COMMIT")
    assert provenance.commit() == "unknown"
    answers = {"ls-files": "provenance.py", "status": "", "rev-parse": "fed9876"}
    monkeypatch.setattr(provenance, "output_of", lambda _, command, *__: answers[command])
    monkeypatch.setenv("LONGTAIL_COMMIT", "abc1234")
    assert provenance.commit() == "fed9876", "a checkout speaks for itself"
