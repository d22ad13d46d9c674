"""Checkpoints of the CIFAR runs: of the same run on the same images or refused, by name, before anything is trained."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import re
import zipfile

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from cifar_files import doubled, make_batches, nested, write_binary
from full_disk import full_disk
from longtail.__main__ import main
from longtail.experiments import cifar, resnet
from longtail.experiments.cifar_checkpoint import checkpoint_path, load, save
from longtail.experiments.cifar_data import Images

PLAN = cifar.Plan("cifar10", imbalance_factor=2.0, epochs=3)
LOSS = "complement-objective-training"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A network of 8 layers instead of 32, on one thread."""
    monkeypatch.setattr(cifar, "resnet", lambda num_classes: resnet.resnet(num_classes, blocks=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_images():
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(30) % 10
    return Images(pixels[:20], labels[:20], pixels[20:], labels[20:])


@pytest.fixture
def path(tmp_path):
    return checkpoint_path(PLAN, LOSS, tmp_path)


@pytest.fixture
def state():
    """Of a run after one epoch, with optimizers of two kinds of entries."""
    run = cifar.Run(PLAN, LOSS, make_images())
    run.epoch()
    return copy.deepcopy(run.state())


def refused(path, reason, plan=PLAN, loss=LOSS, images=None):
    with pytest.raises(ValueError, match=reason) as caught:
        load(cifar.Run(plan, loss, images or make_images()), path)
    said = str(caught.value)
    assert said.startswith(f"{str(path)!r} is no checkpoint of this run (")
    assert said.isprintable()
    assert len(said) < 1000


def test_another_runs_checkpoint_is_refused(state, path):
    torch.save(state, path)
    refused(path, "it is of another run: loss is 'complement-objective-training', expected 'ldam-drw'", loss="ldam-drw")
    refused(path, "it is of another run: epochs is 3, expected 2", PLAN._replace(epochs=2))
    refused(path, "it is of another run: seed is 0, expected 7", PLAN._replace(seed=7))


@pytest.mark.parametrize("changed", ["train_images", "test_images", "test_labels"])
def test_a_checkpoint_of_other_images_is_refused(changed, state, path):
    """As many of every class: the counts are the same."""
    images = make_images()
    torch.save(state, path)
    load(cifar.Run(PLAN, LOSS, images), path)
    other = images._replace(**{changed: getattr(images, changed).flip(0)})
    refused(path, "it is of another run: images is", images=other)


def test_equal_class_counts_are_not_enough(state, path):
    images, order = make_images(), torch.arange(20).roll(10)
    torch.save(state, path)
    refused(path, "images is", images=images._replace(train_images=images.train_images[order]))


DAMAGES = {
    "no dictionary": (lambda _: [1], "it has no plan"),
    "no plan": (lambda s: s.pop("plan"), "it has no plan"),
    "a plan of something else": (lambda s: s.update(plan=[1]), "it has no plan"),
    "a setting of another type": (lambda s: s["plan"].update(epochs=3.0), "epochs is 3.0, expected 3"),
    "a deep setting": (lambda s: s["plan"].update(seed=[[[]]]), "seed is a list, expected 0"),
    "control characters": (lambda s: s["plan"].update(device="\x1b[2J"), r"device is '\\x1b\[2J', expected 'cpu'"),
    "no history": (lambda s: s.pop("history"), "it has no history"),
    "an uneven history": (lambda s: s["history"]["test_error"].append(1.0), "has 1 and 2 epochs, expected 1 to 3"),
    "an overlong history": (
        lambda s: s.update(history={"train_loss": [1.0] * 4, "test_error": [1.0] * 4}),
        "has 4 and 4 epochs, expected 1 to 3",
    ),
    "an empty history": (lambda s: s.update(history={"train_loss": [], "test_error": []}), "has 0 and 0 epochs"),
    "a history of texts": (lambda s: s["history"].update(train_loss=["x"]), "train_loss is a list, expected a list of"),
    "an error of NaN": (lambda s: s["history"].update(test_error=[math.nan]), "test_error is not between 0 and 100"),
    "another history": (lambda s: s["history"].update(more=[1.0]), "it has no history"),
    "no weight": (lambda s: s["model"].pop("head.bias"), "model has not the entries"),
    "another weight": (lambda s: s["model"].update({"\x1b": torch.ones(1)}), "model has not the entries"),
    "a weight of another shape": (
        lambda s: s["model"].update({"head.bias": torch.ones(1)}),
        r"model, head.bias is float32 \[1\], expected float32 \[10\]",
    ),
    "a weight of another dtype": (
        lambda s: s["model"].update({"head.bias": torch.ones(10, dtype=torch.complex64)}),
        r"head.bias is complex64 \[10\], expected float32 \[10\]",
    ),
    "a sparse weight": (
        lambda s: s["model"].update({"head.bias": torch.ones(10).to_sparse()}),
        "head.bias is a tensor of layout torch.sparse_coo",
    ),
    "one optimizer": (lambda s: s["optimizers"].pop(), "optimizers is a list, expected a list of 2"),
    "momentum of another shape": (
        lambda s: s["optimizers"][1]["state"][0].update(momentum_buffer=torch.zeros(3)),
        r"optimizers 1, state, 0, momentum_buffer is float32 \[3\], expected float32 \[",
    ),
    "no momentum": (lambda s: s["optimizers"][0]["state"].clear(), "optimizers 0, state has not the entries"),
    "momentum of None": (
        lambda s: s["optimizers"][0]["state"][2].update(momentum_buffer=None),
        "momentum_buffer is None, expected float32",
    ),
    "another weight decay": (
        lambda s: s["optimizers"][0]["param_groups"][0].update(weight_decay=0.5),
        "weight_decay is 0.5, expected 0.0002",
    ),
    "another way to add": (
        lambda s: s["optimizers"][0]["param_groups"][0].update(foreach=True),
        "foreach is True, expected None",
    ),
    "other random numbers": (
        lambda s: s.update(generator=torch.zeros(3, dtype=torch.uint8)),
        r"generator is uint8 \[3\]",
    ),
    "impossible random numbers": (lambda s: s["generator"].fill_(255), "no checkpoint"),
}


def damaged(state, damage):
    """What one of ``DAMAGES`` leaves; it changes the state in place or returns another."""
    changed = damage(state)
    return changed if changed == [1] else state


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_what_it_should_be_is_refused(name, state, path):
    damage, reason = DAMAGES[name]
    torch.save(damaged(state, damage), path)
    refused(path, reason)


def test_tensors_that_share_memory_in_a_file_do_not_in_a_run(state, path):
    buffers = state["optimizers"][0]["state"]
    shape = buffers[0]["momentum_buffer"].shape
    buffers[0]["momentum_buffer"] = torch.zeros(1, requires_grad=True).expand(shape)
    torch.save(state, path)
    run = cifar.Run(PLAN, LOSS, make_images())
    load(run, path)
    run.epoch()


def test_lists_that_are_one_in_a_file_are_two_in_a_run(state, path):
    """One list would grow by two with every epoch, past the last one."""
    errors = state["history"]["test_error"]
    torch.save(state | {"history": {"train_loss": errors, "test_error": errors}}, path)
    run = cifar.Run(PLAN, LOSS, make_images())
    load(run, path)
    run.epoch()
    assert [len(values) for values in run.history] == [2, 2]


def with_pickle(path, content, new_name="data.pkl"):
    """Another pickle in the archive of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            if name.endswith("data.pkl"):
                name, part = name.replace("data.pkl", new_name), content
            archive.writestr(name, part)


PICKLES = {
    "a deep tuple as a key": (b"\x80\x02}" + nested(1000000) + b"K\x01s.", "more than 1000 elements"),
    "an endless tuple as a key": (b"\x80\x02}" + doubled(60) + b"K\x01s.", "more than 1000 elements"),
    "a deep list": (b"\x80\x02}X\x04\0\0\0plan(" + b"]" * 50000 + b"a" * 49999 + b"tu.", "checkpoint"),
    "something to run": (pickle.dumps(os.getcwd, 2), r"\([^.]{,40} \w+.getcwd"),
    "lines and colours": (b"cos\x1b[31m\nsystem\n)R.", r"\([^.]{,40} os\\x1b\[31m.system"),
    "an unknown protocol": (b"\x80\x52}.", "it has no plan"),
    "nothing": (b"", "no checkpoint"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_in_a_checkpoint_is_refused(name, path):
    content, reason = PICKLES[name]
    torch.save({"plan": 1}, path)
    with_pickle(path, content)
    refused(path, reason)


def test_a_hostile_pickle_does_not_hide_in_the_archive(state, path):
    hostile = b"\x80\x02}" + nested(1001) + b"K\x01s."
    torch.save({"plan": 1}, path)
    with_pickle(path, hostile, "DATA.PKL")  # where torch finds it, too
    refused(path, "more than 1000 elements")
    torch.save(state, path)
    path.write_bytes(hostile + path.read_bytes())  # which zipfile skips; torch would take it for its old format
    run = cifar.Run(PLAN, LOSS, make_images())
    load(run, path)
    assert torch.equal(run.model.state_dict()["head.bias"], state["model"]["head.bias"])


def test_a_damaged_file_is_refused(state, path):
    torch.save(state, path)
    whole = path.read_bytes()
    place = whole.index(state["model"]["head.weight"].numpy().tobytes()[:64]) + 3
    for content, reason in (
        (whole[:1000], "not a zip file"),
        (b"", "not a zip file"),
        (whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :], "damaged|CRC"),  # one bit of one weight
    ):
        path.write_bytes(content)
        refused(path, reason)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 1000)
    path.write_bytes(compressed.getvalue())
    refused(path, "it unpacks to 1000 bytes")


def test_a_full_disk_leaves_the_checkpoint_before(path):
    run = cifar.Run(PLAN, LOSS, make_images())
    path.write_bytes(b"before")
    with full_disk(), pytest.raises(OSError, match=rf"{re.escape(path.name)}' cannot be written: File too large"):
        save(run, path)
    assert path.read_bytes() == b"before"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(("place", "suffix"), [("folder", ""), ("folder", ".partial"), ("pipe", "")])
def test_the_command_looks_at_every_checkpoint_before_it_trains(place, suffix, tmp_path, monkeypatch, capsys):
    batches = make_batches("cifar10", images=10)
    for _, labels in batches.values():
        labels.copy_(torch.arange(10))
    write_binary(tmp_path, "cifar10", batches)
    monkeypatch.setattr(cifar.Run, "epoch", lambda _: pytest.fail("trains"))
    name = f"experiment_cifar_cifar10_2_ldam-drw_3_0.pt{suffix}"
    if place == "folder":
        (tmp_path / name).mkdir()
    else:
        os.mkfifo(tmp_path / name)
    options = ["--data", str(tmp_path), "--imbalance-factor", "2", "--epochs", "3", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        main(["experiment", "cifar", *options, "--loss", "cross-entropy", "--loss", "ldam-drw"])
    assert left.value.code == 2
    note, said = capsys.readouterr().err.splitlines()
    assert note.startswith("note: not the published files")
    assert said.startswith("longtail experiment cifar: error: ")
    assert f"{name}' is " in said


def test_a_class_without_images_is_named(tmp_path, capsys):
    batches = make_batches("cifar10", images=10)
    for _, labels in batches.values():
        labels.copy_(torch.arange(10).clamp(max=8))
    write_binary(tmp_path, "cifar10", batches)
    with pytest.raises(SystemExit):
        main(["experiment", "cifar", "--data", str(tmp_path), "--output", str(tmp_path)])
    assert "the cifar10 files have no training image of class 9\n" in capsys.readouterr().err
