"""Small CIFAR files of random images, as they are published, and pickles that are not."""

import pickle

import torch

from longtail.experiments.cifar_data import DATASETS

PIXELS = 3072


def make_batches(dataset, images=6):
    """File name without its ending -> (pixels [N, 3072] uint8, labels [N])."""
    generator = torch.Generator().manual_seed(3)
    form = DATASETS[dataset].pickled
    return {
        name: (
            torch.randint(256, (images, PIXELS), generator=generator, dtype=torch.uint8),
            torch.randint(DATASETS[dataset].num_classes, (images,), generator=generator),
        )
        for name in (*form.train, *form.test)
    }


def write_binary(folder, dataset, batches):
    for name, (pixels, labels) in batches.items():
        columns = [labels.to(torch.uint8)[:, None], pixels]
        if dataset == "cifar100":
            columns.insert(0, torch.full_like(columns[0], 255))  # the coarse class, which is not read
        (folder / f"{name}.bin").write_bytes(torch.cat(columns, 1).numpy().tobytes())


def write_pickles(folder, dataset, batches, protocol=2):
    key = DATASETS[dataset].pickled.labels.encode()
    for name, (pixels, labels) in batches.items():
        content = {b"batch_label": b"x", key: labels.tolist(), b"data": pixels.numpy(), b"filenames": [b"a.png"]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


def nested(tuples, start=b")"):
    """A tuple in a tuple in a tuple."""
    return start + b"\x85" * tuples


def doubled(times):
    """A tuple of the same tuple twice, and so on: 2^times elements when it is written out."""
    return b")" + b"2\x86" * times
