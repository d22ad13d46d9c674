"""A language model's head shared out over ranks: each holds a part of the vocabulary, all get the loss of the whole.

The body is the same on every rank, the rows of the head's weight are shared out, and no rank ever holds the logits of
the whole vocabulary. Each rank also trains the undivided model by itself, to compare: losses and weights of both agree
up to rounding.

Needs longtail alone; runs on the CPU.
Run: torchrun --nproc-per-node 2 examples/sharded_vocabulary.py
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import longtail

LOSS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4}  # these, and all options of longtail.cross_entropy


class Model(nn.Module):
    """Predicts the next token from the last; holds those rows of the head that belong to ``classes``."""

    def __init__(self, vocabulary: int, features: int, classes: slice) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights on every rank
        self.body = nn.Sequential(nn.Embedding(vocabulary, features), nn.Linear(features, features), nn.GELU())
        self.head = nn.Parameter(torch.randn(vocabulary, features)[classes] / features**0.5)


def largest_difference(sharded: Model, whole: Model, classes: slice) -> float:
    """Of all weights of this rank."""
    pairs = [(sharded.head, whole.head[classes])]
    pairs += zip(sharded.body.parameters(), whole.body.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=20_000, help="number of tokens")
    parser.add_argument("--features", type=int, default=64, help="size of the hidden states")
    parser.add_argument("--steps", type=int, default=50, help="steps of the optimizer, on 1024 tokens each")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it on several ranks: torchrun --nproc-per-node 2 examples/sharded_vocabulary.py")
    dist.init_process_group("gloo")
    rank, ranks, vocabulary = dist.get_rank(), dist.get_world_size(), options.vocabulary
    classes = slice(vocabulary * rank // ranks, vocabulary * (rank + 1) // ranks)

    sharded = Model(vocabulary, options.features, classes)
    whole = Model(vocabulary, options.features, slice(None))
    optimizer = torch.optim.Adam([*sharded.parameters(), *whole.parameters()], lr=1e-2)
    frequency = 1 / torch.arange(1, vocabulary + 1)  # Zipf's law
    following = torch.randperm(vocabulary)  # each token has one that comes after it
    if rank == 0:
        print(f"{classes.stop - classes.start} of {vocabulary} rows of the head on rank 0 of {ranks}")
        print(" step  sharded loss  whole loss")
    for step in range(1, options.steps + 1):
        tokens = torch.multinomial(frequency, 1024, replacement=True)  # one seed: the same on every rank
        target = following[tokens]
        loss = longtail.vocab_parallel_linear_cross_entropy(
            sharded.body(tokens), sharded.head, target, class_start=classes.start, num_classes=vocabulary, **LOSS
        )
        expected = longtail.linear_cross_entropy(whole.body(tokens), whole.head, target, **LOSS)
        optimizer.zero_grad()
        loss.backward()  # the gradient of the hidden states is summed over the ranks: every body gets the whole one
        expected.backward()
        optimizer.step()
        if rank == 0 and (step == 1 or step % 10 == 0):
            print(f"{step:5}{loss.item():14.6f}{expected.item():12.6f}")
    if rank == 0:
        print(f"largest difference of a weight on rank 0: {largest_difference(sharded, whole, classes):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
