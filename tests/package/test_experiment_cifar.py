"""The CIFAR experiment: the papers' network and schedule, runs that go on as if never stopped, and the command."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from cifar_files import make_batches, write_binary, write_pickles
from longtail.__main__ import main
from longtail.experiments import cifar, resnet
from longtail.experiments.cifar_data import Images


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors, and a machine that may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """A network of 8 layers instead of 32."""
    monkeypatch.setattr(cifar, "resnet", lambda num_classes: resnet.resnet(num_classes, blocks=1))


@pytest.fixture
def images():
    pixels = torch.randint(256, (90, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(90) % 10
    return Images(pixels[:60], labels[:60], pixels[60:], labels[60:])


def test_resnet_32_has_the_published_size_and_shortcuts_without_parameters():
    model = resnet.resnet(10)
    assert sum(p.numel() for p in model.parameters()) == 464_154
    assert len([m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]) == 32
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    block = resnet.BasicBlock(16, 32, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 8, 8)
    expected = torch.zeros(1, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_learning_rate_is_the_published_schedule():
    rates = [cifar.learning_rate(epoch, 200) for epoch in range(200)]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[159:161] == pytest.approx([0.1, 0.001])
    assert rates[179:181] == pytest.approx([0.001, 0.00001])
    assert cifar.learning_rate(0, 2) == 0.1


def test_augmentation_is_pad_crop_and_flip():
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)
    found = cifar.augment(images, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, made in zip(padded, found, strict=True):
        places = [
            (y, x, flipped)
            for y in range(9)
            for x in range(9)
            for flipped in (False, True)
            if torch.equal(
                made, image[:, y : y + 32, x : x + 32].flip(2) if flipped else image[:, y : y + 32, x : x + 32]
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {flipped for *_, flipped in seen} == {False, True}
    assert {y for y, *_ in seen} == {x for _, x, _ in seen} == set(range(9))


def final(run):
    return [
        *run.model.state_dict().values(),
        torch.tensor(run.history.train_loss),
        torch.tensor(run.history.test_error),
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "name", ["cross-entropy", "complement-objective-training", "ldam-drw", "class-balanced-sigmoid-focal"]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, images, tmp_path):
    plan = cifar.Plan("cifar10", imbalance_factor=3.0, epochs=5)
    (tmp_path / "whole").mkdir()
    whole = cifar.train(plan, name, images, tmp_path / "whole", lambda _: None)

    stops = iter([False, True, False, True])

    def interrupt(status):
        if "checkpoint" not in status and next(stops, False):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cifar.train(plan, name, images, tmp_path, interrupt)
    done = cifar.Run(plan, name, images)
    cifar.load(done, cifar.checkpoint_path(plan, name, tmp_path))
    assert len(done.history.test_error) == 4
    resumed = cifar.train(plan, name, images, tmp_path, lambda _: None)
    for a, b in zip(final(whole), final(resumed), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", cifar.METHODS)
def test_every_loss_learns(name, images, tmp_path):
    """Ten classes of one colour each: the loss of the last epoch is well below that of the first."""
    pixels = (images.train_labels * 25).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    easy = images._replace(train_images=pixels)
    plan = cifar.Plan("cifar10", imbalance_factor=2.0, epochs=8)
    losses = cifar.train(plan, name, easy, tmp_path, lambda _: None).history.train_loss
    assert min(losses[4:]) < 0.8 * losses[0]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("dataset", "write"), [("cifar10", write_binary), ("cifar100", write_pickles)])
def test_the_command_trains_reports_and_resumes(dataset, write, tmp_path, capsys):
    batches = make_batches(dataset, images=120 if dataset == "cifar100" else 20)
    for _, labels in batches.values():  # every class in every file
        labels.copy_(torch.arange(labels.numel()) % (100 if dataset == "cifar100" else 10))
    write(tmp_path, dataset, batches)
    factor = "2" if dataset == "cifar100" else "10"
    options = ["--data", str(tmp_path), "--dataset", dataset, "--imbalance-factor", factor, "--epochs", "2"]
    options += ["--loss", "cross-entropy", "ldam-drw", "--output", str(tmp_path)]
    main(["experiment", "cifar", *options])
    printed, noted = capsys.readouterr()
    assert "Not comparable with the papers: 2 epochs instead of 200" in printed
    file = {"cifar10": "data_batch_1.bin (20 of 10000", "cifar100": "train (120 of 50000"}[dataset]
    assert noted.startswith(f"note: not the published files: {file} images)")
    assert f"not the published files: {file}" in " ".join(printed.split())
    path = tmp_path / f"experiment_{dataset}_{factor}.csv"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with path.open(newline="") as file:
        first = list(csv.DictReader(file))
    assert [row["loss"] for row in first] == ["cross-entropy", "ldam-drw"]
    for row in first:
        assert 0 <= float(row["best_test_error"]) <= float(row["test_error"]) <= 100
        assert row["torch"] == torch.__version__
        assert row["commit"]
    published = [row["published_error"] for row in first]
    assert published == (["13.61", "11.84"] if dataset == "cifar10" else ["", ""])
    for text in filter(None, published):
        assert text in printed
    main(["experiment", "cifar", *options])
    assert "from the checkpoint" in capsys.readouterr().err
    with path.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [row["test_error_by_epoch"] for row in again] == [row["test_error_by_epoch"] for row in first]


def test_wrong_files_and_options_are_explained_in_one_line(tmp_path, capsys):
    for options, message in (
        ([], "required: --data/-d"),
        (["--data", str(tmp_path / "none")], "does not exist"),
        (["--data", str(tmp_path)], "no cifar10 under"),
        (["--data", str(tmp_path), "--loss", "mse"], "invalid choice: 'mse'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["experiment", "cifar", *options])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
