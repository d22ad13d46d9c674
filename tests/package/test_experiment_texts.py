"""The experiments on texts: their model and optimizer, equal terms for every method, scores by their definitions."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from sklearn import metrics

import small_texts
from longtail.experiments import methods
from longtail.experiments.texts import corpus, label_methods, model, one_label, run, scores, several_labels, training

TRAINED = {"icd": one_label, "debtags": several_labels, "places": one_label}


@pytest.fixture(params=list(TRAINED))
def plan(request, monkeypatch, tmp_path):
    """A small run of one epoch of several batches."""
    file = small_texts.install(request.param, monkeypatch, tmp_path, batch_size=16)
    return run.make_plan(request.param, seeds=2, epochs=1, jobs=1, file=file)


def test_the_vector_of_a_text_is_the_mean_of_its_n_grams():
    made = model.make_model(20, 4, 3, seed=5)
    table = made.features.embedding.weight
    vectors = made.features(
        (torch.tensor([3, 7, 7, 19], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32))
    )
    expected = torch.stack([table[[3, 7]].mean(0), torch.zeros(4), table[[7, 19]].mean(0)])
    torch.testing.assert_close(vectors, expected)
    empty = torch.zeros(2, dtype=torch.int32)
    made((empty[:0], empty)).sum().backward()
    assert made.head.bias.grad.tolist() == [2, 2, 2]


def test_models_of_a_seed_are_the_same_and_leave_other_randomness_alone():
    state = torch.get_rng_state()
    first, second, other = (model.make_model(50, 16, 3, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert first["features.embedding.weight"].std().item() == pytest.approx(16**-0.5, rel=0.1)


def test_both_parts_are_adam_and_follow_the_schedule():
    """A dense twin by torch.optim.Adam: the same, up to epsilon, while batches touch every n-gram."""
    # No weight decay: nobody asks for it.
    made = model.make_model(3, 4, 2, seed=0)
    twin = copy.deepcopy(made)
    twin.features.embedding.sparse = False
    pairs = [(made, model.adam_of(made)([{"params": [*made.parameters()]}]))]
    pairs.append((twin, torch.optim.Adam(twin.parameters(), lr=1.0)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 / (1 + step)) for _, optimizer in pairs]
    for _ in range(4):
        ids, target = torch.randperm(3).int().repeat(2), torch.randint(2, (3,))
        for (each, optimizer), schedule in zip(pairs, schedules, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(each((ids, torch.tensor([0, 2, 4]).int())), target).backward()
            optimizer.step()
            schedule.step()
    for (name, found), expected in zip(made.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4, msg=name)


def test_n_grams_that_a_batch_lacks_stay_where_they_are():
    made = model.make_model(4, 4, 2, seed=0)
    optimizer = model.adam_of(made)([{"params": [*made.parameters()]}])
    before = made.features.embedding.weight.detach().clone()
    for ids in ([0, 1], [1, 2]):
        optimizer.zero_grad()
        made((torch.tensor(ids).int(), torch.tensor([0]).int()))[0, 0].backward()
        optimizer.step()
        moved = (made.features.embedding.weight != before).any(1)
        assert moved.nonzero().flatten().tolist() == ids
        before = made.features.embedding.weight.detach().clone()


def test_the_learning_rate_falls_in_a_line_to_nothing():
    task = training.Task("icd", 0, None, epochs=3)
    steps = training.steps_of(task, 1000)
    assert steps == 3 * 4
    rate = training.linear_decay(0.4, steps)
    assert [rate(step) for step in (0, 3, 12, 13)] == pytest.approx([0.4, 0.3, 0, 0])


def test_a_training_follows_the_line_to_its_last_step(plan, monkeypatch):
    seen, step = [], model.SparseAndDenseAdam.step

    def recorded(self, *given):
        seen.append({group["lr"] for part in self.parts for group in part.param_groups})
        return step(self, *given)

    monkeypatch.setattr(model.SparseAndDenseAdam, "step", recorded)
    task = plan.task(0, plan.methods[0])._replace(epochs=2)
    TRAINED[plan.experiment].train(task)
    steps = training.steps_of(task, training.cut(task).split.train.numel())
    expected = [task.setting.learning_rate * (1 - i / steps) for i in range(steps)]
    assert [rate for (rate,) in seen] == pytest.approx(expected)


def by_bins(confidence, correct, bins=15):
    """Guo et al. 2017, eq. 3: B_m has the samples whose confidence is in ((m - 1) / M, m / M]."""
    error, n = 0.0, len(confidence)
    for m in range(1, bins + 1):
        members = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if members:
            accuracy = sum(correct[i] for i in members) / len(members)
            error += len(members) / n * abs(accuracy - sum(confidence[i] for i in members) / len(members))
    return error


@pytest.mark.parametrize("n", [1, 7, 400])
def test_calibration_error_is_that_of_guo_et_al(n):
    confidence = torch.rand(n).pow(0.3)
    correct = torch.rand(n) < confidence**3
    expected = by_bins(confidence.double().tolist(), correct.tolist())
    assert scores.calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-9)


def test_calibration_error_at_the_ends():
    ends = torch.tensor([1.0, 1.0, 0.0])
    assert scores.calibration_error(ends, torch.tensor([True, False, False])) == pytest.approx(1 / 3)
    assert math.isnan(scores.calibration_error(ends[:0], ends[:0].bool()))


def test_octaves_are_powers_of_two():
    counts = torch.tensor([1, 1, 2, 3, 4, 7, 8, 33, 0])
    per_class = torch.tensor([0.0, 1.0, 0.2, 0.4, 0.5, math.nan, math.nan, 0.7, 0.9], dtype=torch.float64)
    assert scores.by_octave(per_class, counts) == pytest.approx({1: 0.5, 2: 0.3, 4: 0.5, 32: 0.7})


class Rows:
    """Texts whose bags are their own numbers."""

    def bags(self, rows):
        return rows


def given(logits, target, counts, paths=None):
    """A cut whose second half is tested, and a model that says what it is told of each text."""
    classes = [f"c{i}" for i in range(logits.shape[1])]
    data = training.Data(corpus.Corpus([""] * len(logits), target, classes, [], paths, ""), Rows())
    train, test = torch.arange(len(logits)).chunk(2)
    return training.Cut(data, corpus.Split(train, test), counts), lambda rows: logits[rows]


COUNTS = torch.tensor([300, 101, 100, 20, 19, 5])
PATHS = [("1", "a", "c0"), ("1", "a", "c1"), ("1", "b", "c2"), ("2", "d", "c3"), ("2", "d", "c4"), ("2", "e", "c5")]
METHODS = {
    "plain": (methods.CROSS_ENTROPY, lambda z: z.softmax(1)),
    "logit adjustment": (methods.LOGIT_ADJUSTMENT, lambda z: z.softmax(1)),
    "post-hoc": (methods.POST_HOC, lambda z: (z - (COUNTS / COUNTS.sum()).log()).softmax(1)),
    "sigmoid": (methods.SIGMOID, lambda z: z.sigmoid()),
    "cosines": (methods.LDAM_DRW, lambda z: (30 * z).softmax(1)),
}


@pytest.mark.parametrize("name", METHODS)
def test_scores_of_one_label_by_hand(name):
    method, probabilities = METHODS[name]
    logits, target = torch.randn(400, 6, dtype=torch.float64), torch.randint(5, (400,))
    logits[torch.arange(400), target] += 0.7
    of_seed, told = given(logits, target, COUNTS, PATHS)
    outcome = one_label.test(of_seed, method, told)
    confidence, decision = probabilities(logits).max(1)
    correct, tested = decision == target, range(200, 400)
    by_class = [[correct[i].item() for i in tested if target[i] == c] for c in range(5)]
    accuracy = [sum(each) / len(each) for each in by_class]
    mistakes = [i for i in tested if not correct[i]]
    heights = [next(h for h in range(4) if PATHS[decision[i]][: 3 - h] == PATHS[target[i]][: 3 - h]) for i in mistakes]
    expected = {
        "balanced": sum(accuracy) / 5,
        "many": sum(accuracy[:2]) / 2,
        "medium": sum(accuracy[2:4]) / 2,
        "few": accuracy[4],
        "overall": correct[200:].double().mean().item(),
        "calibration_error": by_bins(confidence[200:].tolist(), correct[200:].tolist()),
        "train": correct[:200].double().mean().item(),
        "mistake_height": sum(heights) / len(heights),
    }
    assert outcome.figures == pytest.approx(expected, rel=1e-6)
    assert outcome.by_count == pytest.approx({256: accuracy[0], 64: sum(accuracy[1:3]) / 2, 16: sum(accuracy[3:]) / 2})


def test_only_the_post_hoc_adjustment_changes_decisions():
    """Of cosines, sigmoids and logits the largest is decided for: what is written down may not depend on the form."""
    logits, target = torch.randn(200, 6), torch.randint(6, (200,))
    of_seed, told = given(logits, target, COUNTS)
    found = {name: one_label.test(of_seed, method, told).figures["overall"] for name, (method, _) in METHODS.items()}
    assert found.pop("post-hoc") != found["plain"]
    assert len(set(found.values())) == 1


def test_without_mistakes_there_is_no_height():
    assert math.isnan(one_label.mistake_height(PATHS, torch.tensor([], dtype=torch.int64), torch.tensor([])))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_scores_of_several_labels_are_those_of_scikit_learn(sigmoid):
    logits, target = torch.randn(300, 6), torch.rand(300, 6) < 0.2
    target[:, 5] = False
    logits += target
    logits[:, 1] = logits[:, 1].round()  # ties
    of_seed, told = given(logits, target, COUNTS)
    outcome = several_labels.test(of_seed, label_methods.BINARY._replace(sigmoid=sigmoid), told)
    y, z = target[150:].numpy(), logits[150:].numpy()
    precision = [metrics.average_precision_score(y[:, c], z[:, c]) for c in range(5)]
    expected = {
        "mean_average_precision": sum(precision) / 5,
        "many": sum(precision[:2]) / 2,
        "medium": sum(precision[2:4]) / 2,
        "few": precision[4],
        "f1": metrics.f1_score(y, z > 0, average="micro"),
        "macro_f1": metrics.f1_score(y[:, :5], z[:, :5] > 0, average="macro"),
        "calibration_error": by_bins(
            torch.sigmoid(logits[150:].double()).flatten().tolist(), target[150:].flatten().tolist()
        ),
    }
    if not sigmoid:
        expected["calibration_error"] = math.nan
    assert outcome.figures == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert outcome.by_count == pytest.approx(
        {256: precision[0], 64: sum(precision[1:3]) / 2, 16: sum(precision[3:5]) / 2}
    )


def test_methods_of_a_seed_have_the_same_start_data_and_order_and_train_on_no_test_text(plan, monkeypatch):
    kind, seen = TRAINED[plan.experiment], {}
    monkeypatch.setattr(training.HashedTexts, "bags", spy_on(training.HashedTexts.bags, lambda rows: read.append(rows)))
    made = kind.make_model
    monkeypatch.setattr(kind, "make_model", lambda *given: starts.append(copy.deepcopy(made(*given))) or made(*given))
    of_seed = training.cut(plan.task(1, plan.methods[0]))
    epoch = -(-of_seed.split.train.numel() // 16)
    for method in plan.methods:
        read, starts = [], []
        outcome = kind.train(plan.task(1, method))
        assert all(0 <= x <= 1 or x != x for name, x in outcome.figures.items() if name != "mistake_height"), (
            method.name
        )
        assert torch.equal(torch.cat(read[:epoch]).sort().values, of_seed.split.train)
        assert not set(of_seed.split.train.tolist()) & set(read[epoch].tolist()), "then it is tested"
        seen[method.name] = [*starts[0].state_dict().values(), *read[:epoch]]
    first, *others = seen.values()
    assert len(seen) == len(plan.methods)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(training.cut(plan.task(0, plan.methods[0])).split.test, of_seed.split.test)


def spy_on(function, told):
    @functools.wraps(function)
    def spied(self, rows):
        told(rows)
        return function(self, rows)

    return spied


def test_counts_are_of_the_training_texts(plan):
    of_seed = training.cut(plan.task(0, plan.methods[0]))
    target = of_seed.data.corpus.target[of_seed.split.train]
    of_labels = target if target.dim() == 2 else F.one_hot(target, of_seed.counts.numel())
    assert torch.equal(of_seed.counts, of_labels.sum(0))
    assert of_seed.counts.min() >= 1
    assert torch.equal(of_seed.test_target, of_seed.data.corpus.target[of_seed.split.test])


@pytest.mark.parametrize("name", list(TRAINED))
def test_a_model_learns_far_beyond_chance(name, monkeypatch, tmp_path):
    file = small_texts.install(name, monkeypatch, tmp_path, batch_size=16)
    plan = run.make_plan(name, epochs=12, file=file)
    figures = TRAINED[name].train(plan.task(0, TRAINED[name].CONTROL)).figures
    assert figures[TRAINED[name].TESTED[0]] > 0.6
    assert figures["calibration_error"] < 0.2


@pytest.mark.parametrize("several", [False, True])
def test_a_network_is_the_same_when_it_is_trained_again(several, monkeypatch, tmp_path):
    name = "debtags" if several else "icd"
    file = small_texts.install(name, monkeypatch, tmp_path, batch_size=16)
    plan = run.make_plan(name, epochs=2, file=file)
    first, second, other = (TRAINED[name].train(plan.task(seed, plan.methods[3])) for seed in (0, 0, 1))
    assert first == second != other
