"""The setting of the long-tail papers (Cui et al. 2019, Cao et al. 2019): ResNet-32 on long-tailed CIFAR, 200 epochs.

SGD with momentum 0.9, batches of 128, learning rate 0.1, linear warm-up over 5 epochs, x 0.01 at epochs 160 and 180,
weight decay 2e-4; images padded by 4, cropped and flipped at random. Fewer epochs keep these places in proportion. A
run goes on from its last epoch's checkpoint, bit for bit as if it had not stopped (on the same machine and threads).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..class_balance import class_counts
from ..functional import cross_entropy
from ..training import long_tailed_indices
from ..training.scores import scores_of_samples
from . import methods
from .cifar_checkpoint import check_state, checkpoint_path, load, save
from .cifar_data import DATASETS, Images
from .methods import Method, MethodTraining
from .output import Row, with_provenance
from .resnet import resnet

BATCH_SIZE = 128
LEARNING_RATE, WEIGHT_DECAY = 0.1, 2e-4
PADDING = 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
MANY, FEW = 100, 20  # Liu et al. 2019

METHODS = {
    "cross-entropy": methods.CROSS_ENTROPY,
    "softmax-focal": methods.softmax_focal(1.0),
    "complement-objective-training": methods.COMPLEMENT_OBJECTIVE,
    "complement-cross-entropy": methods.COMPLEMENT_CROSS_ENTROPY,
    "class-balanced-softmax": methods.class_balanced_softmax(0.9999),
    "class-balanced-sigmoid": methods.class_balanced_sigmoid(0.9999),
    "class-balanced-sigmoid-focal": methods.class_balanced_sigmoid_focal(0.9999, 1.0),
    "logit-adjustment": methods.LOGIT_ADJUSTMENT,
    "ldam-drw": methods.LDAM_DRW,
}
"""By name on the command line."""

CUI, CAO = "Cui et al. 2019, table 2", "Cao et al. 2019, table 2"
_CLASS_BALANCED = ("class-balanced-softmax", "class-balanced-sigmoid", "class-balanced-sigmoid-focal")
_BEST = f"{CUI}, best of its class-balanced losses"
PUBLISHED: dict[tuple[str, float, str], tuple[float, str]] = {
    ("cifar10", 100.0, "cross-entropy"): (29.64, CUI),
    ("cifar100", 100.0, "cross-entropy"): (61.68, CUI),
    ("cifar10", 10.0, "cross-entropy"): (13.61, CAO),
    **{("cifar10", 100.0, name): (25.43, _BEST) for name in _CLASS_BALANCED},
    **{("cifar100", 100.0, name): (60.40, _BEST) for name in _CLASS_BALANCED},
    ("cifar10", 100.0, "ldam-drw"): (22.97, CAO),
    ("cifar10", 10.0, "ldam-drw"): (11.84, CAO),
    ("cifar100", 100.0, "ldam-drw"): (57.96, CAO),
    ("cifar100", 10.0, "ldam-drw"): (41.29, CAO),
}
"""Test error in % and source, by data set, imbalance factor and method."""


class Plan(NamedTuple):
    """What to run, for each loss."""

    dataset: str
    imbalance_factor: float = 100.0
    epochs: int = 200
    seed: int = 0
    device: str = "cpu"


class History(NamedTuple):
    """Of one run, by epoch."""

    train_loss: list[float]
    test_error: list[float]  # in %


def learning_rate(epoch: int, epochs: int) -> float:
    """Warm-up over the first fortieth, x 0.01 from 80 % and again from 90 % on: epochs 5, 160 and 180 of 200."""
    warm_up = epochs // 40
    if epoch < warm_up:
        return LEARNING_RATE * (epoch + 1) / warm_up
    return LEARNING_RATE * 0.01 ** ((epoch >= round(0.8 * epochs)) + (epoch >= round(0.9 * epochs)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Black borders of 4 pixels, a random crop back to size, a random flip; [N, 3, 32, 32] to the same.

    The random numbers are drawn on the CPU, so that they do not depend on the device.
    """
    n, _, height, width = images.shape
    shift = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(flip, columns.flip(0), columns) + shift[0]
    rows = torch.arange(height) + shift[1]
    padded = F.pad(images, (PADDING,) * 4)
    device = images.device
    return padded[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(images.shape[1], device=device)[:, None, None],
        rows.to(device)[:, None, :, None],
        columns.to(device)[:, None, None, :],
    ]


def normalize(images: Tensor) -> Tensor:
    """uint8 to float32, less the data set's mean, over its standard deviation, by channel."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def digest(*tensors: Tensor) -> str:
    """Of values and shapes: what tells runs on other images apart."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{list(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


class Run:
    """One loss on one data set, epoch by epoch; ``state`` is what a checkpoint holds."""

    def __init__(self, plan: Plan, name: str, images: Images) -> None:
        self.plan, self.name = plan, name
        self.generator = torch.Generator().manual_seed(plan.seed)
        available = class_counts(images.train_labels, DATASETS[plan.dataset].num_classes).tolist()
        if 0 in available:
            raise ValueError(f"the {plan.dataset} files have no training image of class {available.index(0)}")
        chosen = long_tailed_indices(images.train_labels, plan.imbalance_factor, generator=self.generator)
        train_images, self.train_labels = images.train_images[chosen], images.train_labels[chosen]
        self.test_labels, self.incomplete = images.test_labels, images.incomplete
        self.images_digest = digest(train_images, self.train_labels, images.test_images, images.test_labels)
        device = torch.device(plan.device)
        self.train_images, self.test_images = train_images.to(device), images.test_images.to(device)
        self.counts = class_counts(self.train_labels, len(available))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(plan.seed)
            self.model = resnet(self.counts.numel()).to(device)
        rate = functools.partial(learning_rate, epochs=plan.epochs)
        self.training = MethodTraining(
            METHODS[name], self.model, self.counts.to(device), plan.epochs, rate, WEIGHT_DECAY
        )
        self.history = History([], [])

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def finished(self) -> bool:
        return len(self.history.test_error) == self.plan.epochs

    def epoch(self) -> None:
        """Trains for one epoch, then tests."""
        self.model.train()
        self.training.start_epoch(len(self.history.test_error))
        total = 0.0
        order = torch.randperm(self.train_labels.numel(), generator=self.generator)
        for batch in order.split(BATCH_SIZE):
            images = normalize(augment(self.train_images[batch.to(self.train_images.device)], self.generator))
            labels = self.train_labels[batch].to(images.device)
            total += self.training.step(images, labels).item() * batch.numel()
        self.training.next_learning_rate()
        self.history.train_loss.append(total / order.numel())
        self.history.test_error.append(100 * (1 - self.test().overall))

    @torch.no_grad()
    def test(self) -> Any:
        """``LongTailScores`` on the test images."""
        self.model.eval()
        correct = []
        for images, labels in zip(self.test_images.split(500), self.test_labels.split(500), strict=True):
            labels = labels.to(images.device)
            _, stats = cross_entropy(self.model(normalize(images)), labels, return_stats=True)
            correct.append(stats.correct.to(self.test_labels.device))
        return scores_of_samples(torch.cat(correct), self.test_labels, self.counts, MANY, FEW)

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "plan": self.plan._asdict() | {"loss": self.name, "images": self.images_digest},
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.training.optimizers],
            "generator": self.generator.get_state(),
            "history": self.history._asdict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a ``state()``.

        Raises:
            ValueError: it is of another run, or of none.
        """
        check_state(self, state)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for entry in optimizer.state.values():  # of its own, as the lists below, whatever is shared in the file
                entry["momentum_buffer"] = entry["momentum_buffer"].detach().clone()
        self.generator.set_state(state["generator"])
        self.history = History(**{name: [*values] for name, values in state["history"].items()})
        self.training.go_on_from(len(self.history.test_error))


def check(plan: Plan, names: Iterable[str], images: Images, folder: Path) -> None:
    """Looks at every checkpoint before the first epoch of the first loss. Errors as :func:`load`."""
    for name in names:
        load(Run(plan, name, images), checkpoint_path(plan, name, folder))


def train(plan: Plan, name: str, images: Images, folder: Path, advance: Callable[[str], None]) -> Run:
    """Trains one loss to the end, from its checkpoint in ``folder`` where there is one; saves after each epoch."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    run, path = Run(plan, name, images), checkpoint_path(plan, name, folder)
    load(run, path)
    for epoch in range(len(run.history.test_error)):
        advance(f"{name}, epoch {epoch + 1} from the checkpoint")
    while not run.finished():
        run.epoch()
        save(run, path)
        advance(f"{name}, epoch {len(run.history.test_error)}, test error {run.history.test_error[-1]:.2f} %")
    return run


def row_of(run: Run) -> Row:
    """The figures of a finished run, the published one beside them."""
    plan, scores = run.plan, run.test()
    published, source = PUBLISHED.get((plan.dataset, plan.imbalance_factor, run.name), (None, None))
    row: Row = {
        "experiment": "cifar",
        "dataset": plan.dataset,
        "imbalance_factor": plan.imbalance_factor,
        "loss": run.name,
        "beta": run.method.beta,
        "focal_gamma": run.method.gamma,
        "seed": plan.seed,
        "epochs": plan.epochs,
        "train_images": run.train_labels.numel(),
        "test_images": run.test_labels.numel(),
        "incomplete_files": run.incomplete or None,
        "test_error": run.history.test_error[-1],
        "best_test_error": min(run.history.test_error),
        "published_error": published,
        "published_in": source,
        "train_loss": run.history.train_loss[-1],
        "test_error_by_epoch": " ".join(f"{error:.2f}" for error in run.history.test_error),
        "device": torch.cuda.get_device_name() if plan.device.startswith("cuda") else plan.device,
    }
    for group in ("many", "medium", "few"):
        row[f"accuracy_{group}"] = getattr(scores, group)
    return with_provenance(row)
