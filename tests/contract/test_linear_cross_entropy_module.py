"""Promise: the fused linear loss as a module: its own weight or a tied one; sharded weights are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cases
import longtail
from tolerances import assert_close, assert_same

ROWS, FEATURES, CLASSES = 12, 8, 13


def features(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, FEATURES, generator=cases.generator(seed))
    target = torch.randint(CLASSES, (rows,), generator=cases.generator(seed + 1))
    target[1] = cases.IGNORE
    return x, target


class Tied(nn.Module):
    """Embedding -> tanh -> head that shares the embedding's weight."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.loss = (
            longtail.LinearCrossEntropyLoss(
                FEATURES, CLASSES, linear_weight=self.embedding.weight, complement_gamma=-1.0, chunk_size=5
            )
            if fused
            else None
        )

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.embedding(tokens).tanh()
        if self.loss is not None:
            return self.loss(hidden, target)  # type: ignore[no-any-return]
        return longtail.complement_cross_entropy(hidden @ self.embedding.weight.T, target)  # type: ignore[no-any-return]


def test_tied_embedding_and_gradient_accumulation() -> None:
    grads = []
    for fused in (False, True):
        model = Tied(fused)
        assert len(list(model.parameters())) == 1
        for seed in range(3):  # three micro-batches into one .grad
            _, target = features(seed=seed)
            tokens = torch.randint(CLASSES, (ROWS,), generator=cases.generator(seed))
            (model(tokens, target) / 3).backward()
        grads.append([model.embedding.weight.grad])
    (eager,), (fused_grad,) = grads
    assert eager.abs().max() > 0
    assert_close(fused_grad, eager.double(), factor=4)


def test_module() -> None:
    x, target = features()
    head = longtail.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, weight=torch.rand(CLASSES), focal_gamma=2.0)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    expected = longtail.cross_entropy(head.linear(x), target, head.weight, focal_gamma=2.0)
    assert_close(head(x, target), expected.double(), factor=4)
    summed = longtail.focal_loss(head.linear(x), target, reduction="sum")
    assert_close(head(x, target, reduction="sum", weight=None), summed.double(), factor=4)
    assert "in_features=8, num_classes=13" in repr(head)
    assert "focal_gamma=2.0" in repr(head)
    dense = longtail.LinearCrossEntropyLoss(FEATURES, 3, out_features=(2, 4))
    assert dense(x, torch.zeros(ROWS, 2, 4, dtype=torch.long)).dim() == 0
    with pytest.raises(ValueError, match="linear_weight"):
        longtail.LinearCrossEntropyLoss(FEATURES, CLASSES, linear_weight=nn.Parameter(torch.zeros(3, FEATURES)))
    with pytest.raises(TypeError, match="linear_weight"):
        longtail.LinearCrossEntropyLoss(FEATURES, CLASSES, linear_weight=torch.zeros(CLASSES, FEATURES))
    with pytest.raises(TypeError, match="unknown options: linear_bias"):
        longtail.LinearCrossEntropyLoss(FEATURES, CLASSES, linear_bias=torch.zeros(CLASSES))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such module")
def test_module_takes_the_state_of_torchs() -> None:
    x, target = features()
    theirs = nn.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True)
    ours = longtail.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x, target), theirs(x, target).detach().double(), factor=4)


def test_sharded_parameters() -> None:
    """A DTensor is refused, with what to call; gathered, it trains and its gradient is sharded again."""
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x, target = features()
        full = torch.randn(CLASSES, FEATURES)
        weight = nn.Parameter(tensor.distribute_tensor(full, mesh, [tensor.Shard(0)]))
        with pytest.raises(TypeError, match=r"linear_weight is a DTensor.*full_tensor\(\)"):
            longtail.linear_cross_entropy(x, weight, target)
        longtail.linear_cross_entropy(x, weight.full_tensor(), target).backward()
        plain = full.clone().requires_grad_()
        longtail.linear_cross_entropy(x, plain, target).backward()
        assert_same(weight.grad.full_tensor(), plain.grad)
    finally:
        distributed.destroy_process_group()
