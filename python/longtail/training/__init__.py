"""What the papers do besides the loss: two-step training, schedules, re-sampling, class statistics, metrics."""

from typing import TYPE_CHECKING, Any

from .class_frequency import StreamingClassFrequency
from .complement_objective import (
    ComplementObjectiveLosses,
    ComplementObjectiveTraining,
    SingleForwardComplementObjectiveTraining,
)
from .long_tail import long_tailed_counts, long_tailed_indices
from .multi_label_sampler import MultiLabelSampler
from .normalized_linear import NormalizedLinear
from .sampler import ClassBalancedSampler
from .schedules import ComplementGammaSchedule, DeferredReweighting
from .scores import LongTailAveragePrecisions, LongTailScores
from .sigmoid_start import init_sigmoid_bias_, parameter_groups_without_bias_decay

if TYPE_CHECKING:
    from .accuracy import LongTailAccuracy
    from .average_precision import LongTailMeanAveragePrecision

__all__ = [
    "ClassBalancedSampler",
    "ComplementGammaSchedule",
    "ComplementObjectiveLosses",
    "ComplementObjectiveTraining",
    "DeferredReweighting",
    "LongTailAccuracy",
    "LongTailAveragePrecisions",
    "LongTailMeanAveragePrecision",
    "LongTailScores",
    "MultiLabelSampler",
    "NormalizedLinear",
    "SingleForwardComplementObjectiveTraining",
    "StreamingClassFrequency",
    "init_sigmoid_bias_",
    "long_tailed_counts",
    "long_tailed_indices",
    "parameter_groups_without_bias_decay",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The metrics are made when they are first asked for: torchmetrics takes seconds to import."""
        if name not in ("LongTailAccuracy", "LongTailMeanAveragePrecision"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .accuracy import LongTailAccuracy
        from .average_precision import LongTailMeanAveragePrecision

        return LongTailAccuracy if name == "LongTailAccuracy" else LongTailMeanAveragePrecision
