"""The data of the experiments on texts: what each package's stand-in becomes, and that no test text is trained on."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import small_texts
from longtail.experiments.texts import corpus, debtags, features, icd, places


def texts_of(found, label):
    row = found.classes.index(label)
    chosen = found.target[:, row] if found.several_labels else found.target == row
    return [found.texts[i] for i in chosen.nonzero().flatten().tolist()]


def random_corpus(seed, several):
    """Groups of one to four texts, of classes whose sizes fall."""
    chance, rows = random.Random(seed), []
    for group in range(60):
        labels = [f"c{min(int(chance.expovariate(0.4)), 9)}" for _ in range(3)]
        rows += [(f"text {group} {i}", labels if several else labels[0], f"g{group}") for i in range(1 + group % 4)]
    return corpus.several_labels(rows, "random") if several else corpus.one_label(rows, "random", None)


def test_one_label_takes_equal_texts_of_a_class_once():
    rows = [("a", "y", "g1"), ("b", "x", "g2"), ("a", "y", "g1"), ("a", "x", "g3")]
    found = corpus.one_label(rows, "here", lambda label: ["top", label.upper()])
    assert found.classes == ["x", "y"]
    assert list(zip(found.texts, found.target.tolist(), found.groups, strict=True)) == [
        ("a", 1, "g1"),
        ("b", 0, "g2"),
        ("a", 0, "g3"),
    ]
    assert found.paths == [("top", "X", "x"), ("top", "Y", "y")]
    assert not found.several_labels
    assert re.fullmatch("here, [0-9a-f]{16}", found.source)


def test_several_labels_are_a_table():
    found = corpus.several_labels([("a", ["y", "x"], "g"), ("b", ["z"], "h")], "here")
    assert found.classes == ["x", "y", "z"]
    assert found.target.tolist() == [[True, True, False], [False, False, True]]
    assert (found.texts, found.groups, found.paths) == (["a", "b"], ["g", "h"], None)


def test_the_digest_tells_texts_and_labels_apart():
    rows = [("a", "x", "g"), ("b", "y", "g")]
    other_text, other_label = [("a", "x", "g"), ("c", "y", "g")], [("a", "x", "g"), ("b", "z", "g")]
    sources = {corpus.one_label(each, "s", None).source for each in (rows, other_text, other_label)}
    assert len(sources) == 3
    alike = [corpus.several_labels([(t, [c], g) for t, c, g in each], "s").source for each in (rows, other_label)]
    assert len(set(alike)) == 2
    assert corpus.digest(["\udc80"]), "names that are no UTF-8"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_split_keeps_groups_whole_and_every_class_trained_on(seed, several):
    data = random_corpus(seed, several)
    found = corpus.split(data, 0.3, seed)
    train, test = found.train.tolist(), found.test.tolist()
    assert sorted(train + test) == list(range(len(data.texts)))
    assert not {data.groups[i] for i in train} & {data.groups[i] for i in test}
    target = data.target.float() if several else torch.nn.functional.one_hot(data.target, len(data.classes)).float()
    assert target[train].sum(0).min() >= 1
    assert 0.15 < len(test) / len(data.texts) < 0.4
    again, other = corpus.split(data, 0.3, seed), corpus.split(data, 0.3, seed + 100)
    assert torch.equal(again.test, found.test)
    assert not torch.equal(other.test, found.test)


def test_every_class_of_two_groups_is_tested_and_one_of_a_single_group_is_not():
    sizes = {"one": 1, "two": 2, "ten": 10}
    rows = [(f"{c} {i} {j}", c, f"{c}{i}") for c, size in sizes.items() for i in range(size) for j in range(2)]
    data = corpus.one_label(rows, "s", None)
    for seed in range(5):
        tested = data.target[corpus.split(data, 0.3, seed).test].tolist()
        assert [tested.count(data.classes.index(name)) for name in sizes] == [0, 2, 6]


def test_groups_are_of_a_class_where_a_text_has_one_label():
    """One name of two regions: each has a text to train on."""
    data = corpus.one_label([("a", c, g) for c in "xy" for g in "gh"] + [("b", c, "h") for c in "xy"], "s", None)
    found = corpus.split(data, 0.5, 0)
    assert set(data.target[found.train].tolist()) == {0, 1}


def test_the_only_texts_of_a_label_are_trained_on():
    rows = [(f"t{i}", ["all", f"own{i // 2}"], f"g{i // 2}") for i in range(20)]
    data = corpus.several_labels(rows, "s")
    found = corpus.split(data, 0.5, 0)
    assert found.test.numel() == 0, "each group has a label of its own"
    rows += [(f"s{i}", ["all"], f"h{i}") for i in range(20)]
    data = corpus.several_labels(rows, "s")
    found = corpus.split(data, 0.5, 0)
    assert 5 <= found.test.numel() <= 20
    assert all(data.groups[i].startswith("h") for i in found.test.tolist())


@pytest.mark.parametrize("several", [False, True])
def test_thinned_keeps_what_belongs_to_a_text(several):
    data = random_corpus(0, several)._replace(paths=None)
    data = data._replace(paths=[("top", name) for name in data.classes])
    found = corpus.thinned(data, 7)
    assert found.texts == data.texts[::7]
    assert found.groups == data.groups[::7]
    for name in data.classes:
        expected = [text for text in texts_of(data, name) if text in found.texts]
        assert expected == (texts_of(found, name) if name in found.classes else [])
    assert found.paths == [("top", name) for name in found.classes]
    assert (found.target if several else torch.nn.functional.one_hot(found.target)).any(0).all()
    assert found.source == f"{data.source}, every text of 7"


def test_diagnoses_are_categories_with_groups_by_stem_and_paths(monkeypatch, tmp_path):
    small_texts.install("icd", monkeypatch, tmp_path)
    found = icd.load()
    assert found.classes == sorted(small_texts.STEMS)
    assert not [text for text in found.texts if "encounter" in text]
    group = dict(zip(found.texts, found.groups, strict=True))
    assert group["disease A00"] == "A00"
    assert {group[text] for text in group if "A01 nought three" in text} == {"A01.03"}
    assert group["A01 also named nought three"] == "A01.03", "an inclusion note is of its code's group"
    assert len(texts_of(found, "B00")) == 1 + 4 * small_texts.STEMS["B00"]
    assert found.paths[0] == ("1", "A00-A09", "A00")
    assert found.paths[-1] == ("2", "C00-C09", "C00")


def test_places_have_all_names_once_and_regions(monkeypatch, tmp_path):
    small_texts.install("places", monkeypatch, tmp_path)
    found = places.load()
    assert found.classes == [f"XY.0{i}" for i in range(5)]
    assert found.texts[0] == "obernoughtnought oberburg 0", "a name that is given twice is taken once"
    assert found.groups == found.texts
    assert found.paths is None


PACKAGES = """Package: good
Source: wood (1.2-3)
Version: 1
Description: a game
 of several lines
Tag: use::play, role::program,
 x::rare, use::play

Package: untagged
Description: Tag: none, the word is of the description

Package: wood
Tag:
 role::program

"""


def test_packages_have_tags_and_the_groups_of_their_sources(tmp_path):
    path = tmp_path / "available"
    path.write_bytes(PACKAGES.encode() + b"Package: b\xe4d\nDescription: latin\nTag: x::rare\n")
    found = debtags.load(path)
    assert found.classes == ["role::program", "use::play", "x::rare"]
    assert found.target.int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 1]]
    assert found.groups == ["wood", "wood", "b�d"]
    assert found.texts[0].startswith("good a game")
    assert found.texts[1] == "wood "


@pytest.mark.parametrize("content", [b"", b"\0\1\2" * 100, b"Package: a\nDescription: b\n", b"\n\n\n:\n"])
def test_a_file_without_tags_is_refused(content, tmp_path):
    path = tmp_path / "available"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"available' has no package with a Tag field"):
        debtags.load(path)


def test_packages_come_from_the_command_without_a_file(monkeypatch):
    monkeypatch.setattr(debtags, "COMMAND", ("printf", "%s", PACKAGES))
    assert len(debtags.load().texts) == 2
    monkeypatch.setattr(debtags, "COMMAND", ("false",))
    with pytest.raises(
        ValueError, match=r"the output of false \(apt-get update fetches what it shows\) has no package"
    ):
        debtags.load()
    monkeypatch.setattr(debtags, "COMMAND", ("no-such-apt-cache",))
    with pytest.raises(OSError, match="no-such-apt-cache"):
        debtags.load()


WORDS = features.NGrams("word", 1, 2, 2**16)
CHARACTERS = features.NGrams("char_wb", 2, 3, 2**15)


def ngrams(text):
    """By hand: words of two characters and more and their pairs; two and three characters within padded words."""
    words = re.findall(r"\b\w\w+\b", text.lower())
    padded = [f" {word} " for word in text.lower().split()]
    pairs = {" ".join(pair) for pair in itertools.pairwise(words)}
    return {*words, *pairs}, {word[i : i + n] for word in padded for n in (2, 3) for i in range(len(word) - n + 1)}


def test_a_bag_has_every_n_gram_of_a_text_once():
    texts = ["Red red wine", "wine", "", "Wine of a RED house house"]
    hashed = features.HashedTexts(texts, [WORDS, CHARACTERS])
    assert hashed.buckets == 2**16 + 2**15
    ids, starts = hashed.bags(torch.tensor([3, 0, 2, 1]))
    assert ids.dtype == starts.dtype == torch.int32
    bags = [set(part.tolist()) for part in ids.tensor_split(starts[1:].long())]
    assert sum(map(len, bags)) == ids.numel()
    for text, bag in zip((texts[3], texts[0], texts[2], texts[1]), bags, strict=True):
        assert [len(x) for x in ngrams(text)] == [sum(i < 2**16 for i in bag), sum(i >= 2**16 for i in bag)]
    shared = [len(a & b) for a, b in zip(ngrams(texts[0]), ngrams(texts[3]), strict=True)]
    assert len(bags[0] & bags[1]) == sum(shared)
    assert bags[3] < bags[1]
    assert bags[2] == set()


def test_the_hashes_are_those_of_every_process():
    from sklearn.utils import murmurhash3_32

    ids, _ = features.HashedTexts(["red", "wine"], [WORDS]).bags(torch.tensor([1]))
    assert ids.tolist() == [abs(murmurhash3_32("wine")) % 2**16]
