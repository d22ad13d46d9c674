"""A plain PyTorch loop on long-tailed handwritten digits: cross-entropy beside two losses made for rare classes.

The first digit keeps nearly all of its training images, the last a few. The test images are balanced, and every loss
is judged in the same way, by the largest of the raw logits: class biases and weights belong to training alone.

Needs scikit-learn, for the images: pip install --no-build-isolation ".[demo]"
Run: python examples/training_loop.py
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import longtail
from longtail.training import LongTailAccuracy, LongTailScores, long_tailed_indices


def load_data(imbalance_factor: float, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Images (N, 64) and labels (N,): a long-tailed training set and a balanced test set."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=500, stratify=labels, random_state=seed)
    train_images, test_images = (torch.as_tensor(x, dtype=torch.float32) for x in split[:2])
    train_labels, test_labels = (torch.as_tensor(x) for x in split[2:])
    kept = long_tailed_indices(train_labels, imbalance_factor, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(train_images[kept], train_labels[kept]), TensorDataset(test_images, test_labels)


def train(loss_function: nn.Module, data: TensorDataset, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)  # every loss starts from the same weights and sees the same batches
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset, counts: Tensor) -> LongTailScores:
    accuracy = LongTailAccuracy(counts, many=50, few=10)  # groups by training images: above 50, 50 to 10, below 10
    for images, labels in DataLoader(data, batch_size=256):
        predicted = model(images).argmax(dim=1)  # from the raw logits, whatever the loss added to them
        accuracy.update(predicted, labels)
    return accuracy.compute()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--imbalance-factor", type=float, default=50, help="largest over smallest class")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    options = parser.parse_args()

    train_data, test_data = load_data(options.imbalance_factor, options.seed)
    counts = longtail.class_counts(train_data.tensors[1], 10)
    print("training images of the digits 0 to 9:", *counts.tolist())
    losses = {
        "cross-entropy": nn.CrossEntropyLoss(),
        "logit adjustment": longtail.CrossEntropyLoss(class_bias=longtail.logit_adjustment(counts)),
        "class-balanced focal": longtail.ClassBalancedLoss(counts, beta=0.999, loss="focal"),
    }
    print(f"{'accuracy in %':22}{'overall':>9}{'many':>9}{'medium':>9}{'few':>9}")
    for name, loss_function in losses.items():
        model = train(loss_function, train_data, options.epochs, options.seed)
        scores = evaluate(model, test_data, counts)
        shown = (scores.overall, scores.many, scores.medium, scores.few)
        print(f"{name:22}" + "".join(f"{100 * score:9.1f}" for score in shown))


if __name__ == "__main__":
    main()
