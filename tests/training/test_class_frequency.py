"""The running estimate of class frequencies: its formula, its start, classes not seen, its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from longtail import class_counts, effective_number_weight, inverse_frequency_weight, logit_adjustment
from longtail.training import StreamingClassFrequency
from longtail.training.class_frequency import counts_without_sync
from tolerances import assert_close, assert_same

CLASSES = 6
SHARES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03, 0.0], dtype=torch.float64)


def stream(batches: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of different sizes, some rows ignored; the last class never occurs."""
    made = []
    for i in range(batches):
        target = torch.multinomial(SHARES, 20 + 7 * (i % 3), replacement=True, generator=generator)
        target[::9] = -100
        made.append(target)
    return made


@pytest.fixture
def targets() -> list[Tensor]:
    return stream(25, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 1.0])
def test_estimate_is_the_weighted_mean_of_the_batches(targets: list[Tensor], decay: float) -> None:
    """Free of bias at every step: the weights decay^age of the counts, over their sum."""
    stats = StreamingClassFrequency(CLASSES, decay)
    for t, target in enumerate(targets):
        stats.update(target)
        counts = torch.stack([class_counts(seen, CLASSES, -100).double() for seen in targets[: t + 1]])
        weighted = (counts * decay ** torch.arange(t, -1, -1, dtype=torch.float64)[:, None]).sum(0)
        assert_close(stats.frequency(), weighted / weighted.sum())
    assert stats.num_updates == 25
    assert stats.num_targets == sum((target != -100).sum() for target in targets)
    assert_close(stats.counts(min_count=0), stats.frequency() * stats.num_targets)


def test_a_batch_of_nothing_but_0_and_1() -> None:
    """Class indices, also in the shape of multi-hot rows."""
    for shape in ((2, 3), (3, 2)):
        stats = StreamingClassFrequency(shape[1])
        stats.update(torch.tensor([0, 1, 1, 0, 0, 0]).reshape(shape))
        assert stats.counts(min_count=0).tolist()[:2] == [4, 2]


def test_estimate_follows_a_change() -> None:
    stats = StreamingClassFrequency(3, 0.9)
    for _ in range(100):
        stats.update(torch.tensor([0, 0, 1]))
    for _ in range(100):
        stats.update(torch.tensor([2, 2, 1]))
    assert_close(stats.frequency()[1], torch.tensor(1 / 3, dtype=torch.float64))
    assert 0 < stats.frequency()[0] < 0.9**99


def test_weights_and_log_priors_are_those_of_the_counts(targets: list[Tensor]) -> None:
    stats = StreamingClassFrequency(CLASSES, 0.9)
    for target in targets:
        stats.update(target)
    counts = (stats.frequency() * 1000).clamp(min=1)
    assert counts[-1] == 1
    assert_same(stats.effective_number_weight(0.99, 1000), effective_number_weight(counts, 0.99))
    assert_same(stats.inverse_frequency_weight(0.5, 1000), inverse_frequency_weight(counts, 0.5))
    assert_same(stats.logit_adjustment(2.0, 1000), logit_adjustment(counts, 2.0))
    seen = stats.counts(min_count=3)
    assert seen[-1] == 3
    double = stats.logit_adjustment(min_count=3, dtype=torch.float64)
    assert_close(double, (seen / seen.sum()).log())


def test_unseen_classes() -> None:
    stats = StreamingClassFrequency(3)
    stats.update(torch.tensor([0, 0, 0, 1]))
    assert stats.frequency().tolist() == [0.75, 0.25, 0]
    assert_close(stats.logit_adjustment(), torch.tensor([3 / 5, 1 / 5, 1 / 5], dtype=torch.float64).log())
    with pytest.raises(ValueError, match="samples_per_class is 0 for class 2"):
        stats.effective_number_weight(0.9, min_count=0)
    assert stats.effective_number_weight(0.9, min_count=0, empty="zero")[2] == 0


def test_before_the_first_target() -> None:
    stats = StreamingClassFrequency(4)
    for _ in range(2):
        assert stats.frequency().tolist() == [0.25] * 4
        assert stats.effective_number_weight(0.99).tolist() == [1.0] * 4
        assert_close(stats.logit_adjustment(), torch.full((4,), -math.log(4), dtype=torch.float64))
        stats.update(torch.full((2, 3), -100))  # a batch without a single target that counts


@pytest.mark.parametrize("decay", [0.5, 1e-300, 1.0])
def test_batches_without_a_counted_target_change_nothing(decay: float) -> None:
    stats = StreamingClassFrequency(3, decay)
    stats.update(torch.tensor([0, 1, 1, 1]))
    before = copy.deepcopy(stats.state_dict())
    for nothing in (torch.tensor([-100]), torch.empty(0, 2, dtype=torch.int64)):
        for _ in range(1080):
            stats.update(nothing)
    for name, buffer in stats.state_dict().items():
        assert_same(buffer, before[name])
    assert stats.frequency().tolist() == [0.25, 0.75, 0]


def test_state(targets: list[Tensor]) -> None:
    stats, half = StreamingClassFrequency(CLASSES, 0.9), StreamingClassFrequency(CLASSES, 0.9).half()
    for target in targets[:10]:
        stats.update(target)
    model = torch.nn.ModuleDict({"stats": copy.deepcopy(stats)}).to(torch.bfloat16)
    assert_same(model["stats"].mean_counts, stats.mean_counts)
    half.load_state_dict(stats.state_dict())
    for other in (half, model["stats"]):
        for target in targets[10:]:
            other.update(target)
    for target in targets[10:]:
        stats.update(target)
    for name, buffer in stats.state_dict().items():
        assert_same(half.state_dict()[name], buffer)
        assert_same(model["stats"].state_dict()[name], buffer)
    stats.reset()
    assert stats.frequency().tolist() == [1 / CLASSES] * CLASSES
    assert stats.num_targets == stats.num_updates == 0
    assert StreamingClassFrequency(3).to("meta").mean_counts.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 2, None])
def test_counting_without_a_sync(dtype: torch.dtype, ignore_index: int | None) -> None:
    target = torch.randint(CLASSES, (7, 11)).to(dtype)
    if ignore_index == -100 and dtype != torch.uint8:
        target[::2] = -100
    counts = counts_without_sync(target.long(), CLASSES, ignore_index)
    assert_same(counts[:-1], class_counts(target, CLASSES, ignore_index).double())
    assert counts[-1] == 0


@pytest.mark.parametrize("wrong", [CLASSES, -1, 2**62])
def test_counting_without_a_sync_hides_nothing(wrong: int) -> None:
    assert counts_without_sync(torch.tensor([0, wrong, -100, wrong]), CLASSES, -100).tolist() == [1, 0, 0, 0, 0, 0, 2]


@pytest.mark.gpu
def test_on_the_gpu(targets: list[Tensor]) -> None:
    ours, expected = StreamingClassFrequency(CLASSES, 0.9).cuda(), StreamingClassFrequency(CLASSES, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for target in [target.pin_memory().to("cuda", non_blocking=True) for target in targets]:
            ours.update(target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for target in targets:
        expected.update(target)
    assert_close(ours.frequency().cpu(), expected.frequency())
    assert_close(ours.logit_adjustment().cpu(), expected.logit_adjustment().double())


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: StreamingClassFrequency(0), ValueError, "num_classes is 0, expected at least 1"),
        (lambda: StreamingClassFrequency(2, 0), ValueError, r"decay is 0, expected a number in \(0, 1\]"),
        (lambda: StreamingClassFrequency(2, 1.1), ValueError, r"decay is 1\.1, expected"),
        (lambda: StreamingClassFrequency(2).update(torch.tensor([0, 2])), IndexError, r"targets\[1\] = 2 is out of"),
        (lambda: StreamingClassFrequency(2).update(torch.ones(2)), TypeError, "targets have dtype torch.float32"),
        (lambda: StreamingClassFrequency(2, ignore_index="a"), TypeError, "ignore_index is a str, expected an int or"),
        (lambda: StreamingClassFrequency(2).counts(-1), ValueError, r"num_samples is -1\.0, expected"),
        (lambda: StreamingClassFrequency(2).counts(1, -1), ValueError, r"min_count is -1\.0, expected"),
    ],
)
def test_wrong_arguments(call, exception, message) -> None:
    with pytest.raises(exception, match=message):
        call()
