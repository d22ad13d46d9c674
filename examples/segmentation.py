"""Segmentation with ignore_index: cross-entropy beside class-weighted focal loss, where most pixels are background.

The images are generated: noise, in it large, small and tiny discs of three colours. Pixels on the border of a disc
belong to no class, as in Pascal VOC, and count in no loss. What is printed is the share of a class's pixels that were
found (recall), and intersection over union (IoU), which falls with every pixel taken for the class by mistake too.

Needs longtail alone.
Run: python examples/segmentation.py
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from torch import Tensor, nn

import longtail

CLASSES = ("background", "large", "small", "tiny")
RADII, SHARES = (9.0, 5.0, 3.0), (0.8, 0.4, 0.2)  # of the discs, in pixels; of the images that have one
COLOURS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.7, 0.7, 0.0], [0.6, 0.0, 0.6]])
VOID = 255


def generate(images: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and their masks (N, H, W), which hold the class of each pixel, or VOID."""
    masks = torch.zeros(images, size, size, dtype=torch.int64)
    rows, columns = torch.arange(size).view(-1, 1), torch.arange(size)
    for label, (radius, share) in enumerate(zip(RADII, SHARES, strict=True), start=1):
        y, x = size * torch.rand(2, images, 1, 1)
        distance = torch.hypot(rows - y, columns - x)
        distance[torch.rand(images) > share] = torch.inf  # no disc of this class
        masks[distance < radius + 0.5] = VOID
        masks[distance < radius - 0.5] = label
    colours = COLOURS[masks.where(masks != VOID, 0)].movedim(-1, 1)
    return colours + 0.5 * torch.randn_like(colours), masks


def train(loss_function: nn.Module, images: Tensor, masks: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)  # every loss starts from the same weights and sees the same batches
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=4, dilation=4), nn.ReLU()),
        nn.Conv2d(16, len(CLASSES), 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        loss = loss_function(model(images[batch]), masks[batch])  # logits (N, C, H, W), masks (N, H, W)
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Recall and IoU of each class, [C]."""
    counted, classes = masks != VOID, len(CLASSES)
    pairs = masks[counted] * classes + model(images).argmax(dim=1)[counted]
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()  # true class by predicted
    found = confusion.diagonal()
    return found / confusion.sum(1), found / (confusion.sum(0) + confusion.sum(1) - found)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="for training, and half as many for the test")
    parser.add_argument("--size", type=int, default=40, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=300, help="steps of the optimizer, on 16 images each")
    options = parser.parse_args()

    torch.manual_seed(0)
    train_data, test_data = generate(options.images, options.size), generate(options.images // 2, options.size)
    counts = longtail.class_counts(train_data[1], len(CLASSES), ignore_index=VOID)
    weight = longtail.effective_number_weight(counts, beta=0.9999)
    losses = {
        "cross-entropy": nn.CrossEntropyLoss(ignore_index=VOID),
        "weighted focal": longtail.FocalLoss(gamma=2.0, weight=weight, ignore_index=VOID),
    }
    print(f"{'':24}" + "".join(f"{name:>12}" for name in CLASSES))
    print(f"{'pixels':24}" + "".join(f"{count:12}" for count in counts.tolist()))
    print(f"{'class weight':24}" + "".join(f"{w:12.2f}" for w in weight.tolist()))
    for name, loss_function in losses.items():
        scores = evaluate(train(loss_function, *train_data, options.steps), *test_data)
        for kind, per_class in zip(("recall %", "IoU %"), scores, strict=True):
            print(f"{name + ', ' + kind:24}" + "".join(f"{100 * score:12.1f}" for score in per_class.tolist()))


if __name__ == "__main__":
    main()
