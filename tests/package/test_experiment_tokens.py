"""The tokens experiment: a deterministic corpus, equal losses for equal objectives, and perplexities that add up."""

from __future__ import annotations

import csv
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import longtail
from longtail.__main__ import main
from longtail.experiments import output, tokens, tokens_data, tokens_model
from longtail.experiments.tokens_data import UNKNOWN, build_vocabulary, load_corpus, tokenize


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors, and a machine that may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus():
    """Text over 40 tokens with a long tail, some of it unknown; a token says a lot about the next one."""
    generator = torch.Generator().manual_seed(2)
    follow = torch.multinomial(1 / torch.arange(1, 41).float(), 5500, True, generator=generator)
    for i in range(1, 5500, 2):
        follow[i] = (3 * follow[i - 1] + 1) % 40
    train, held_out = follow.split([4000, 1500])
    return tokens_data.Corpus([UNKNOWN, *map(str, range(1, 40))], train, held_out, 1, 1, "digest")


def write_files(folder, count=40):
    for i in range(count):
        words = " ".join(f"word{j}" for j in range(i % 7 + 2))
        (folder / f"module{i:02}.py").write_text(f"def f{i}():\n    return '{words}'\n")


def test_tokens_are_words_numbers_punctuation_and_indents():
    text = 'def f(x):\n    if x >= 10.5:\n\n        return  \'naïve_1\'\n"""doc"""\t# end'
    assert tokenize(text) == [
        *("def", "f", "(", "x", ")", ":", "\n    ", "if", "x", ">", "=", "10", ".", "5", ":", "\n"),
        *("\n        ", "return", "  ", "'", "naïve_1", "'", "\n", '"""', "doc", '"""', "\t", "#", "end"),
    ]


def test_nothing_but_single_spaces_is_left_out():
    for path in tokens_data.source_files(tokens_data.standard_library())[::60]:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert "".join(tokenize(text)).replace(" ", "") == text.replace(" ", "")


def test_vocabulary_is_the_most_frequent_tokens_ties_in_order():
    text = ["b", "a", "b", "c", "d", "c", "a", "e"]
    assert build_vocabulary(text, 5) == [UNKNOWN, "a", "b", "c", "d"]
    assert build_vocabulary(reversed(text), 5) == build_vocabulary(text, 5)
    with pytest.raises(ValueError, match="5 different tokens, expected at least 6"):
        build_vocabulary(text, 7)
    with pytest.raises(ValueError, match="1 entries, expected at least 2"):
        build_vocabulary(text, 1)


def test_corpus_is_the_same_every_time_and_holds_whole_files_out(tmp_path):
    write_files(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("unseen = 1")
    first, again = load_corpus(30, tmp_path), load_corpus(30, tmp_path)
    assert first.vocabulary == again.vocabulary
    assert torch.equal(first.train, again.train)
    assert first.digest == again.digest
    assert first.train_files + first.held_out_files == 40
    assert first.held_out_files > 0
    assert "unseen" not in first.vocabulary
    counts = first.train.bincount(minlength=30)[1:]
    assert (counts.diff() <= 0).all()
    assert first.coverage(first.train) == pytest.approx(1 - (first.train == 0).float().mean().item())
    # The name of a function is in no other file, and the vocabulary knows the training files alone.
    held_out_names = {f"f{i}" for i in range(40)} - {*load_corpus(49, tmp_path).vocabulary}
    assert len(held_out_names) == first.held_out_files
    (tmp_path / "module00.py").write_text("changed")
    assert load_corpus(30, tmp_path).digest != first.digest


def test_too_little_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no Python sources under"):
        load_corpus(30, tmp_path)
    (tmp_path / "only.py").write_text("x = 1")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ValueError, match="too few to hold some out"):
        load_corpus(2, tmp_path)
    write_files(tmp_path)
    with pytest.raises(ValueError, match="expected at least 4999 for the vocabulary"):
        load_corpus(5000, tmp_path)


def test_equal_objectives_have_equal_losses_at_every_step(corpus):
    learners = tokens.train_together(corpus, 6, 0, lambda _: None)
    assert [len(learner.losses) for learner in learners] == [6, 6, 6]
    assert learners[0].losses[0] != learners[0].losses[1]
    for learner in learners:
        assert all(tokens.loss_difference(learners[0], learner, step) < 1e-5 for step in range(6))
        assert learner.apart.gradient < 1e-5
        assert learner.losses[5] < learner.losses[0]


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_unequal_losses_stop_the_run(wrong, corpus, monkeypatch, tmp_path, capsys):
    correct = tokens_model.cross_entropy
    monkeypatch.setattr(tokens_model, "cross_entropy", lambda *args, **options: correct(*args, **options) * wrong)
    with pytest.raises(tokens.UnequalLosses, match=r"longtail\.cross_entropy: the loss at the weights of step 1 is"):
        tokens.train_together(corpus, 2, 0, lambda _: None)
    monkeypatch.setattr(tokens_data, "load_corpus", lambda *_, **__: corpus)
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "tokens", "--quick", "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "nothing written: longtail.cross_entropy: the loss" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_gradient_stops_the_run(corpus, monkeypatch):
    """The right loss, with 1 % too much gradient in a single class."""
    correct = tokens_model.cross_entropy

    def wrong(logits, target, **options):
        seen = logits.clone()
        seen.register_hook(lambda grad: grad * (1 + 0.01 * (torch.arange(40) == 3)))
        return correct(seen, target, **options)

    monkeypatch.setattr(tokens_model, "cross_entropy", wrong)
    with pytest.raises(tokens.UnequalLosses, match=r"the gradient at the weights of step 1 is"):
        tokens.train_together(corpus, 2, 0, lambda _: None)


def test_a_model_that_takes_another_path_early_stops_the_run(corpus, monkeypatch):
    learners = iter(range(3))
    build = tokens.Learner.__init__

    def other_rate(self, *arguments):
        build(self, *arguments)
        if next(learners) == 2:
            self.optimizer.param_groups[0]["eps"] = 1.0

    monkeypatch.setattr(tokens.Learner, "__init__", other_rate)
    with pytest.raises(tokens.UnequalLosses, match=r"linear_cross_entropy: the loss of step 2 is"):
        tokens.train_together(corpus, 3, 0, lambda _: None)


def test_every_objective_trains_and_starts_alike(corpus):
    learners = list(tokens.train_variants(corpus, 12, 0, lambda _: None))
    assert len({learner.objective.name for learner in learners}) == len(learners) == 5
    for learner in learners:
        assert learner.losses[-1] < 0.95 * learner.losses[0]
    fresh = [tokens.Learner(learner.objective, corpus, 1, 0).model.embedding.weight for learner in learners]
    assert all(torch.equal(fresh[0], weight) for weight in fresh)


def test_variants_are_their_formulas(corpus):
    counts = longtail.class_counts(corpus.train, 40)
    hidden, weight = torch.randn(10, tokens_model.WIDTH), torch.randn(40, tokens_model.WIDTH) / 8
    target = torch.arange(10) + 1
    by_name = {objective.name: objective for objective in tokens_model.variants(counts)}
    logits = hidden @ weight.T
    prior = (counts / counts.sum()).log()
    adjusted = by_name["logit adjustment, tau 1"]
    torch.testing.assert_close(adjusted.loss(hidden, weight, target), F.cross_entropy(logits + prior, target))
    torch.testing.assert_close(adjusted.prior, prior)
    effective = longtail.effective_number_weight(counts, 0.9)
    expected = F.cross_entropy(logits, target, effective)
    torch.testing.assert_close(by_name["class-balanced softmax, beta 0.9"].loss(hidden, weight, target), expected)
    focal = longtail.focal_loss(logits, target, gamma=1.0)
    torch.testing.assert_close(by_name["softmax focal, gamma 1"].loss(hidden, weight, target), focal)


@pytest.mark.parametrize("with_prior", [False, True])
def test_perplexity_and_accuracy_by_group(corpus, with_prior, monkeypatch):
    monkeypatch.setattr(tokens, "HEAD_RANK", 5)
    monkeypatch.setattr(tokens, "MID_RANK", 15)
    model = tokens_model.LanguageModel(40, 0)
    prior = torch.randn(40) if with_prior else None
    found = tokens.evaluate(model, corpus, prior, sequences=16)
    starts = torch.linspace(0, 1500 - 65, 16).long()
    windows = corpus.held_out[starts[:, None] + torch.arange(65)]
    target = windows[:, 1:].flatten()
    logits = (model(windows[:, :-1]) @ model.embedding.weight.T).double() + (0 if prior is None else prior)
    nll = F.cross_entropy(logits, target, reduction="none")
    hit = (logits.argmax(1) == target).double()
    groups = {"overall": target > 0, "head": (target > 0) & (target <= 5), "mid": (target > 5) & (target <= 15)}
    groups["tail"] = target > 15
    for name, mask in groups.items():
        assert found[name].tokens == mask.sum() > 0
        assert found[name].perplexity == pytest.approx(nll[mask].mean().exp().item(), rel=1e-4)
        assert found[name].accuracy == pytest.approx(hit[mask].mean().item())


def test_learning_rate_rises_then_falls(corpus):
    learner = tokens.Learner(tokens_model.cross_entropies()[0], corpus, 20, 0)
    rates = []
    for window in tokens.batches(corpus.train, 20, 0):
        rates.append(learner.optimizer.param_groups[0]["lr"] / tokens.LEARNING_RATE)
        learner.step(window)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[-1] == pytest.approx(1 / 18)
    weight = learner.model.embedding.weight.detach().clone()
    learner.measure_memory(window)
    assert torch.equal(learner.model.embedding.weight, weight)
    assert len(learner.losses) == 20


def test_an_interrupt_keeps_the_rows_of_the_models_that_were_finished(corpus):
    def stop(status):
        if status.endswith("beta 0.9"):
            raise KeyboardInterrupt

    with pytest.raises(output.Interrupted) as caught:
        tokens.run(corpus, 1, 0, stop, sequences=4)
    names = ["cross-entropy"] * 3 + ["logit adjustment, tau 1"] * 2
    assert [row["objective"] for row in caught.value.rows] == names
    assert caught.value.done.startswith("5 rows")


def test_batches_are_windows_of_the_text(corpus):
    first, again = (list(tokens.batches(corpus.train, 3, 7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    text = corpus.train.unfold(0, tokens.LENGTH + 1, 1)
    for window in first[0]:
        assert (text == window).all(1).any()


def test_quick_command_writes_every_row_and_the_picture(tmp_path, capsys):
    main(["experiment", "tokens", "--quick", "--steps", "3", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert "100%" in printed.err
    for text in ("F.cross_entropy", "longtail.linear_cross_entropy", "tokens/s", "log-priors added", "held-out"):
        assert text in printed.out
    assert (tmp_path / "experiment_tokens.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "experiment_tokens.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9  # logit adjustment is evaluated both ways
    plain, fused, linear = rows[:3]
    assert float(plain["any_loss_difference"]) == float(plain["gradient_difference"]) == 0
    for row in (fused, linear):
        for name in ("loss_difference", "gradient_difference", "early_loss_difference", "any_loss_difference"):
            assert float(row[name]) < 1e-5
        assert float(row["tokens_per_second"]) == pytest.approx(1024e3 / float(row["step_ms"]), rel=1e-4)
        assert float(row["perplexity_overall"]) == pytest.approx(float(plain["perplexity_overall"]), rel=1e-3)
    for row in rows:
        assert row["vocabulary"] == "1024"
        for fact in ("longtail", "torch", "python", "cpu", "commit", "date", "corpus", "train_coverage"):
            assert row[fact], fact
