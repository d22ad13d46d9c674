"""The command line: the demo trains on real data and reports; bad options are explained in one line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import longtail

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from longtail.__main__ import main, make_parser
from longtail.experiments import demo_digits as demo
from longtail.experiments import demo_digits_report as demo_report
from longtail.experiments.demo_parts import mean_and_spread

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("LONGTAIL_BACKEND", "LONGTAIL_CPU_ISA")}


def command(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "longtail", *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def test_demo_reports_and_draws(tmp_path):
    options = [
        "--data",
        "digits",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--loss",
        "cross-entropy",
        "--output",
        "new/folder/small.png",
    ]
    done = command("demo", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    for word in ("overall", "balanced", "many", "medium", "few", "fused", "plain", "cross-entropy"):
        assert word in done.stdout
    assert "imbalance factor 50" in done.stdout
    assert "128, 82, 53, 34, 22, 14, 9, 6, 3, 2" in done.stdout
    assert "class-balanced" not in done.stdout
    assert (tmp_path / "new" / "folder" / "small.png").read_bytes().startswith(b"\x89PNG")


def test_demo_takes_several_losses_and_another_factor(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["class-balanced-softmax-focal-complement", "logit-adjustment"]
    options = ["--data", "digits", "--epochs", "1", "--seeds", "2", "--imbalance-factor", "10"]
    main(["demo", *options, "--loss", *names])
    printed = capsys.readouterr().out
    assert "imbalance factor 10" in printed
    assert "±" in printed
    for name in ("class-balanced softmax focal + complement", "logit adjustment", "tau 1"):
        assert name in printed
    assert (tmp_path / "longtail_demo.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds 0", "--seeds: '0' is not a whole number of at least 1"),
        ("--epochs 1.5", "--epochs: '1.5' is not a whole number of at least 1"),
        ("--imbalance-factor 0.02", "--imbalance-factor: '0.02' is not a number of at least 1"),
        ("--imbalance-factor ten", "'ten' is not a number of at least 1"),
        ("--imbalance-factor nan", "'nan' is not a number of at least 1"),
        ("--imbalance-factor 1e309", "'1e309' is not a number of at least 1"),
        ("--imbalance-factor 1e308", "imbalance_factor is 1e+308, expected at most 12"),
        ("--loss \x1b[31m", "invalid choice: '\\x1b[31m'"),
        ("--count \x1b[31m", "unrecognized arguments: --count \\x1b[31m"),
        ("--imbalance-factor 1000", "imbalance_factor is 1000, expected at most 12"),
        ("--loss mse", "invalid choice: 'mse' (choose from"),
        ("--output file/a.png", "'file' is not a folder"),
        ("--output file/new/a.png", "'file' is not a folder"),
        (f"--output {'a' * 300}/a.png", "a' cannot be made: File name too long"),
        ("--output a.jpg", "'a.jpg' does not end in .png"),
        ("--output folder.png", "'folder.png' is a folder"),
        (f"--output {'a' * 300}.png", "a.png' cannot be written to: File name too long"),
        (f"--output {'a' * 250}.png", "a.png' cannot be written to: File name too long"),
        ("--seed-count 3", "unrecognized arguments"),
        ("--loss ldam-drw", "argument --loss: 'ldam-drw' does not go with --data digits (choose from cross-entropy, "),
        ("--data icd --loss class-balanced-softmax-focal", "does not go with --data icd (choose from cross-entropy, "),
        ("--data icd --imbalance-factor 10", "argument --imbalance-factor: does not go with --data icd"),
        ("--data mnist", "argument --data/-d: invalid choice: 'mnist' (choose from"),
    ],
)
def test_bad_options_are_explained_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--data", "digits", *options.split()])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("longtail")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("subcommand", [[], ["info"], ["demo", "--data", "digits"]])
def test_missing_command_and_bad_environment(subcommand, tmp_path):
    done = command(*subcommand, cwd=tmp_path, LONGTAIL_BACKEND="abacus")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ("LONGTAIL_BACKEND is 'abacus'" if subcommand else "required: {info,demo,experiment}") in done.stderr


@pytest.mark.parametrize(("data", "missing"), [("digits", "rich"), ("icd", "rich, simple-icd-10-cm")])
def test_a_missing_package_of_the_data_names_the_install_command(data, missing, monkeypatch, capsys):
    found, hidden = importlib.util.find_spec, ("rich", "simple_icd_10_cm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--data", data])
    assert stop.value.code == 1
    packages = missing.replace(",", "")
    assert capsys.readouterr().err == f"longtail demo: needs {missing}: pip install {packages}\n"


def test_info_names_versions_devices_and_every_backend(tmp_path):
    done = command("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for fact in (longtail.__version__, torch.__version__, "python", "triton", "threads", "devices", "cpu"):
        assert fact in done.stdout
    for name, backend in longtail.backends().items():
        assert any(line.split()[:2] == [name, "yes" if backend.available else "no"] for line in done.stdout.split("\n"))


def test_splits_are_disjoint_balanced_for_testing_and_differ_by_seed():
    first, second = demo.load(demo.Plan(["cross-entropy"], 20.0, 2, 1))
    assert first.test_labels.bincount().tolist() == [demo.TEST_PER_CLASS] * demo.NUM_CLASSES
    counts = first.counts()
    assert (counts.diff() <= 0).all()
    assert counts[0] // counts[-1] == 21  # 128 and int(128 / 20) = 6
    assert torch.equal(counts, second.counts())
    assert not torch.equal(first.test_images, second.test_images)
    train = {image.numpy().tobytes() for image in first.train_images}
    assert not train & {image.numpy().tobytes() for image in first.test_images}


@pytest.mark.parametrize("loss", demo.LOSSES)
def test_fused_and_plain_loss_agree(loss, monkeypatch):
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 3)
    options = demo.loss_options(loss, torch.tensor([50, 20, 5, 1]))
    logits, target = torch.randn(32, 4) * 5, torch.randint(0, 4, (32,))
    taken = demo.time_loss(logits, target, options)
    assert taken.fused > 0
    assert taken.plain > 0


def test_disagreement_stops_the_demo(monkeypatch):
    monkeypatch.setattr(demo, "softmax_loss", lambda logits, _target: logits.square().mean())
    with pytest.raises(AssertionError):
        demo.time_loss(torch.randn(8, 4), torch.randint(0, 4, (8,)), {})


def test_groups_are_thirds_of_the_classes():
    assert demo.group_thresholds(torch.tensor([90, 80, 70, 60, 50, 40, 30])) == (70, 50)
    assert demo.group_thresholds(torch.tensor([5, 5, 5])) == (5, 5)


def test_mean_and_spread():
    assert mean_and_spread([0.5]) == "50.0"
    assert mean_and_spread([0.25, 0.75]) == "50.0±35.4"
    assert mean_and_spread([0.5, float("nan")]) == "-"


def test_whiskers_end_at_0_and_100():
    below, above = demo_report.whiskers([[0.0, 10.0], [90.0, 100.0], [40.0, 60.0]])
    assert below == pytest.approx([5.0, 50**0.5, 200**0.5])
    assert above == pytest.approx([50**0.5, 5.0, 200**0.5])


def interrupted(plan, after):
    """A run with an interrupt in so many epochs, of all networks."""
    told = []

    def advance(status):
        told.append(status)
        if len(told) == after:
            raise KeyboardInterrupt

    return demo.run(plan, demo.load(plan), advance)


def test_an_interrupt_keeps_the_seeds_that_every_loss_has_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 2)
    plan = demo.Plan(["cross-entropy", "logit-adjustment"], 50.0, 3, 1)
    whole = demo.run(plan, demo.load(plan), lambda _: None)
    found = interrupted(plan, after=6)
    assert [len(result.scores) for result in found] == [2, 2]
    for result, other in zip(found, whole, strict=True):
        assert [s.overall for s in result.scores] == [s.overall for s in other.scores[:2]]
    with pytest.raises(KeyboardInterrupt):
        interrupted(plan, after=2)
    monkeypatch.setattr(demo_report, "run_with_progress", lambda *_: found)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--data", "digits", "--seeds", "3", "--loss", *plan.losses, "--output", str(tmp_path / "a.png")])
    assert left.value.code == 130
    printed = capsys.readouterr()
    assert "; 2 seeds, ± is the standard deviation" in printed.out
    assert printed.err == "longtail demo: interrupted: the table is of 2 of 3 seeds, no picture drawn\n"
    assert not list(tmp_path.iterdir())


def options_of(parser):
    """Every option of a parser and of the parsers of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        elif action.option_strings and action.nargs != 0:
            yield parser.prog, action


def test_help_says_of_every_option_what_it_is_and_its_default():
    options = list(options_of(make_parser()))
    assert len(options) > 15
    for prog, option in options:
        said = option.help % vars(option)
        assert len(said.split()) > 3, (prog, option.dest)
        assert "(default: " in said or (option.required and "(required)" in said), (prog, option.dest)
