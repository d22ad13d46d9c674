"""The digits experiment: each method is what its paper says, all of them compete on equal terms, and the verdicts."""

from __future__ import annotations

import csv
import functools
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from interrupts import interrupted_after
from longtail.__main__ import main
from longtail.experiments import comparison, demo_digits, digits, methods, output, pool

COUNTS = torch.tensor([40, 20, 8, 3])


@pytest.fixture
def few_methods(monkeypatch):
    """Three of the grid's methods."""
    chosen = [methods.CROSS_ENTROPY, methods.LOGIT_ADJUSTMENT, methods.class_balanced_sigmoid_focal(0.99, 1.0)]
    monkeypatch.setattr(digits, "grid", lambda: chosen)
    return chosen


def make_training(method, features=6):
    torch.manual_seed(5)
    model = methods.Classifier(torch.nn.Identity(), torch.nn.Linear(features, 4))
    return methods.MethodTraining(method, model, COUNTS, 10, lambda _: 0.5, 0.01)


def class_balanced_weight(beta):
    weight = (1 - beta) / (1 - beta ** COUNTS.double())
    return weight / weight.sum() * 4


def seesaw(z, target, n, p=0.8, q=2.0):
    """Wang et al. 2021, pair by pair: S = M C, of probabilities."""
    sigma, losses = z.softmax(1), []
    for i, g in enumerate(target.tolist()):
        below = z[i, g].exp()
        for j in range(len(n)):
            mitigation = (n[j] / n[g]) ** p if n[g] > n[j] else 1.0
            compensation = (sigma[i, j] / sigma[i, g]) ** q if sigma[i, j] > sigma[i, g] else 1.0
            below = below + (mitigation * compensation * z[i, j].exp() if j != g else 0.0)
        losses.append(-(z[i, g].exp() / below).log())
    return torch.stack(losses).mean()


def published_loss(method, logits, target):
    """Each loss in plain float64 PyTorch, as its paper writes it."""
    z = logits.double()
    weight = torch.ones(4, dtype=torch.float64) if method.beta is None else class_balanced_weight(method.beta)
    gamma = method.gamma or 0.0
    if method.sigmoid:
        y = F.one_hot(target, 4).double()
        p_t = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
        return (weight[target] * ((1 - p_t) ** gamma * -p_t.log()).sum(1)).mean()
    if method.margin:
        margins = COUNTS.double() ** -0.25
        z = 30 * (z - F.one_hot(target, 4) * (0.5 * margins / margins.max()))
    n = COUNTS.double()
    if method.scale_gamma:  # Ye et al. 2020: divided by the temperatures
        z = z / (n.max() / n) ** method.scale_gamma
    if method.tau:
        z = z + method.tau * (n / n.sum()).log()
    if method.immax:
        rho = n ** (1 / 3) / (n ** (1 / 3)).mean()
        z = torch.stack([row / rho[g] for row, g in zip(z, target, strict=True)])
    if method.seesaw:
        return seesaw(z, target, n)
    p = z.softmax(1)
    p_g = p.gather(1, target[:, None]).squeeze(1)
    loss = weight[target] * (1 - p_g) ** gamma * -p_g.log()
    if method.complement_gamma:
        q = p / (1 - p_g)[:, None]
        entropy = -(q * q.log()).masked_fill(F.one_hot(target, 4).bool(), 0.0).sum(1)
        loss = loss + method.complement_gamma / 3 * entropy
    return loss.mean()


@pytest.mark.parametrize("method", methods.grid(), ids=lambda method: method.name)
def test_loss_of_every_method_is_the_published_one(method):
    training = make_training(method)
    x, target = torch.randn(12, 6), torch.arange(12) % 4
    logits = training.model(x)
    training.start_epoch(0)
    loss = training.step(x, target)
    torch.testing.assert_close(loss.double(), published_loss(method, logits, target), rtol=1e-5, atol=1e-6)
    assert {group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups} == {0.5}


def test_the_grid_has_every_loss_of_the_papers_once():
    names = [method.name for method in methods.grid()]
    assert len(names) == len(set(names)) == 37
    assert names[0] == "cross-entropy"
    assert sum("class-balanced sigmoid focal" in name for name in names) == 12


def test_ldam_has_cosines_and_weights_from_80_percent_of_the_epochs_on():
    training = make_training(methods.LDAM_DRW)
    x, target = torch.randn(12, 6), torch.arange(12) % 4
    assert training.model(3 * x).abs().max() <= 1
    torch.testing.assert_close(training.model(3 * x), training.model(x))
    for epoch, weight in ((7, torch.ones(4)), (8, class_balanced_weight(0.9999))):
        training.start_epoch(epoch)
        z = training.model(x).double()
        margins = COUNTS.double() ** -0.25
        z = 30 * (z - F.one_hot(target, 4) * (0.5 * margins / margins.max()))
        expected = F.cross_entropy(z, target, weight.double())
        torch.testing.assert_close(training.loss(training.model(x), target).double(), expected, rtol=1e-5, atol=1e-6)


def test_label_over_smoothing_retrains_the_head_alone_from_90_percent_of_the_epochs_on():
    torch.manual_seed(5)
    model = methods.Classifier(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    training = methods.MethodTraining(methods.LABEL_OVER_SMOOTHING, model, COUNTS, 10, lambda _: 0.5, 0.01)
    x, target = torch.randn(12, 6), torch.arange(12) % 4
    for epoch, smoothing, moves in ((8, 0.0, True), (9, 0.98, False)):
        training.start_epoch(epoch)
        before = [p.clone() for p in model.parameters()]
        expected = F.cross_entropy(model(x).double(), target, label_smoothing=smoothing)
        torch.testing.assert_close(training.step(x, target).double(), expected, rtol=1e-5, atol=1e-6)
        moved = [not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
        assert moved == [moves, moves, True, True]


def test_sigmoid_methods_start_at_one_over_c_without_bias_decay():
    training = make_training(methods.SIGMOID)
    assert torch.allclose(training.model.head.bias.sigmoid(), torch.full((4,), 0.25))
    decay = {id(p): g["weight_decay"] for g in training.optimizers[0].param_groups for p in g["params"]}
    assert decay[id(training.model.head.bias)] == 0
    assert decay[id(training.model.head.weight)] == 0.01
    assert make_training(methods.CROSS_ENTROPY).model.head.bias.ne(training.model.head.bias).all()


def test_complement_objective_training_takes_two_steps():
    once, twice = make_training(methods.CROSS_ENTROPY), make_training(methods.COMPLEMENT_OBJECTIVE)
    x, target = torch.randn(12, 6), torch.arange(12) % 4
    for training in (once, twice):
        training.start_epoch(0)
        training.step(x, target)
    assert len(twice.optimizers) == 2
    assert not torch.equal(once.model.head.weight, twice.model.head.weight)


def test_methods_of_a_seed_have_the_same_start_data_and_order(few_methods, monkeypatch):
    seen = {}

    class Spy(methods.MethodTraining):
        def step(self, images, labels):
            seen.setdefault(self.method, [self.model.head.weight.detach().clone()]).append(images)
            return super().step(images, labels)

    monkeypatch.setattr(digits, "MethodTraining", Spy)
    for method in few_methods:
        digits.train(digits.Task(50.0, 3, method, 1))
    first, *others = seen.values()
    assert len(first) > 3
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_test_images_do_not_depend_on_the_imbalance_factor():
    a, b = demo_digits.load_split(10.0, 4), demo_digits.load_split(50.0, 4)
    assert torch.equal(a.test_images, b.test_images)
    assert b.train_labels.numel() < a.train_labels.numel()


@pytest.mark.usefixtures("few_methods")
def test_outcomes_do_not_depend_on_processes_or_threads():
    plan = digits.Plan((50.0,), seeds=2, epochs=1, jobs=1)
    threads = torch.get_num_threads()
    alone = digits.run(plan, lambda _: None)
    assert torch.get_num_threads() == threads
    assert digits.run(plan._replace(jobs=2), lambda _: None) == alone
    assert list(alone) == plan.tasks()


@pytest.mark.usefixtures("few_methods")
def test_a_network_learns_far_beyond_chance():
    outcome = digits.train(digits.Task(10.0, 0, methods.CROSS_ENTROPY, 12))
    assert outcome.train > 0.9
    assert outcome.balanced > 0.7


def test_an_interrupt_keeps_a_row_of_every_finished_network(few_methods):
    plan = digits.Plan((50.0,), seeds=2, epochs=1, jobs=1)
    left, _ = interrupted_after(2, functools.partial(digits.run, plan))
    assert left.done == "2 of 6 networks"
    assert [row["method"] for row in left.rows] == [method.name for method in few_methods[:2]]
    with pool.prepared_process():
        expected = digits.train(plan.tasks()[1])
    assert left.rows[1].items() >= expected._asdict().items()


def outcome(balanced, few):
    return digits.Outcome(balanced, few, 0.9, 0.95, 1.0)


def test_verdicts_follow_the_corrected_test(few_methods):
    """One method better in every seed by about as much, one all over the place; few-shot the other way round."""
    plan = digits.Plan((10.0, 50.0), seeds=6, epochs=1)
    outcomes = {}
    for task in plan.tasks():
        s = task.seed
        base = 0.7 + 0.02 * s
        balanced, few = {
            few_methods[0].name: (base, base),
            few_methods[1].name: (base + 0.05 + 0.001 * s, base - 0.05 - 0.002 * s),
            few_methods[2].name: (base + 0.05 * (-1) ** s, base + 0.001 * (-1) ** (s // 2)),
        }[task.method.name]
        outcomes[task] = outcome(balanced, few)
    rows = digits.summarize(plan, outcomes)
    assert len(rows) == 6
    by_name = {row["method"]: row for row in rows[:3]}
    control, better, same = (by_name[method.name] for method in few_methods)
    assert (control["balanced_verdict"], control["balanced_p"], control["balanced_p_holm"]) == ("", None, None)
    assert (better["balanced_verdict"], better["few_verdict"]) == ("better", "worse")
    assert same["balanced_verdict"] == same["few_verdict"] == "no difference shown"
    assert better["balanced_difference"] == pytest.approx(0.0525)
    assert better["balanced_p_holm"] == pytest.approx(4 * better["balanced_p"])  # 2 methods at 2 factors
    assert better["balanced_by_seed"].split()[1] == "0.7710"
    assert [row["train_images"] for row in rows[::3]] == [519, 353]


def test_verdict_needs_a_p_value_below_the_level():
    assert comparison.verdict(0.1, 0.049) == "better"
    assert comparison.verdict(-0.1, 0.049) == "worse"
    assert comparison.verdict(0.1, 0.05) == "no difference shown"
    assert comparison.verdict(0.1, math.nan) == ""


def test_quick_command_writes_every_row_and_the_picture(tmp_path, capsys):
    main(["experiment", "digits", "--quick", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert "100%" in printed.err
    assert "Holm's correction for all 36 comparisons" in printed.out
    assert (tmp_path / "experiment_digits.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "experiment_digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [method.name for method in methods.grid()]
    for row in rows:
        assert row["imbalance_factor"] == "50"
        assert 0 <= float(row["balanced_mean"]) <= 1
        assert len(row["few_by_seed"].split()) == 2
        for fact in ("longtail", "torch", "python", "cpu", "commit", "date"):
            assert row[fact], fact
        assert row["method"] in printed.out


@pytest.mark.usefixtures("few_methods")
def test_a_single_seed_is_reported_without_a_test(tmp_path, capsys):
    main(["experiment", "digits", "--quick", "--seeds", "1", "--epochs", "1", "--jobs", "1", "-o", str(tmp_path)])
    assert "nan" not in capsys.readouterr().out
    assert ",nan," not in (tmp_path / "experiment_digits.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "required: {digits,tokens,cifar,icd,debtags,places,growth,redraw}"),
        ("digits --seeds 0", "'0' is not a whole number"),
        ("digits --imbalance-factor 1000", "imbalance_factor is 1000, expected at most 12"),
        ("digits --imbalance-factor 1e308", "imbalance_factor is 1e+308, expected at most 12"),
        ("tokens --seed 9223372036854775808", "'9223372036854775808' is not a whole number from 0 to"),
        ("digits --output file", "'file' is not a folder"),
        ("tokens --output file/new", "'file' is not a folder"),
        ("mnist", "invalid choice: 'mnist'"),
    ],
)
def test_bad_options_are_explained_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["experiment", *options.split()])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", ["scipy", "sklearn", "rich", "matplotlib"])
def test_a_missing_package_names_the_install_command(name, tmp_path, monkeypatch, capsys):
    found = output.importlib.util.find_spec
    hide = functools.partial(lambda hidden, module, *rest: None if module == hidden else found(module, *rest), name)
    monkeypatch.setattr(output.importlib.util, "find_spec", hide)
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "digits", "--output", str(tmp_path)])
    assert stop.value.code == 1
    package = "scikit-learn" if name == "sklearn" else name
    assert capsys.readouterr().err == f"longtail experiment digits: needs {package}: pip install {package}\n"
