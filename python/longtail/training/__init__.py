"""What the papers do besides the loss: two-step training, schedules, re-sampling, class statistics, metrics."""

from .class_frequency import StreamingClassFrequency
from .complement_objective import (
    ComplementObjectiveLosses,
    ComplementObjectiveTraining,
    SingleForwardComplementObjectiveTraining,
)
from .long_tail import LongTailAccuracy, LongTailScores, long_tailed_counts, long_tailed_indices
from .sampler import ClassBalancedSampler
from .schedules import ComplementGammaSchedule, DeferredReweighting
from .sigmoid_start import init_sigmoid_bias_, parameter_groups_without_bias_decay

__all__ = [
    "ClassBalancedSampler",
    "ComplementGammaSchedule",
    "ComplementObjectiveLosses",
    "ComplementObjectiveTraining",
    "DeferredReweighting",
    "LongTailAccuracy",
    "LongTailScores",
    "SingleForwardComplementObjectiveTraining",
    "StreamingClassFrequency",
    "init_sigmoid_bias_",
    "long_tailed_counts",
    "long_tailed_indices",
    "parameter_groups_without_bias_decay",
]
